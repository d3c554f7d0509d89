"""What a calibration shows: tables of fit against measurement, a plot, warnings, the RESULT line."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from twofold.calibration.fit import CONSTANTS, Fit, Point
from twofold.calibration.profile_file import Limits
from twofold.model.profile import EngineProfile

NOISY_SPREAD = 0.10
"""Relative spread of repeats above which a host counts as noisy."""
BUSY_HOST = 0.15
"""Share of the host's CPU in use beside an idle engine above which it counts as loaded."""
POOR_FIT = 0.15
_TITLES = {"ttft": "Time to first token", "itl": "Step of decodes only", "mixed": "Step of decodes and a prompt"}
_UNITS = {
    "base_s": ("ms", 1e3),
    "decode_per_seq_s": ("µs per sequence", 1e6),
    "decode_per_kv_token_s": ("ns per token of context", 1e9),
    "prefill_per_seq_s": ("ms per prompt", 1e3),
    "prefill_per_token_s": ("µs per prompt token", 1e6),
    "prefill_per_token_context_s": ("ns per token and token before it", 1e9),
    "request_overhead_s": ("ms per request", 1e3),
    "request_overhead_per_token_s": ("µs per prompt token", 1e6),
}


def warnings_of(
    fit: Fit,
    limits: Limits,
    *,
    rounds: int,
    planned_rounds: int,
    host_cpu: float | None,
    foreign_requests: int,
    merged_answers: int,
    cold_hits: int,
) -> list[str]:
    """What makes the figures doubtful, one line each."""
    found: list[str] = []
    if host_cpu is not None and host_cpu > BUSY_HOST:
        found.append(f"this host was {host_cpu:.0%} busy beside the idle engine: times include that")
    if fit.spread > NOISY_SPREAD:
        found.append(f"repeats differ by {fit.spread:.0%} around their medians: the host or the engine was not alone")
    if rounds < planned_rounds:
        found.append(f"only {rounds} of {planned_rounds} rounds fitted into the time: give more --max-seconds")
    if foreign_requests:
        found.append(f"the engine finished {foreign_requests} requests of others meanwhile")
    if merged_answers:
        found.append(
            f"{merged_answers} answers had several tokens in one event: the API server, not the step, set the pace"
        )
    if cold_hits:
        found.append(
            f"{cold_hits} random prompts were found in the prefix cache: is this a proxy or a repeated --seed?"
        )
    for kind, title in _TITLES.items():
        error = fit.error(kind)
        if error is not None and error > POOR_FIT:
            found.append(f"{title.lower()}: the law misses the measurements by {error:.0%} on average")
    assumed = [field for field, source in limits.sources.items() if source == "assumed"]
    if assumed:
        found.append(f"assumed, as the engine does not tell: {', '.join(assumed)}; give them as flags")
    return found


def print_report(
    console: Console, profile: EngineProfile, fit: Fit, limits: Limits, warnings: Sequence[str], *, plot: bool
) -> None:
    """Everything, for people."""
    for kind, title in _TITLES.items():
        points = fit.of(kind)
        if points:
            console.print(_points_table(title, kind, points))
    if plot:
        width = min(100, console.width)
        console.print(ttft_plot(fit, width=width), markup=False, highlight=False)
        console.print(itl_plot(fit, width=width), markup=False, highlight=False)
    console.print(_constants_table(fit))
    console.print(_limits_table(profile, limits))
    for warning in warnings:
        console.print(f"WARNING: {warning}", markup=False, soft_wrap=True)


def _points_table(title: str, kind: str, points: Sequence[Point]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = {
        "ttft": ("prompt", "cached"),
        "itl": ("streams", "context"),
        "mixed": ("streams", "prompt"),
    }[kind]
    for name in (*columns, "measured ms", "profile ms", "error", "spread", "repeats"):
        table.add_column(name, justify="right")
    for point in points:
        keys = {
            "ttft": (point.prompt_tokens, point.cached_tokens),
            "itl": (point.sequences, round(point.context_tokens)),
            "mixed": (point.sequences, point.prompt_tokens),
        }[kind]
        table.add_row(
            *map(str, keys),
            f"{point.measured_s * 1e3:.2f}",
            f"{point.predicted_s * 1e3:.2f}",
            f"{point.error:+.1%}",
            f"{point.spread:.1%}",
            str(point.repeats),
        )
    return table


def _constants_table(fit: Fit) -> Table:
    values = constants(fit)
    table = Table(title="Constants", title_justify="left", box=None, pad_edge=False)
    for name in ("constant", "value", "5 % .. 95 %", "unit"):
        table.add_column(name, justify="left" if name in ("constant", "unit") else "right")
    for name in CONSTANTS:
        unit, factor = _UNITS[name]
        low_high = fit.intervals.get(name)
        interval = f"{low_high[0] * factor:.3g} .. {low_high[1] * factor:.3g}" if low_high else ""
        table.add_row(name, f"{values[name] * factor:.4g}", interval, unit)
    table.add_row(
        "request_overhead_busy_s", f"{fit.request_overhead_busy_s * 1e3:.4g}", "", "ms beside running streams"
    )
    table.add_row("step_jitter", f"{fit.step_jitter:.3g}", "", "standard deviation of log(time between tokens)")
    return table


def _limits_table(profile: EngineProfile, limits: Limits) -> Table:
    table = Table(title=f"Profile {profile.name}", title_justify="left", box=None, pad_edge=False)
    for name in ("what", "value", "from"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for field, source in limits.sources.items():
        table.add_row(field, f"{getattr(limits, field):,}", source)
    table.add_row("prefix caching", "on" if limits.prefix_caching else "off", "")
    table.add_row("prefill of 4,096 tokens", f"{profile.capacity_tokens_s():,.0f} tokens/s", "fit")
    return table


def constants(fit: Fit) -> dict[str, float]:
    """The fitted constants by name."""
    found = {name: float(getattr(fit.law, name)) for name in CONSTANTS if hasattr(fit.law, name)}
    found["request_overhead_s"] = fit.request_overhead_s
    found["request_overhead_per_token_s"] = fit.request_overhead_per_token_s
    return found


def ttft_plot(fit: Fit, *, width: int, height: int = 14) -> str:
    """Measured and fitted TTFT by prompt length, as text."""
    cold = [point for point in fit.of("ttft") if not point.cached_tokens]
    warm = [point for point in fit.of("ttft") if point.cached_tokens]
    series = {
        "cold, measured": ("o", [(p.prompt_tokens, p.measured_s) for p in cold]),
        "cold, profile": ("-", [(p.prompt_tokens, p.predicted_s) for p in cold]),
        "cached, measured": ("x", [(p.prompt_tokens, p.measured_s) for p in warm]),
        "cached, profile": (".", [(p.prompt_tokens, p.predicted_s) for p in warm]),
    }
    return _plot("TTFT in ms by prompt tokens", series, width, height)


def itl_plot(fit: Fit, *, width: int, height: int = 14) -> str:
    """Measured and fitted step time by number of streams at the shortest context, as text."""
    points = fit.of("itl")
    shortest = min((point.context_tokens for point in points), default=0.0)
    short = [point for point in points if point.context_tokens < 2 * shortest + 1]
    series = {
        "measured": ("o", [(p.sequences, p.measured_s) for p in short]),
        "profile": ("-", [(p.sequences, p.predicted_s) for p in short]),
    }
    return _plot("Decode step in ms by streams", series, width, height)


def _plot(title: str, series: Mapping[str, tuple[str, Sequence[tuple[int, float]]]], width: int, height: int) -> str:
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    for label, (symbol, values) in series.items():
        ordered = sorted(values)
        if not ordered:
            continue
        xs, ys = [x for x, _ in ordered], [y * 1e3 for _, y in ordered]
        signal = figure.signal(xs, ys, marker=plotext.marker(symbol))
        line = signal.lines() if symbol in "-." else signal
        figure.draw(line.label(label))
    figure.title(title)
    return str(figure.build().string(colorless=True))


def result(
    profile: EngineProfile, fit: Fit, limits: Limits, *, seconds: float, path: str, warnings: int
) -> dict[str, Any]:
    """What the RESULT line says; keys are documented in docs/results.md."""
    return {
        "profile": profile.name,
        "file": path,
        "fit_error_ttft": _short(fit.error("ttft")),
        "fit_error_itl": _short(fit.error("itl")),
        "fit_error_mixed": _short(fit.error("mixed")),
        "worst_error_ttft": _short(fit.worst("ttft")),
        "worst_error_itl": _short(fit.worst("itl")),
        "r2_ttft": _short(fit.r2("ttft")),
        "r2_itl": _short(fit.r2("itl")),
        "spread": _short(fit.spread),
        "kv_capacity_tokens": limits.kv_capacity_tokens,
        "block_size_tokens": limits.block_size_tokens,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_seqs": limits.max_num_seqs,
        "max_model_len_tokens": limits.max_model_len_tokens,
        "prefix_caching": limits.prefix_caching,
        "prefill_tokens_s": _short(profile.capacity_tokens_s()),
        "law": {name: _short(value) for name, value in constants(fit).items()},
        "request_overhead_busy_s": _short(fit.request_overhead_busy_s),
        "step_jitter": _short(fit.step_jitter),
        "seconds": _short(seconds),
        "warnings": warnings,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
