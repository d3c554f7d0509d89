"""One workload under several routing policies: outcomes side by side."""

import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from twofold.replay.measures import Record
from twofold.replay.report import RunReport, percent, rounded, seconds, ttft_over_time

MAX_HOST_CPU = 0.6
PLOT_SLICES = 30
MAX_LATENESS_RATIO = 0.2
"""An engine whose p99 step lateness is above this share of a step no longer shows the fleet, but the host."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's run. Ratios are 0..1; ``engine_lateness_ratio`` is the worst engine's p99, None where unknown."""

    policy: str
    report: RunReport
    records: list[Record]
    host_cpu: float
    own_cpu: float
    """Share of the host's CPU time that demo and fleet used themselves."""
    engine_lateness_ratio: float | None = None
    wall_s: float = 0.0
    """Seconds for everything: start of the fleet, run, stop."""

    @property
    def lateness_ok(self) -> bool:
        """Whether generator and engines kept their time."""
        return self.report.lateness_ok


class CpuMeter:
    """Shares of the host's CPU time in use since the meter was made: by everybody, and by this process's family."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()
        self._own_before = _family_cpu_s()

    def own(self) -> float:
        """0..1; this process and all its descendants that still run."""
        total = sum(psutil.cpu_times()) - sum(self._before)
        return max(0.0, _family_cpu_s() - self._own_before) / total if total > 0 else 0.0

    def busy(self) -> float:
        """0..1; time spent waiting for disks is idle.

        Never less than ``own``: a kernel that samples the host's time by ticks overlooks short bursts.
        """
        now, before = psutil.cpu_times(), self._before
        total = sum(now) - sum(before)
        idle = (now.idle - before.idle) + (getattr(now, "iowait", 0.0) - getattr(before, "iowait", 0.0))
        return max(1.0 - idle / total, self.own()) if total > 0 else 0.0


def _family_cpu_s() -> float:
    own = psutil.Process()
    seconds_used = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds_used += times.user + times.system
    return seconds_used


def worst_lateness(stats: Sequence[dict[str, Any]]) -> float | None:
    """The greatest p99 of step lateness over step time among emulator processes' ``/stats``; None when nobody says."""
    ratios = [
        float(engine["lateness_ratio"]["p99"])
        for process in stats
        for engine in process.get("engines", ())
        if isinstance(engine, dict) and isinstance(engine.get("lateness_ratio"), dict)
    ]
    return max(ratios, default=None)


def comparison_result(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The value of the RESULT line of ``twofold demo``; keys are documented in docs/results.md."""
    figures = [outcome.report.figures for outcome in outcomes]
    return {
        "requests": sum(one.requests for one in figures),
        "errors": sum(one.errors for one in figures),
        "chain_violations": sum(one.chain_violations for one in figures),
        "tokens_delivered": sum(one.tokens_delivered for one in figures),
        "tokens_verified": sum(one.tokens_verified for one in figures),
        "lateness_ok": all(outcome.lateness_ok for outcome in outcomes),
        "policies": {outcome.policy: _policy_result(outcome) for outcome in outcomes},
    }


def _policy_result(outcome: Outcome) -> dict[str, Any]:
    figures, report = outcome.report.figures, outcome.report
    values = {
        "ttft_p50_s": figures.ttft_p50_s,
        "ttft_p99_s": figures.ttft_p99_s,
        "itl_p50_s": figures.itl_p50_s,
        "attainment": figures.attainment,
        "hit_ratio": report.hit_ratio,
        "hit_ratio_ideal": report.ideal.hit_ratio,
        "goodput_rps": figures.goodput_rps,
        "duration_s": figures.duration_s,
        "host_cpu": outcome.host_cpu,
        "own_cpu": outcome.own_cpu,
        "engine_lateness_p99_ratio": outcome.engine_lateness_ratio,
        "generator_lateness_p99_s": figures.lateness_p99_s,
    }
    return {name: rounded(value) for name, value in values.items()}


def print_comparison(console: Console, outcomes: Sequence[Outcome]) -> None:
    """One row per policy."""
    table = Table(box=None, pad_edge=False)
    table.add_column("policy")
    for column in ("TTFT p50", "p90", "p99", "ITL p50", "attainment", "hit ratio", "ideal", "errors", "host CPU"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        figures, report = outcome.report.figures, outcome.report
        table.add_row(
            outcome.policy,
            seconds(figures.ttft_p50_s),
            seconds(figures.ttft_p90_s),
            seconds(figures.ttft_p99_s),
            seconds(figures.itl_p50_s),
            percent(figures.attainment),
            percent(report.hit_ratio),
            percent(report.ideal.hit_ratio),
            str(figures.errors),
            percent(outcome.host_cpu),
        )
    console.print(table)
    for warning in comparison_warnings(outcomes):
        console.print(warning, style="bold red", soft_wrap=True, markup=False)


def comparison_warnings(outcomes: Sequence[Outcome]) -> list[str]:
    """Why the figures may not mean what they seem to; empty when they do."""
    warnings = []
    for outcome in outcomes:
        figures, report, name = outcome.report.figures, outcome.report, outcome.policy
        if figures.lateness_p99_s > report.lateness_limit_s:
            warnings.append(f"INVALID: {name}: requests were sent late (p99 {seconds(figures.lateness_p99_s)})")
        if outcome.engine_lateness_ratio is not None and outcome.engine_lateness_ratio > MAX_LATENESS_RATIO:
            warnings.append(
                f"INVALID: {name}: engine steps were late (p99 {percent(outcome.engine_lateness_ratio)} of a step)"
            )
        if outcome.host_cpu > MAX_HOST_CPU:
            warnings.append(
                f"WARNING: {name}: the host was busy ({percent(outcome.host_cpu)}, of it "
                f"{percent(outcome.own_cpu)} the demo): latencies include that"
            )
        if report.first_error:
            warnings.append(f"WARNING: {name}: first error: {report.first_error}")
        if report.first_violation:
            warnings.append(f"WARNING: {name}: first wrong token: {report.first_violation}")
        warnings += [f"NOTE: {name}: {note}" for note in report.notes]
    return warnings


def ttft_plot(outcomes: Sequence[Outcome], *, width: int, height: int = 16, colour: bool = True) -> str:
    """TTFT over time as text for a terminal, a line per policy (90th percentile of each slice of the run)."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    for outcome, symbol, tint in zip(outcomes, "*o+", ("green", "red", "blue"), strict=False):
        times, values = ttft_over_time(outcome.records, 0.9, buckets=PLOT_SLICES)
        if times:
            line = figure.signal(times, values, marker=plotext.marker(symbol, tint)).lines().label(outcome.policy)
            figure.draw(line)
    figure.title("TTFT p90 in seconds")
    figure.label("seconds into the run", axis="x")
    return str(figure.build().string(colorless=not colour))
