"""Planting one wrong token in a run, to see that the checker catches exactly that one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from twofold.replay.engines import EngineError, clear_faults, engine_stats, plant_fault
from twofold.replay.measures import Record
from twofold.replay.runner import LoadGenerator

POLL_S = 0.05


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the planted fault."""

    planted: int = 0
    caught: int = 0
    request_id: str = ""
    """The request that got the wrong token and was caught by the checker."""
    notes: tuple[str, ...] = ()

    def others(self, records: Sequence[Record]) -> list[Record]:
        """The records of the requests that the planted fault did not touch."""
        return [record for record in records if not self.caught or record.request_id != self.request_id]


class Plant:
    """Plants one ``corrupt_token`` fault after ``after`` requests were sent, at the busiest engine behind the given
    fault admin ports of emulator processes.

    The engine gives one wrong token, to one request, once. If the engine says that it did and the checker found a wrong
    token afterwards, that is the one; any further one is a violation like any other.
    """

    def __init__(self, admin_urls: Sequence[str], after: int) -> None:
        self._admin_urls = tuple(admin_urls)
        self._after = after
        self._admin_url = ""
        self._engine = 0
        self._planted_s: float | None = None
        self._failure = ""

    @contextlib.asynccontextmanager
    async def planted(self, generator: LoadGenerator) -> AsyncIterator[None]:
        """Plant while the context is open."""
        task = asyncio.create_task(self._plant(generator))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def verdict(self, records: Sequence[Record]) -> Verdict:
        """Compare what the checker found with what the engine says it did. Removes the fault where it was not used."""
        if self._planted_s is None:
            return Verdict(notes=(f"no fault was planted: {self._failure or 'the run was too short'}",))
        try:
            used = not pending_token_faults(await engine_stats(self._admin_url), self._engine)
            if not used:
                await clear_faults(self._admin_url)
        except EngineError as error:
            return Verdict(planted=1, notes=(f"cannot ask whether the planted fault was used: {error}",))
        if not used:
            return Verdict(notes=("the planted fault was taken back: its engine gave no token after it",))
        wrong = [record for record in records if record.violation and record.end_s >= self._planted_s]
        if not wrong:
            return Verdict(planted=1, notes=("the engine gave a wrong token and the checker did not see it",))
        first = min(wrong, key=lambda record: record.end_s)
        return Verdict(planted=1, caught=1, request_id=first.request_id)

    async def _plant(self, generator: LoadGenerator) -> None:
        while generator.begun < self._after:
            await asyncio.sleep(POLL_S)
        try:
            while not await self._choose():
                await asyncio.sleep(POLL_S)
            await plant_fault(self._admin_url, {"engine": self._engine, "kind": "corrupt_token", "count": 1})
            self._planted_s = generator.elapsed_s
        except EngineError as error:
            self._failure = str(error)

    async def _choose(self) -> bool:
        """Find the engine that runs most requests. False while none runs any."""
        stats = await asyncio.gather(*map(engine_stats, self._admin_urls))
        most = 0
        for url, process in zip(self._admin_urls, stats, strict=True):
            for index, engine in enumerate(process.get("engines", ())):
                if engine["running"] > most:
                    most, self._admin_url, self._engine = engine["running"], url, index
        return most > 0


def pending_token_faults(stats: dict[str, Any], engine: int) -> list[str]:
    """Token faults of an engine that no token has met yet, from its process's ``/stats``."""
    engines = stats.get("engines")
    if not isinstance(engines, list) or engine >= len(engines):
        raise EngineError(f"the statistics do not know engine {engine}")
    pending = engines[engine].get("faults", {}).get("tokens", [])
    return list(pending)
