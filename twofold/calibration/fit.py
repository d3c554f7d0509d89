"""Fitting a step law and a front end to measurements. Pure.

One linear system over all points: the seconds of a decode step, of a prefill as the engine counts it, of a mixed step,
and of a first token as a client sees it, are sums of the same non-negative constants. Each point is the median of its
repeats, and counts by its relative error.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import median
from typing import Any, TypeVar

import msgspec
import numpy as np

from twofold.calibration.least_squares import Array, r_squared, robust_nonnegative
from twofold.calibration.values import Decode, FirstToken, Measurements, Mixed
from twofold.model.profile import StepLaw

LAW = (
    "base_s",
    "decode_per_seq_s",
    "decode_per_kv_token_s",
    "prefill_per_seq_s",
    "prefill_per_token_s",
    "prefill_per_token_context_s",
)
FRONT_END = ("request_overhead_s", "request_overhead_per_token_s")
CONSTANTS = LAW + FRONT_END
_COLUMN = {name: index for index, name in enumerate(CONSTANTS)}
_SMALLEST_S = 1e-9
RESAMPLINGS = 40
_LEAST_STEP, _LEAST_TOKEN = 0.05, 0.005
"""Least ``base_s`` as a share of the shortest decode step, least ``prefill_per_token_s`` as one of TTFT over tokens."""
_P90 = 1.2816
"""Standard deviations from the median to the 90th percentile of a normal distribution."""

T = TypeVar("T")


class FitError(ValueError):
    """The measurements cannot tell the constants; one line."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the fit: median of its repeats beside what the fitted profile says."""

    kind: str
    """"ttft", "prefill", "itl" or "mixed"."""
    sequences: int
    prompt_tokens: int
    cached_tokens: int
    context_tokens: float
    repeats: int
    measured_s: float
    predicted_s: float
    spread: float
    """Half the distance of the quartiles of the repeats, over the median."""

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_s / self.measured_s - 1


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """The fitted constants and how well they say what was measured."""

    law: StepLaw
    request_overhead_s: float
    request_overhead_per_token_s: float
    request_overhead_busy_s: float
    step_jitter: float
    points: tuple[Point, ...]
    intervals: dict[str, tuple[float, float]]
    """Per constant: the 5 % and the 95 % quantile over fits to resampled repeats."""

    def of(self, kind: str) -> list[Point]:
        """Points of one kind."""
        return [point for point in self.points if point.kind == kind]

    def error(self, *kinds: str) -> float | None:
        """Mean absolute relative error over the points of these kinds; None without points."""
        errors = [abs(point.error) for point in self.points if point.kind in kinds]
        return sum(errors) / len(errors) if errors else None

    def worst(self, *kinds: str) -> float | None:
        """Largest absolute relative error over the points of these kinds."""
        return max((abs(point.error) for point in self.points if point.kind in kinds), default=None)

    def r2(self, *kinds: str) -> float | None:
        """Share of the variance explained over the points of these kinds."""
        chosen = [point for point in self.points if point.kind in kinds]
        if not chosen:
            return None
        return r_squared(np.array([p.measured_s for p in chosen]), np.array([p.predicted_s for p in chosen]))

    @property
    def spread(self) -> float:
        """Median over all points of the relative spread of their repeats: the noise of the measurement."""
        spreads = [point.spread for point in self.points if point.repeats > 1]
        return median(spreads) if spreads else 0.0


class _Row(msgspec.Struct, frozen=True):
    kind: str
    sequences: int
    prompt_tokens: int
    cached_tokens: int
    context_tokens: float
    coefficients: tuple[float, ...]
    repeats_s: tuple[float, ...]


def fit(
    measurements: Measurements, *, max_num_batched_tokens: int, seed: int = 0, resamplings: int = RESAMPLINGS
) -> Fit:
    """The constants that say best what was measured.

    ``max_num_batched_tokens``: longer prompts take several steps. ``resamplings``: fits for the intervals, 0 for none.
    Raises FitError with too few points.
    """
    rows = _rows(measurements, max_num_batched_tokens)
    if not any(row.kind == "itl" for row in rows) or not any(row.kind in ("ttft", "prefill") for row in rows):
        raise FitError("a fit needs at least one decode point and one prompt point")
    used = [_COLUMN[name] for name in CONSTANTS if any(row.coefficients[_COLUMN[name]] for row in rows)]
    constants = _solve(rows, used, median)
    intervals = _intervals(rows, used, random.Random(seed), resamplings)
    law = StepLaw(**{name: float(constants[_COLUMN[name]]) for name in LAW})
    return Fit(
        law=law,
        request_overhead_s=float(constants[_COLUMN["request_overhead_s"]]),
        request_overhead_per_token_s=float(constants[_COLUMN["request_overhead_per_token_s"]]),
        request_overhead_busy_s=_busy_s(measurements.mixed, law, constants),
        step_jitter=_jitter(measurements.decodes),
        points=tuple(sorted((_point(row, constants) for row in rows), key=_order)),
        intervals=intervals,
    )


def _busy_s(samples: Sequence[Mixed], law: StepLaw, constants: Array) -> float:
    """What first tokens take longer beside running streams, beyond prefill, idle overhead and the rest of a step.

    A prompt comes at any moment of a step of decodes and waits half of it on average.
    """
    fixed_s, per_token_s = (float(constants[_COLUMN[name]]) for name in FRONT_END)
    rests = [
        sample.ttft_s
        - sample.step_s
        - (fixed_s + per_token_s * sample.new_tokens)
        - law.decode_s(sample.sequences, sample.sequences * sample.context_tokens) / 2
        for sample in samples
        if sample.ttft_s is not None
    ]
    return max(0.0, median(rests)) if rests else 0.0


def _jitter(samples: Sequence[Decode]) -> float:
    """Standard deviation of the logarithm of the time between two tokens, by two quantiles of each point."""
    sigmas = [math.log(s.gap_p90_s / s.gap_p50_s) / _P90 for s in samples if 0 < s.gap_p50_s <= s.gap_p90_s]
    return median(sigmas) if sigmas else 0.0


def _solve(rows: Sequence[_Row], used: Sequence[int], middle: Callable[[Sequence[float]], float]) -> Array:
    matrix = np.array([[row.coefficients[column] for column in used] for row in rows], dtype=np.float64)
    target = np.array([max(_SMALLEST_S, middle(row.repeats_s)) for row in rows], dtype=np.float64)
    least = _least(rows, target)
    constants = np.zeros(len(CONSTANTS))
    constants[used] = robust_nonnegative(matrix, target - matrix @ least[used], target)
    return constants + least


def _least(rows: Sequence[_Row], target: Array) -> Array:
    """Lower bounds: a step and a prompt token always take some time, and no law without them is of use.

    Far below any real engine's: only a host so noisy that the rest of the fit is doubtful, too, comes down to them.
    """
    least = np.zeros(len(CONSTANTS))
    step, new = _COLUMN["base_s"], _COLUMN["prefill_per_token_s"]
    steps = [seconds for row, seconds in zip(rows, target, strict=True) if row.kind == "itl"]
    prompts = [
        seconds / row.coefficients[new]
        for row, seconds in zip(rows, target, strict=True)
        if row.kind in ("ttft", "prefill") and row.coefficients[new]
    ]
    least[step] = _LEAST_STEP * min(steps)
    least[new] = _LEAST_TOKEN * min(prompts)
    return least


def _intervals(
    rows: Sequence[_Row], used: Sequence[int], rng: random.Random, resamplings: int
) -> dict[str, tuple[float, float]]:
    """Bootstrap: as many repeats as there were, drawn with replacement, and points likewise."""
    fits = []
    for _ in range(resamplings):
        chosen = rng.choices(rows, k=len(rows))
        kinds = {row.kind for row in chosen}
        if not {"itl"} <= kinds or not kinds & {"ttft", "prefill"}:
            continue
        fits.append(_solve(chosen, used, lambda values: median(rng.choices(values, k=len(values)))))
    if not fits:
        return {}
    low, high = np.quantile(np.array(fits), [0.05, 0.95], axis=0)
    return {CONSTANTS[column]: (float(low[column]), float(high[column])) for column in used}


def _rows(measurements: Measurements, budget: int) -> list[_Row]:
    rows: list[_Row] = []
    for (prompt, cached), samples in _grouped(
        measurements.first_tokens, lambda s: (s.prompt_tokens, s.cached_tokens)
    ).items():
        rows += _first_token_rows(prompt, cached, samples, budget)
    for (sequences, context), decodes in _grouped(
        measurements.decodes, lambda s: (s.sequences, s.context_tokens)
    ).items():
        decodes.sort(key=lambda sample: sample.step_s)
        # What the steps held differs a little between repeats: that of the middle one goes with the median.
        middle = decodes[len(decodes) // 2]
        times = tuple(sample.step_s for sample in decodes)
        rows.append(_Row("itl", sequences, 0, 0, context, _mean_step(middle), times))
    for (sequences, new), mixed in _grouped(measurements.mixed, lambda s: (s.sequences, s.new_tokens)).items():
        context = median(sample.context_tokens for sample in mixed)
        row = _step(sequences, sequences * context, chunks=1, new=new)
        times = tuple(sample.step_s for sample in mixed)
        rows.append(_Row("mixed", sequences, new, 0, context, row, times))
    return rows


def _first_token_rows(prompt: int, cached: int, samples: Sequence[FirstToken], budget: int) -> list[_Row]:
    new = prompt - cached
    steps = max(1, math.ceil(new / budget))
    engine = _step(0, 0, steps=steps, chunks=steps, new=new, cached=cached)
    front_end = (0.0,) * len(LAW) + (1.0, float(prompt))
    whole = tuple(a + b for a, b in zip(engine, front_end, strict=True))
    told = [sample for sample in samples if sample.prefill_s is not None]
    rows = [_Row("ttft", 0, prompt, cached, 0.0, whole, tuple(sample.ttft_s for sample in samples))]
    if told:
        rows.append(_Row("prefill", 0, prompt, cached, 0.0, engine, tuple(s.prefill_s or 0.0 for s in told)))
    return rows


def _mean_step(sample: Decode) -> tuple[float, ...]:
    if not sample.decodes:
        return _step(sample.sequences, sample.sequences * sample.context_tokens)
    prompts = (sample.prompts, sample.prompt_tokens, sample.attention)
    return (1.0, sample.decodes, sample.kv_tokens, *prompts, 0.0, 0.0)


def _step(
    sequences: int, kv_tokens: float, *, steps: int = 1, chunks: int = 0, new: int = 0, cached: int = 0
) -> tuple[float, ...]:
    attention = new * (cached + new / 2)
    return (float(steps), float(sequences), float(kv_tokens), float(chunks), float(new), attention, 0.0, 0.0)


def _point(row: _Row, constants: Array) -> Point:
    measured = max(_SMALLEST_S, median(row.repeats_s))
    quartiles = np.quantile(np.array(row.repeats_s), [0.25, 0.75])
    return Point(
        kind=row.kind,
        sequences=row.sequences,
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        context_tokens=row.context_tokens,
        repeats=len(row.repeats_s),
        measured_s=measured,
        predicted_s=float(np.dot(row.coefficients, constants)),
        spread=float(quartiles[1] - quartiles[0]) / 2 / measured,
    )


def _order(point: Point) -> tuple[Any, ...]:
    return (
        point.kind,
        point.cached_tokens > 0,
        round(math.log10(point.context_tokens + 1)),
        point.sequences,
        point.prompt_tokens,
    )


def _grouped(samples: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for sample in samples:
        groups[key(sample)].append(sample)
    return groups
