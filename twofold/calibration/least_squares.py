"""Non-negative least squares that single bad measurements cannot pull away. Pure."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_OUTLIER_SIGMAS = 1.5
"""Residuals beyond so many standard deviations count linearly, not squared (Huber's constant is 1.345)."""
_SIGMA_OF_MAD = 1.4826
_REWEIGHTINGS = 25


def nonnegative(matrix: Array, target: Array) -> Array:
    """The vector ``x >= 0`` with the least ``|matrix @ x - target|``.

    The active-set method of Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23. Columns are scaled
    to unit length first, as the constants of a step law differ by six orders of magnitude.

    Raises ValueError for shapes that do not fit, an empty system or values that are not finite.
    """
    if matrix.ndim != 2 or matrix.shape[0] != target.shape[0] or not matrix.size:
        raise ValueError(f"no system of equations: {matrix.shape} and {target.shape}")
    if not (np.isfinite(matrix).all() and np.isfinite(target).all()):
        raise ValueError("the system of equations holds values that are not finite")
    norms = np.linalg.norm(matrix, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    scaled = matrix / scale
    columns = matrix.shape[1]
    solution = np.zeros(columns)
    passive = np.zeros(columns, dtype=bool)
    tolerance = 1e-12 * max(1.0, float(np.abs(scaled.T @ target).max()))
    for _ in range(10 * columns):
        gradient = scaled.T @ (target - scaled @ solution)
        gradient[passive] = -np.inf
        entering = int(np.argmax(gradient))
        if passive.all() or gradient[entering] <= tolerance:
            break
        passive[entering] = True
        solution = _feasible(scaled, target, solution, passive)
    return solution / scale


def _feasible(matrix: Array, target: Array, solution: Array, passive: NDArray[np.bool_]) -> Array:
    """The least-squares solution over the passive columns, each that would turn negative taken out (in place)."""
    while passive.any():
        trial = np.zeros_like(solution)
        trial[passive] = np.linalg.lstsq(matrix[:, passive], target, rcond=None)[0]
        blocked = passive & (trial <= 0)
        if not blocked.any():
            return trial
        step = float(np.min(solution[blocked] / (solution[blocked] - trial[blocked])))
        solution = solution + step * (trial - solution)
        passive &= solution > 1e-15
        passive &= ~(blocked & (solution <= 1e-15))
    return np.zeros_like(solution)


def robust_nonnegative(matrix: Array, target: Array, scale: Array) -> Array:
    """The vector ``x >= 0`` that minimises Huber's loss of ``(matrix @ x - target) / scale``.

    ``scale``: one positive number a row; the measurement itself makes relative errors count. Iteratively reweighted
    least squares; the width of Huber's loss follows the median absolute residual. Raises ValueError as ``nonnegative``.
    """
    if not (scale > 0).all():
        raise ValueError("every row needs a positive scale")
    rows, wanted = matrix / scale[:, None], target / scale
    weights = np.ones(len(wanted))
    solution = nonnegative(rows, wanted)
    for _ in range(_REWEIGHTINGS):
        residuals = np.abs(rows @ solution - wanted)
        width = _OUTLIER_SIGMAS * max(_SIGMA_OF_MAD * float(np.median(residuals)), 1e-9)
        weights = np.sqrt(np.minimum(1.0, width / np.maximum(residuals, 1e-300)))
        better = nonnegative(rows * weights[:, None], wanted * weights)
        if np.allclose(better, solution, rtol=1e-9, atol=0.0):
            return better
        solution = better
    return solution


def r_squared(measured: Array, predicted: Array) -> float:
    """Share of the variance of ``measured`` that ``predicted`` explains; 1 where both are equal, 0 or below useless."""
    spread = float(((measured - measured.mean()) ** 2).sum())
    error = float(((measured - predicted) ** 2).sum())
    if spread <= 0:
        return 1.0 if error <= 1e-18 else 0.0
    return 1.0 - error / spread
