"""What is news to routing, and how a control plane that just started is treated."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from router.agent.load import SlotMap
from router.agent.publisher import EpochGuard, Publisher, is_routing_equal
from router.agent.slots import SlotTable
from router.agent.store import SnapshotStore
from router.routing import table as tables
from router.routing.accounts import AccountsReader, AccountsWriter
from router.routing.buffers import in_memory
from router.routing.dirty_log import DirtyLog
from router.shm.board import SnapshotBoard
from twofold.model.fleet import EngineLoad, FleetSnapshot, Health, Pool, RoutingPolicy, Target


def target(name: str, **changes: object) -> Target:
    values = {
        "target_id": name,
        "worker_id": name,
        "pool": "p",
        "url": "http://127.0.0.1:1",
        "profile": "x",
        "ordinal": 0,
        "weight_tokens_s": 1.0,
        "health": Health.HEALTHY,
    }
    return msgspec.convert({**values, **changes}, Target)


def fleet(*targets: Target, epoch: int = 1, version: int = 1) -> FleetSnapshot:
    return FleetSnapshot(epoch=epoch, version=version, pools=(Pool(name="p", models=("m",)),), targets=targets)


BASE = fleet(target("a"), target("b"))


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (fleet(target("a"), target("b"), version=9), True),
        (fleet(target("a", load=EngineLoad(running=3)), target("b")), True),
        (fleet(target("a", load=EngineLoad(running=3)), target("b", load=EngineLoad(running=9)), version=4), True),
        (fleet(target("a"), target("b"), epoch=2), False),
        (fleet(target("a")), False),
        (fleet(target("a"), target("c")), False),
        (fleet(target("a"), target("b", cordoned=True)), False),
        (fleet(target("a"), target("b", health=Health.SUSPECT)), False),
        (fleet(target("a"), target("b", ordinal=7)), False),
        (fleet(target("a"), target("b", incarnation=1)), False),
        (msgspec.structs.replace(BASE, policy=RoutingPolicy(alpha=0.4)), False),
        (msgspec.structs.replace(BASE, pools=(Pool(name="p", models=("m", "n")),)), False),
    ],
)
def test_what_routing_goes_by(other: FleetSnapshot, equal: bool) -> None:
    assert is_routing_equal(BASE, other) is equal
    assert is_routing_equal(other, BASE) is equal


def test_a_new_epoch_is_taken_once_every_usable_target_was_looked_at_or_time_is_up() -> None:
    guard = EpochGuard(15.0)
    current = fleet(target("a"), target("b"), target("c", health=Health.SUSPECT))
    assert guard.admits(None, fleet(epoch=2), 0.0), "nothing to lose"
    assert guard.admits(current, fleet(), 0.0), "the same control plane knows what it does"
    assert not guard.admits(current, fleet(epoch=2), 100.0)
    assert not guard.admits(current, fleet(target("a"), epoch=2), 101.0)
    assert not guard.admits(current, fleet(target("a"), target("b", health=Health.STARTING), epoch=2), 102.0)
    assert guard.admits(current, fleet(target("a"), target("b", health=Health.GONE), epoch=2), 103.0)
    assert not guard.admits(current, fleet(target("a"), epoch=2), 114.9)
    assert guard.admits(current, fleet(target("a"), epoch=2), 115.0)
    assert not guard.admits(current, fleet(epoch=3), 116.0), "the time of one epoch is not that of the next"


class Harness:
    """A publisher over a real board and plain buffers."""

    def __init__(self, directory: Path, slots: int = 4) -> None:
        self.board = SnapshotBoard.create(directory / "board")
        (self.buffers,) = in_memory(slots)
        self.ledger = bytearray(8)
        self.now_s = 0.0
        self.published: list[tuple[SlotMap, frozenset[int]]] = []
        self.store = SnapshotStore(directory)
        self.publisher = Publisher(
            self.board,
            SlotTable(slots, quarantine_s=10.0),
            AccountsReader((self.buffers.own.accounts,)),
            self.store,
            settle_s=15.0,
            on_published=lambda slots, fresh: self.published.append((slots, fresh)),
            ledger=memoryview(self.ledger),
            monotonic=lambda: self.now_s,
        )

    async def until(self, version: int) -> dict[str, int]:
        async with asyncio.timeout(10):
            while self.board.version < version or len(self.published) < version:
                await asyncio.sleep(0.01)
        read = self.board.read()
        assert read is not None
        return tables.decode(read[1]).slots


async def test_a_full_replica_leaves_targets_out_until_a_slot_is_free(tmp_path: Path) -> None:
    harness = Harness(tmp_path, slots=2)
    task = asyncio.create_task(harness.publisher.run())
    harness.publisher.offer(fleet(target("a"), target("b")))
    slots = await harness.until(1)
    writer = AccountsWriter(harness.buffers.own.accounts, DirtyLog(harness.buffers.own.dirty))
    entry = writer.dispatch(slots["a"], 1, 1, 0.1, 0.0)
    assert harness.ledger[0] == 2
    harness.publisher.offer(fleet(target("b"), target("c"), version=2))
    assert await harness.until(2) == {"b": slots["b"]}
    assert harness.publisher.without_slot == ("c",)
    harness.now_s = 100.0
    harness.publisher.offer(fleet(target("b"), target("c"), version=3))
    await asyncio.sleep(0)
    assert harness.board.version == 2, "published although a relay still has a request there"
    writer.finish(entry)
    assert await harness.until(3) == {"b": slots["b"], "c": slots["a"]}
    assert harness.published[-1][1] == {slots["a"]}, "the slot has a new owner"
    task.cancel()


async def test_snapshots_that_came_in_between_are_skipped_and_the_last_is_kept_on_disk(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    task = asyncio.create_task(harness.publisher.run())
    for version in range(1, 50):
        harness.publisher.offer(fleet(target("a"), target("b", cordoned=version % 2 == 0), version=version))
    await harness.until(1)
    async with asyncio.timeout(10):
        while (stored := harness.store.load()) is None:
            await asyncio.sleep(0.01)
    assert stored.snapshot.version == 49
    assert harness.board.version == 1
    task.cancel()
