"""From fleet snapshots to routing tables on the board: slots, rings, and what is not worth publishing."""

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from router.agent.load import SlotMap
from router.agent.slots import SlotTable
from router.agent.store import SnapshotStore
from router.routing import table as tables
from router.routing.accounts import AccountsReader
from router.routing.ring_build import build_table
from router.routing.table import RoutingTable
from router.shm.board import SnapshotBoard
from router.shm.files import SharedMemoryError
from twofold.model.fleet import EngineLoad, FleetSnapshot, Health, Target

log = logging.getLogger(__name__)

RETRY_S = 0.5
_NO_LOAD = EngineLoad()


def is_routing_equal(old: FleetSnapshot, new: FleetSnapshot) -> bool:
    """Whether two snapshots of one epoch lead to the same decisions: equal but for version and engine loads."""
    if old.epoch != new.epoch or len(old.targets) != len(new.targets):
        return False
    if old.pools != new.pools or old.profiles != new.profiles or old.policy != new.policy:
        return False
    return all(a is b or _bare(a) == _bare(b) for a, b in zip(old.targets, new.targets, strict=True))


def _bare(target: Target) -> Target:
    return target if target.load == _NO_LOAD else msgspec.structs.replace(target, load=_NO_LOAD)


class EpochGuard:
    """Keeps a control plane that has just started from emptying the fleet before it has looked.

    A new epoch begins without any probe. Until every target that took work is there again and probed, but at most for
    ``settle_s`` seconds, the snapshot in force stays: routers find dead workers by themselves. Pure.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._epoch = 0
        self._since_s = 0.0

    def admits(self, current: FleetSnapshot | None, new: FleetSnapshot, now_s: float) -> bool:
        """Whether ``new`` may replace ``current`` now."""
        if current is None or new.epoch == current.epoch:
            return True
        if new.epoch != self._epoch:
            self._epoch, self._since_s = new.epoch, now_s
        if now_s - self._since_s >= self._settle_s:
            return True
        health = {target.target_id: target.health for target in new.targets}
        return all(
            health.get(target.target_id, Health.STARTING) is not Health.STARTING
            for target in current.targets
            if target.takes_work
        )


class Publisher:
    """Publishes the newest snapshot offered; builds in a thread, one at a time, and skips those that came in between.

    ``on_published(slot_map, fresh_slots)`` is called on the event loop after each publication; ``fresh_slots`` did not
    belong to the same target before.
    """

    def __init__(
        self,
        board: SnapshotBoard,
        slots: SlotTable,
        accounts: AccountsReader,
        store: SnapshotStore | None,
        *,
        settle_s: float,
        on_published: Callable[[SlotMap, frozenset[int]], None],
        ledger: memoryview,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._board = board
        self._slots = slots
        self._accounts = accounts
        self._store = store
        self._guard = EpochGuard(settle_s)
        self._on_published = on_published
        self._ledger = ledger.cast("Q")
        self._monotonic = monotonic
        self._wall = wall
        self._offered: FleetSnapshot | None = None
        self._wake = asyncio.Event()
        self._built: tuple[RoutingTable, bytes] | None = None
        self._source: FleetSnapshot | None = None
        self.without_slot: tuple[str, ...] = ()
        """Targets of the last snapshot for which no slot was free."""
        self.published = 0
        self.build_s = 0.0
        """Seconds that the last build took."""

    @property
    def table(self) -> RoutingTable | None:
        """The table in force."""
        return self._built[0] if self._built is not None else None

    @property
    def slot_counts(self) -> tuple[int, int, int]:
        """Slots in use, resting after use, never used."""
        return self._slots.counts

    def adopt(self, table: RoutingTable, rings: bytes) -> None:
        """Go on with what an earlier agent published."""
        self._built = (table, rings)
        self._source = table.snapshot
        self._on_published(SlotMap.of(table.snapshot, table.slots), frozenset())

    def offer(self, snapshot: FleetSnapshot) -> None:
        """The fleet as it is now. Cheap when nothing changed that routing goes by."""
        self._offered = snapshot
        self._wake.set()

    async def run(self) -> None:
        """Publish what is offered, for ever."""
        retry = False
        while True:
            try:
                async with asyncio.timeout(RETRY_S if retry else None):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            snapshot = self._offered
            if snapshot is None or not (retry or self.without_slot or self._is_news(snapshot)):
                continue
            if not self._guard.admits(self._source, snapshot, self._monotonic()):
                retry = True
                continue
            try:
                await self._publish(snapshot)
                retry = bool(self.without_slot)
            except (SharedMemoryError, ValueError) as error:
                log.error("snapshot cannot be published", extra={"version": snapshot.version, "reason": str(error)})
                retry = True

    def _is_news(self, snapshot: FleetSnapshot) -> bool:
        return self._source is None or not is_routing_equal(self._source, snapshot)

    async def _publish(self, snapshot: FleetSnapshot) -> None:
        before = {slot: target for target, slot in self._slots.assigned.items()}
        missing = self._slots.update(
            (target.target_id for target in snapshot.targets), self._monotonic(), self._is_busy
        )
        if tuple(missing) == self.without_slot and not self._is_news(snapshot):
            return
        if missing and tuple(missing) != self.without_slot:
            log.error("no slot is free for some targets", extra={"targets": len(missing), "first": missing[0]})
        self.without_slot = tuple(missing)
        self._ledger[0] = self._slots.high_water
        slots = dict(self._slots.assigned)
        placed = snapshot
        if missing:
            placed = msgspec.structs.replace(
                snapshot, targets=tuple(target for target in snapshot.targets if target.target_id in slots)
            )
        started_s = self._monotonic()
        built, encoded = await asyncio.to_thread(_build, placed, slots, self._built)
        self.build_s = self._monotonic() - started_s
        version = self._board.publish(encoded, built[1])
        self._built, self._source = built, snapshot
        self.published += 1
        fresh = frozenset(slot for target, slot in slots.items() if before.get(slot) != target)
        self._on_published(SlotMap.of(placed, slots), fresh)
        extra = {"board_version": version, "epoch": snapshot.epoch, "version": snapshot.version}
        log.info("routing table published", extra={**extra, "targets": len(slots), "build_s": round(self.build_s, 4)})
        await self._save(snapshot)

    def _is_busy(self, slot: int) -> bool:
        return self._accounts.load(slot).inflight > 0

    async def _save(self, snapshot: FleetSnapshot) -> None:
        if self._store is None:
            return
        try:
            await asyncio.to_thread(self._store.save, snapshot, self._wall())
        except OSError as error:
            log.warning("snapshot cannot be saved", extra={"path": str(self._store.path), "reason": str(error)})


def _build(
    snapshot: FleetSnapshot, slots: dict[str, int], previous: tuple[RoutingTable, bytes] | None
) -> tuple[tuple[RoutingTable, bytes], bytes]:
    built = build_table(snapshot, slots, previous)
    return built, tables.encode(built[0])
