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
        return (
            [record for record in records if record.request_id != self.request_id] if self.request_id else list(records)
        )


class Plant:
    """Plants one ``corrupt_token`` fault at an emulator's fault admin port after ``after`` requests were sent."""

    def __init__(self, admin_url: str, after: int, engine: int = 0) -> None:
        self._admin_url = admin_url
        self._after = after
        self._engine = engine
        self._planted = 0
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
        if not self._planted:
            return Verdict(notes=(f"no fault was planted: {self._failure or 'the run was too short'}",))
        wrong = [record.request_id for record in records if record.violation]
        hit = await self._hit_request()
        with contextlib.suppress(EngineError):
            await clear_faults(self._admin_url)
        caught = hit if hit in wrong else ""
        if caught:
            return Verdict(planted=1, caught=1, request_id=caught)
        note = f"the engine gave {hit} a wrong token, unseen by the checker" if hit else "the fault was never used"
        return Verdict(planted=1, notes=(note,))

    async def _plant(self, generator: LoadGenerator) -> None:
        while generator.begun < self._after:
            await asyncio.sleep(POLL_S)
        try:
            await plant_fault(self._admin_url, {"engine": self._engine, "kind": "corrupt_token", "count": 1})
            self._planted = 1
        except EngineError as error:
            self._failure = str(error)

    async def _hit_request(self) -> str:
        try:
            return last_corrupted(await engine_stats(self._admin_url), self._engine)
        except EngineError:
            return ""


def last_corrupted(stats: dict[str, Any], engine: int) -> str:
    """Id of the request that an engine last gave a wrong token, from its ``/stats``; "" when none."""
    engines = stats.get("engines")
    entry = engines[engine] if isinstance(engines, list) and engine < len(engines) else stats
    value = entry.get("last_corrupted_request_id") if isinstance(entry, dict) else None
    return value if isinstance(value, str) else ""
