"""Non-negative least squares: optimal by the Karush-Kuhn-Tucker conditions, and deaf to single bad rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.calibration.least_squares import nonnegative, r_squared, robust_nonnegative


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 14))
def test_the_solution_is_optimal(seed: int, columns: int, more_rows: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(columns + more_rows, columns)) * 10.0 ** rng.integers(-6, 6, size=columns)
    target = rng.normal(size=columns + more_rows)
    found = nonnegative(matrix, target)
    gradient = matrix.T @ (target - matrix @ found) / np.linalg.norm(matrix, axis=0)
    assert (found >= 0).all()
    assert (gradient <= 1e-8).all(), "a constant at zero would make the error smaller"
    assert np.abs(gradient[found > 0]).max(initial=0.0) < 1e-8, "a constant above zero is not at its best"


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_bad_rows_do_not_pull(seed: int, bad: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(0.1, 1.0, size=(40, 4))
    wanted = rng.uniform(0.5, 2.0, size=4)
    target = matrix @ wanted
    scale = target.copy()
    target[:bad] *= 8.0
    assert robust_nonnegative(matrix, target, scale) == pytest.approx(wanted, rel=1e-3)
    assert nonnegative(matrix, target) != pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize(
    ("matrix", "target"),
    [
        (np.ones((3, 2)), np.ones(2)),
        (np.ones((0, 2)), np.ones(0)),
        (np.ones(3), np.ones(3)),
        (np.full((3, 2), np.nan), np.ones(3)),
        (np.ones((3, 2)), np.array([1.0, np.inf, 1.0])),
    ],
)
def test_what_is_no_system_is_refused(matrix: np.ndarray, target: np.ndarray) -> None:
    with pytest.raises(ValueError, match="system"):
        nonnegative(matrix, target)


def test_rows_need_a_scale() -> None:
    with pytest.raises(ValueError, match="scale"):
        robust_nonnegative(np.ones((2, 1)), np.ones(2), np.array([1.0, 0.0]))


def test_a_column_of_zeros_stays_zero() -> None:
    assert nonnegative(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([1.0, 2.0])).tolist() == pytest.approx([1.0, 0.0])


def test_share_of_the_variance() -> None:
    measured = np.array([1.0, 2.0, 3.0])
    assert r_squared(measured, measured) == 1.0
    assert r_squared(measured, np.full(3, 2.0)) == 0.0
    assert r_squared(np.ones(3), np.ones(3)) == 1.0
    assert r_squared(np.ones(3), np.full(3, 2.0)) == 0.0
