"""Saying what happened: a table, JSON, a plot, and the RESULT line."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from twofold.model.fleet import Slo
from twofold.replay.cache import CacheFigures
from twofold.replay.faults import Verdict
from twofold.replay.measures import Figures, Record, quantile
from twofold.replay.runner import LoadGenerator

PLOT_BUCKETS = 60


class ReportError(Exception):
    """A report that cannot be written; one line."""


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about one run."""

    workload: str
    seed: int
    figures: Figures
    slo: Slo
    lateness_ok: bool
    """The generator kept to its schedule, and so did the engines where they say."""
    lateness_limit_s: float
    hit_ratio: float | None
    hit_ratio_source: str
    """ "usage" (of the answers), "engines" (their counters) or "" when nobody says."""
    ideal: CacheFigures
    ceiling: CacheFigures | None
    kv_capacity_tokens: int
    steps_skipped: int
    prompts_cut: int
    interrupted: bool
    planted_faults: int = 0
    caught: int = 0
    first_error: str = ""
    first_violation: str = ""
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the latencies mean anything: the run was not late and was not cut short."""
        return self.lateness_ok and not self.interrupted

    @property
    def clean(self) -> bool:
        """No error, no wrong token, and every planted fault was caught."""
        return not self.figures.errors and not self.figures.chain_violations and self.caught == self.planted_faults

    def result(self) -> dict[str, Any]:
        """The value of the RESULT line; keys are documented in docs/results.md."""
        return {
            "workload": self.workload,
            "seed": self.seed,
            **{
                name: rounded(value) for name, value in msgspec.to_builtins(self.figures).items() if name != "hit_ratio"
            },
            "lateness_ok": self.lateness_ok,
            "valid": self.valid,
            "interrupted": self.interrupted,
            "steps_skipped": self.steps_skipped,
            "prompts_cut": self.prompts_cut,
            "hit_ratio": rounded(self.hit_ratio),
            "hit_ratio_source": self.hit_ratio_source,
            "hit_ratio_ideal": rounded(self.ideal.hit_ratio),
            "hit_ratio_ceiling": rounded(self.ceiling.hit_ratio if self.ceiling else None),
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "planted_faults": self.planted_faults,
            "caught": self.caught,
        }


def result_line(value: Mapping[str, Any]) -> str:
    """``RESULT {json}`` on one line."""
    return "RESULT " + msgspec.json.encode(value).decode()


def rounded(value: Any) -> Any:
    """Floats to six significant digits, so that lines stay readable; everything else unchanged."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def build_report(
    generator: LoadGenerator,
    figures: Figures,
    *,
    workload: str,
    seed: int,
    slo: Slo,
    lateness_limit_s: float,
    kv_capacity_tokens: int = 0,
    engine_hit_ratio: float | None = None,
    engines_on_time: bool = True,
    verdict: Verdict,
    notes: Sequence[str] = (),
) -> RunReport:
    """Put the report of a finished run together. Computes the ideal hit ratio, which may take seconds."""
    from_usage = figures.hit_ratio is not None
    violations = [record for record in verdict.others(generator.records) if record.violation]
    return RunReport(
        workload=workload,
        seed=seed,
        figures=figures,
        slo=slo,
        lateness_ok=engines_on_time and figures.lateness_p99_s <= lateness_limit_s,
        lateness_limit_s=lateness_limit_s,
        hit_ratio=figures.hit_ratio if from_usage else engine_hit_ratio,
        hit_ratio_source="usage" if from_usage else "engines" if engine_hit_ratio is not None else "",
        ideal=generator.cache.endless(),
        ceiling=generator.cache.lru(kv_capacity_tokens) if kv_capacity_tokens else None,
        kv_capacity_tokens=kv_capacity_tokens,
        steps_skipped=generator.skipped_steps,
        prompts_cut=generator.prompts_cut,
        interrupted=generator.interrupted,
        planted_faults=verdict.planted,
        caught=verdict.caught,
        first_error=generator.first_error,
        first_violation=f"{violations[0].request_id}: {violations[0].violation}" if violations else "",
        notes=(*notes, *verdict.notes),
    )


def seconds(value: float | None) -> str:
    """A duration for people: three digits, ms below a second."""
    if value is None:
        return "-"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def percent(value: float | None) -> str:
    """A ratio for people."""
    return "-" if value is None else f"{value:.1%}"


def print_report(console: Console, report: RunReport) -> None:
    """The table of one run."""
    figures = report.figures
    console.print(f"replay of {report.workload}", style="bold", soft_wrap=True, markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("", "p50", "p90", "p99"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("TTFT", *map(seconds, (figures.ttft_p50_s, figures.ttft_p90_s, figures.ttft_p99_s)))
    table.add_row("ITL", *map(seconds, (figures.itl_p50_s, figures.itl_p90_s, figures.itl_p99_s)))
    table.add_row("TPOT", seconds(figures.tpot_p50_s), "", seconds(figures.tpot_p99_s))
    table.add_row("E2E", *map(seconds, (figures.e2e_p50_s, figures.e2e_p90_s, figures.e2e_p99_s)))
    console.print(table)
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(report):
        facts.add_row(name, value)
    console.print(facts)
    for note in (*report.notes, *_warnings(report)):
        console.print(note, style="bold red" if note.startswith("INVALID") else "yellow", soft_wrap=True, markup=False)


def _facts(report: RunReport) -> list[tuple[str, str]]:
    figures = report.figures
    errors = ", ".join(f"{kind} x{count}" for kind, count in figures.errors_by_kind.items())
    rows = [
        ("requests", f"{figures.requests} ({figures.completed} complete) in {seconds(figures.duration_s)}"),
        ("errors", f"{figures.errors}" + (f" ({errors})" if errors else "")),
        ("throughput", f"{figures.requests_per_s:.2f} requests/s, {figures.output_tokens_per_s:.0f} output tokens/s"),
        (
            "attainment",
            f"{percent(figures.attainment)} within TTFT {report.slo.ttft_s:g} s and TPOT {report.slo.tpot_s:g} s; "
            f"goodput {figures.goodput_rps:.2f} requests/s",
        ),
        ("hit ratio", _hit_text(report)),
        (
            "tokens",
            f"{figures.tokens_delivered} delivered, {figures.tokens_verified} verified, "
            f"{figures.chain_violations} chain violations",
        ),
        ("lateness", f"p99 {seconds(figures.lateness_p99_s)} (limit {seconds(report.lateness_limit_s)})"),
    ]
    if report.planted_faults:
        rows.append(("planted faults", f"{report.planted_faults}, caught {report.caught}"))
    return rows


def _hit_text(report: RunReport) -> str:
    text = f"{percent(report.hit_ratio)}; ideal {percent(report.ideal.hit_ratio)}"
    if report.ceiling is not None:
        text += f"; one cache of {report.kv_capacity_tokens} tokens {percent(report.ceiling.hit_ratio)}"
    return text + ("" if report.ideal.complete else " (ideal: beginning of the run only)")


def _warnings(report: RunReport) -> list[str]:
    warnings = []
    if not report.lateness_ok:
        warnings.append(
            "INVALID: requests or engine steps were late; latencies are those of a busy host, not of the fleet"
        )
    if report.interrupted:
        warnings.append("interrupted: these are the figures up to the interruption")
    if report.steps_skipped:
        warnings.append(f"{report.steps_skipped} steps were not sent, because an earlier step of their session failed")
    if report.prompts_cut:
        warnings.append(f"{report.prompts_cut} prompts were cut to the bound given")
    if report.first_error:
        warnings.append(f"first error: {report.first_error}")
    if report.first_violation:
        warnings.append(f"first violation: {report.first_violation}")
    return warnings


def ttft_over_time(records: Sequence[Record], q: float, buckets: int = PLOT_BUCKETS) -> tuple[list[float], list[float]]:
    """Quantile ``q`` of TTFT in equal slices of the run, by the time requests were due: (seconds, TTFT seconds)."""
    good = [record for record in records if record.ok and record.output_tokens]
    if not good:
        return [], []
    span_s = max(record.due_s for record in good) or 1.0
    slices: list[list[float]] = [[] for _ in range(buckets)]
    for record in good:
        slices[min(buckets - 1, int(record.due_s / span_s * buckets))].append(record.ttft_s)
    times, values = [], []
    for index, values_s in enumerate(slices):
        value = quantile(values_s, q)
        if value is not None:
            times.append((index + 0.5) * span_s / buckets)
            values.append(value)
    return times, values


def write_json(target: str, report: RunReport, records: Sequence[Record]) -> None:
    """The whole report to a file or, with "-", to standard output. Raises ReportError."""
    p50, p99 = ttft_over_time(records, 0.5), ttft_over_time(records, 0.99)
    document = {
        **report.result(),
        "slo": msgspec.to_builtins(report.slo),
        "first_error": report.first_error,
        "first_violation": report.first_violation,
        "notes": report.notes,
        "ttft_over_time": {"p50": {"t_s": p50[0], "ttft_s": p50[1]}, "p99": {"t_s": p99[0], "ttft_s": p99[1]}},
        "workers": _by_worker(records),
    }
    data = msgspec.json.format(msgspec.json.encode(document), indent=2)
    if target == "-":
        sys.stdout.write(data.decode() + "\n")
        return
    try:
        Path(target).write_bytes(data + b"\n")
    except OSError as error:
        raise ReportError(f"cannot write {target}: {error.strerror}") from None


def _by_worker(records: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        if record.target:
            counts[record.target] = counts.get(record.target, 0) + 1
    return dict(sorted(counts.items()))


def require_matplotlib() -> Callable[..., Any]:
    """pyplot's ``subplots`` on a backend without a display. Raises ReportError when matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ReportError("--plot needs matplotlib: pip install 'twofold[plot]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    subplots: Callable[..., Any] = pyplot.subplots
    return subplots


def write_plot(target: str, runs: Mapping[str, Sequence[Record]]) -> None:
    """TTFT over time and its distribution, a line per run, as a picture. Raises ReportError."""
    figure, (over_time, spread) = require_matplotlib()(1, 2, figsize=(12, 4.5))
    for name, records in runs.items():
        times, values = ttft_over_time(records, 0.9)
        over_time.plot(times, values, label=name)
        ordered = sorted(record.ttft_s for record in records if record.ok and record.output_tokens)
        spread.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=name)
    over_time.set(xlabel="seconds into the run", ylabel="TTFT p90 (s)")
    spread.set(xlabel="TTFT (s)", ylabel="share of requests", xscale="log")
    for axes in (over_time, spread):
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    try:
        figure.savefig(target, dpi=120, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write {target}: {error}") from None
