"""The one writer of the fleet state: collects events, reduces them in batches, publishes snapshots."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from controlplane.feed import SnapshotFeed
from controlplane.fleet.events import Event
from controlplane.fleet.reducer import reduce
from controlplane.fleet.snapshot import SnapshotBuilder, live
from controlplane.fleet.state import FleetState
from controlplane.fleet.values import FleetRules, Source
from twofold.model.fleet import FleetSnapshot, Target
from twofold.runtime.monitor import WindowMax

log = logging.getLogger(__name__)

TICK_S = 0.1
WARM_BOUND_S = 10.0
MAX_PENDING = 100_000


class Core:
    """Owns the state of one epoch.

    Routers get no snapshot before the fleet is warm, that is before every expected source has declared its workers and
    each was probed once, or a bound has passed: a control plane that just started must not tell routers, which serve on
    their last snapshot, that nothing is usable. Nothing is done while no event arrives.
    """

    def __init__(self, epoch: int, rules: FleetRules | None = None, *, warm_bound_s: float = WARM_BOUND_S) -> None:
        self.epoch = epoch
        self.state = FleetState(rules=rules or FleetRules())
        self.feed = SnapshotFeed()
        self.warm = False
        self.expected_sources: set[Source] = set()
        self.listeners: list[Callable[[FleetState], None]] = []
        self.batches = 0
        self.events = 0
        self._builder = SnapshotBuilder(epoch)
        self._pending: list[Event] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._warm_by_s = time.monotonic() + warm_bound_s
        self.dropped = 0
        """Events for which there was no room."""
        self.batch_max = WindowMax()
        self.reduce_s = 0.0
        self.reduce_max = WindowMax()

    @property
    def pending(self) -> int:
        """Events that wait for the next batch."""
        return len(self._pending)

    @property
    def snapshot(self) -> FleetSnapshot:
        """The snapshot of the present state, as routers see it."""
        return self._builder.snapshot

    def live_snapshot(self) -> FleetSnapshot:
        """The snapshot with the latest engine loads."""
        return live(self.state, self._builder.snapshot)

    def targets(self, worker_id: str) -> list[Target]:
        """Targets of a worker, with the latest engine loads."""
        return [target for target in self.live_snapshot().targets if target.worker_id == worker_id]

    def push(self, event: Event) -> None:
        """Queue an event for the next batch."""
        if len(self._pending) >= MAX_PENDING:
            self.dropped += 1
            return
        self._pending.append(event)
        self._wake.set()

    def start(self) -> None:
        """Begin to reduce."""
        self._task = asyncio.create_task(self._run(), name="core")

    async def stop(self) -> None:
        """Stop reducing."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def flush(self) -> None:
        """Reduce what is queued now, for callers that answer with the result."""
        batch, self._pending = self._pending, []
        if batch:
            begun_s = time.monotonic()
            self.batches += 1
            self.events += len(batch)
            self.state = reduce(self.state, batch)
            self._builder.build(self.state)
            now_s = time.monotonic()
            self.reduce_s += now_s - begun_s
            self.reduce_max.add(now_s - begun_s, now_s)
            self.batch_max.add(len(batch), now_s)
            for listener in self.listeners:
                listener(self.state)
        self._publish(time.monotonic())

    def _publish(self, now_s: float) -> None:
        if not self.warm:
            declared = self.expected_sources <= self.state.sources.keys()
            probed = declared and all(record.probe_sequence for record in self.state.workers.values())
            self.warm = now_s >= self._warm_by_s or (self.state.config_version > 0 and probed)
            if self.warm:
                log.info("fleet is known", extra={"workers": len(self.state.workers), "epoch": self.epoch})
        if self.warm and self._builder.snapshot.version > 0:
            self.feed.publish(self._builder.snapshot)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._idle_s()):
                    await self._wake.wait()
            self._wake.clear()
            try:
                self.flush()
            except Exception:
                # One event that breaks the reducer must not end the control plane; the batch it came with is lost.
                log.exception("a batch of events could not be reduced")
            await asyncio.sleep(TICK_S)

    def _idle_s(self) -> float | None:
        return None if self.warm else max(0.0, self._warm_by_s - time.monotonic())
