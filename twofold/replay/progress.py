"""How far a run is: a bar on a terminal, a line every few seconds elsewhere."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from twofold.replay.runner import LoadGenerator

BAR_REFRESH_S = 0.5
LINE_REFRESH_S = 10.0


@contextlib.asynccontextmanager
async def shown(console: Console, generator: LoadGenerator, *, title: str, total: int | None) -> AsyncIterator[None]:
    """Show the progress of ``generator`` while the context is open; ``total`` requests, None when unknown."""
    show = _bar if console.is_terminal else _lines
    task = asyncio.create_task(show(console, generator, title, total))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def status_text(generator: LoadGenerator) -> str:
    """Counts of the moment."""
    return f"sent {generator.begun}, in flight {generator.inflight}, errors {generator.errors}"


async def _bar(console: Console, generator: LoadGenerator, title: str, total: int | None) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task(title, total=total, status="")
        while True:
            completed = generator.begun - generator.inflight
            progress.update(bar, completed=completed, status=status_text(generator), refresh=True)
            await asyncio.sleep(BAR_REFRESH_S)


async def _lines(console: Console, generator: LoadGenerator, title: str, total: int | None) -> None:
    of = f" of {total}" if total else ""
    while True:
        await asyncio.sleep(LINE_REFRESH_S)
        console.print(f"{title}: {generator.elapsed_s:.0f} s, {status_text(generator)}{of}", soft_wrap=True)
