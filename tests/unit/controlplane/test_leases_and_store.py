"""Leases, stored state, the snapshot feed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.discovery.leases import LeaseError, Leases
from controlplane.feed import SnapshotFeed
from controlplane.fleet.snapshot import targets_of
from controlplane.plan import Desired
from controlplane.store import FileStore, MemoryStore, Persisted, StoredControl, StoredPolicy
from twofold import wire
from twofold.model.fleet import FleetSnapshot, RoutingPolicy
from twofold.v1 import fleet_pb2

from .builders import healthy, spec


def test_a_lease_lasts_as_long_as_it_is_renewed() -> None:
    leases = Leases()
    lease = leases.register(spec("a"), 10.0, now_s=0.0)
    assert leases.register(spec("a"), 10.0, now_s=8.0).lease_id == lease.lease_id
    assert leases.expire(10.0) == []
    assert leases.workers() == (spec("a"),)
    assert leases.expire(18.0) == ["a"]
    assert leases.workers() == ()


def test_renewing_changes_nothing_for_the_fleet_and_a_new_address_does() -> None:
    leases = Leases()
    leases.register(spec("a"), 10.0, now_s=0.0)
    leases.changed = False
    leases.register(spec("a"), 10.0, now_s=1.0)
    assert not leases.changed
    leases.register(spec("a", url="http://b:1"), 10.0, now_s=2.0)
    assert leases.changed


def test_a_lease_ends_with_its_id_only() -> None:
    leases = Leases()
    lease = leases.register(spec("a"), 10.0, now_s=0.0)
    for worker, lease_id in (("a", "no"), ("b", lease.lease_id)):
        with pytest.raises(LeaseError):
            leases.deregister(worker, lease_id)
    leases.deregister("a", lease.lease_id)
    assert len(leases) == 0


def test_memory_of_renewals_is_bounded() -> None:
    leases = Leases()
    for number in range(10_000):
        leases.register(spec("a"), 10.0, now_s=number / 10)
    assert len(leases._expiries) < 100


def test_leases_survive_a_restart_with_their_full_time() -> None:
    leases, after = Leases(), Leases()
    lease = leases.register(spec("a", zone="z", incarnation=4), 10.0, now_s=0.0)
    after.restore(leases.stored(), now_s=100.0)
    assert after.workers() == leases.workers()
    assert after.expire(109.0) == []
    after.deregister("a", lease.lease_id)


FULL = Persisted(
    epoch=7,
    controls=(StoredControl(worker_id="a", version=2, cordoned=True),),
    policy=StoredPolicy(version=1, policy=RoutingPolicy(alpha=0.5), file_policy=RoutingPolicy()),
    desired=(Desired(pool="p", profile="x", replicas=3),),
)


def test_the_file_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "state.json")
    assert store.load() == Persisted()
    store.save(FULL)
    assert FileStore(tmp_path / "state.json").load() == FULL
    store.save(Persisted(epoch=8))
    assert store.load().epoch == 8
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"epoch": "x"}', b"\xff" * 100])
def test_a_broken_store_is_set_aside(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(garbage)
    store = FileStore(path)
    assert store.load() == Persisted()
    assert [p.read_bytes() for p in tmp_path.glob("state.broken-*")] == [garbage]
    store.save(FULL)
    assert store.load() == FULL


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        FileStore(tmp_path / "missing" / "state.json").save(FULL)


def test_the_memory_store_forgets_with_the_process() -> None:
    store = MemoryStore()
    store.save(FULL)
    assert store.load() == FULL
    assert MemoryStore().load() == Persisted()


def snapshots(count: int) -> list[FleetSnapshot]:
    """Versions 1..count of a fleet whose policy changes each time."""
    state = healthy("a", "b")
    targets = tuple(target for name in "ab" for target in targets_of(state.workers[name], state))
    pools, profiles = tuple(state.pools.values()), tuple(state.profiles.values())
    base = FleetSnapshot(epoch=9, version=0, pools=pools, profiles=profiles, targets=targets)
    return [replace(base, version=n, policy=RoutingPolicy(alpha=n / 1000)) for n in range(1, count + 1)]


async def read(feed: SnapshotFeed, epoch: int, version: int) -> fleet_pb2.WatchResponse:
    """The first message for a reader."""
    stream = feed.read(epoch, version, keepalive_s=0.05)
    message = await anext(stream)
    await stream.aclose()
    return fleet_pb2.WatchResponse.FromString(message)


async def test_a_new_reader_gets_the_snapshot_and_a_known_one_the_difference() -> None:
    feed = SnapshotFeed()
    versions = snapshots(5)
    for snapshot in versions:
        feed.publish(snapshot)
    message = await read(feed, 0, 0)
    assert wire.snapshot_from_proto(message.snapshot) == versions[-1]
    message = await read(feed, 9, 2)
    assert message.delta.base_version == 2
    assert wire.apply_delta(versions[1], message.delta) == versions[-1]
    assert not message.delta.upserted_targets
    for epoch, version in ((8, 2), (9, 77)):
        assert (await read(feed, epoch, version)).HasField("snapshot")


async def test_a_reader_that_is_up_to_date_gets_keepalives() -> None:
    feed = SnapshotFeed()
    feed.publish(snapshots(1)[0])
    assert (await read(feed, 9, 1)).WhichOneof("update") is None


async def test_before_the_first_snapshot_there_are_keepalives_only() -> None:
    assert (await read(SnapshotFeed(), 0, 0)).WhichOneof("update") is None


async def test_versions_beyond_the_history_are_answered_with_a_snapshot() -> None:
    feed = SnapshotFeed(history=3)
    for snapshot in snapshots(10):
        feed.publish(snapshot)
    assert (await read(feed, 9, 8)).HasField("delta")
    assert (await read(feed, 9, 5)).HasField("snapshot")


async def test_a_slow_reader_gets_one_delta_for_all_it_missed_and_all_readers_the_same_bytes() -> None:
    feed = SnapshotFeed()
    versions = snapshots(50)
    feed.publish(versions[0])
    readers: list[Any] = [feed.read(0, 0) for _ in range(3)]
    for reader in readers:
        await anext(reader)
    for snapshot in versions[1:]:
        feed.publish(snapshot)
        await asyncio.sleep(0)
    messages = [await anext(reader) for reader in readers]
    assert messages[0] is messages[1] is messages[2]
    delta = fleet_pb2.WatchResponse.FromString(messages[0]).delta
    assert wire.apply_delta(versions[0], delta) == versions[-1]
    for reader in readers:
        await reader.aclose()
    assert feed.readers == 0
