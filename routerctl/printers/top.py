"""Live load of routers and targets."""

import math

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from routerctl.printers.fleet import status
from routerctl.printers.text import Column, Table, duration, number, printable, rate, render, share
from twofold.v1 import admin_pb2


def routers(answer: admin_pb2.TopResponse) -> Table:
    """Rates and latencies of each router replica."""
    columns = (
        Column("ROUTER"),
        Column("INFLIGHT", number=True),
        Column("REQ/S", number=True),
        Column("OUT TOK/S", number=True),
        Column("TTFT P50", number=True),
        Column("TTFT P99", number=True),
        Column("HITS", number=True),
        Column("ERRORS", number=True),
    )
    rows = (
        (
            entry.replica_id,
            number(entry.top.inflight),
            rate(entry.top.requests_per_s),
            rate(entry.top.output_tokens_per_s),
            duration(entry.top.ttft_p50_s),
            duration(entry.top.ttft_p99_s),
            share(entry.top.hit_ratio),
            share(entry.top.error_ratio),
        )
        for entry in answer.routers
    )
    return Table(columns=columns, rows=tuple(rows), empty="no router answered")


def targets(answer: admin_pb2.TopResponse) -> Table:
    """Load of each target summed over routers, the busiest first."""
    totals: dict[str, list[float]] = {}
    for load in answer.loads:
        total = totals.setdefault(load.target_id, [0.0, 0.0, 0.0, 0.0])
        parts = (load.queued_prefill_s, load.inflight, load.decodes, load.queued_prefill_tokens)
        for index, part in enumerate(parts):
            total[index] += part if math.isfinite(part) else 0.0
    none = [0.0, 0.0, 0.0, 0.0]
    ordered = sorted(answer.targets, key=lambda t: ([-part for part in totals.get(t.target_id, none)], t.target_id))
    columns = (
        Column("TARGET"),
        Column("POOL"),
        Column("STATUS"),
        Column("INFLIGHT", number=True),
        Column("DECODES", number=True),
        Column("QUEUED TOKENS", number=True),
        Column("QUEUED", number=True),
        Column("RUNNING", number=True),
        Column("WAITING", number=True),
        Column("KV", number=True),
        Column("PROFILE", wide=True),
    )
    rows = []
    for target in ordered:
        queued_s, inflight, decodes, queued_tokens = totals.get(target.target_id, none)
        engine = target.load if target.load.observed_s > 0 else None
        rows.append(
            (
                target.target_id,
                target.pool,
                status(target),
                number(inflight),
                number(decodes),
                number(queued_tokens),
                duration(queued_s),
                number(engine.running) if engine else "",
                number(engine.waiting) if engine else "",
                share(engine.kv_usage) if engine else "",
                target.profile,
            )
        )
    return Table(columns=columns, rows=tuple(rows), empty="no workers")


def text(answer: admin_pb2.TopResponse, *, wide: bool) -> str:
    """Both tables as plain text."""
    return render(routers(answer), wide=wide) + "\n" + render(targets(answer), wide=wide)


def screen(answer: admin_pb2.TopResponse, title: str, trouble: str, *, wide: bool) -> Group:
    """Both tables for a terminal, below a line of title and, when there is one, a line of trouble."""
    parts: list[Text | RichTable] = [Text(printable(title), style="bold", no_wrap=True)]
    if trouble:
        parts.append(Text(printable(trouble), style="bold red", no_wrap=True))
    for table in (routers(answer), targets(answer)):
        parts += [Text(""), _rich(table.narrowed(wide=wide))]
    return Group(*parts)


def _rich(table: Table) -> RichTable | Text:
    if not table.rows:
        return Text(table.empty, style="dim")
    shown = RichTable(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in table.columns:
        shown.add_column(column.title, justify="right" if column.number else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*(Text(printable(cell) or "-") for cell in row))
    return shown
