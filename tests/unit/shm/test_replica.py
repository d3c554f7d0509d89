"""SharedReplica: layout, protection, checks on attach, clean-up."""

import os
import stat
import time
from pathlib import Path

import pytest

from router.routing.accounts import AccountsReader, AccountsWriter
from router.routing.dirty_log import DirtyLog, DirtyReader
from router.shm.files import SharedMemoryError, shared_directory
from router.shm.heartbeat import ProcessState
from router.shm.layout import clear_accounts, region_sizes, regions_of, relay_buffers
from router.shm.replica import AGENT, Region, RegionSizes, SharedReplica

SIZES = RegionSizes(slots=64, accounts=64 * 96, dirty=8 * 129, prefixes=1 << 14, sent=8 * 513)


def test_created_directory_is_private_and_removed_without_trace(tmp_path: Path) -> None:
    directory = tmp_path / "replica"
    replica = SharedReplica.create(directory, relays=2, sizes=SIZES)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(p.stat().st_mode) in (0o600, 0o700) for p in directory.iterdir())
    replica.counters("relay-0").close()
    replica.board.publish(b"table", b"rings")
    replica.remove()
    replica.remove()
    assert not directory.exists()


def test_what_a_writer_writes_others_read_but_cannot_write(tmp_path: Path) -> None:
    owner = SharedReplica.create(tmp_path / "r", relays=2, sizes=SIZES)
    relay = SharedReplica.attach(tmp_path / "r", writer=0, sizes=SIZES)
    sibling = SharedReplica.attach(tmp_path / "r", writer=1, sizes=SIZES)
    agent = SharedReplica.attach(tmp_path / "r", writer=AGENT, sizes=SIZES)
    for region in Region:
        own = relay.region(0, region)
        assert len(own) == SIZES.of(region)
        own[-1] = 7
        for reader in (sibling, agent):
            view = reader.region(0, region)
            assert view[-1] == 7
            assert view.readonly
            with pytest.raises(TypeError):
                view[-1] = 8
        assert not any(relay.region(1, region)), "regions of different writers overlap"
    assert relay.region(AGENT, Region.ACCOUNTS).readonly
    assert not agent.region(AGENT, Region.ACCOUNTS).readonly
    owner.remove()


def test_the_table_of_prefixes_is_written_by_all_and_by_no_onlooker(tmp_path: Path) -> None:
    owner = SharedReplica.create(tmp_path / "r", relays=2, sizes=SIZES)
    writers = [SharedReplica.attach(tmp_path / "r", writer=writer, sizes=SIZES) for writer in (0, 1, AGENT)]
    onlooker = SharedReplica.attach(tmp_path / "r")
    for number, writer in enumerate(writers, start=1):
        assert len(writer.prefixes) == SIZES.prefixes
        writer.prefixes[-1] = number
        assert [seen.prefixes[-1] for seen in (*writers, onlooker)] == [number] * 4
        assert regions_of(writer, 0).prefixes[-1] == regions_of(writer, AGENT).prefixes[-1] == number
    assert onlooker.prefixes.readonly
    assert not any(any(owner.region(0, region)) for region in Region)
    owner.remove()


def test_regions_of_one_writer_do_not_overlap(tmp_path: Path) -> None:
    replica = SharedReplica.create(tmp_path / "r", relays=1, sizes=SIZES)
    for region in Region:
        view = replica.region(0, region)
        view[:] = bytes([region + 1]) * len(view)
    for region in Region:
        view = replica.region(0, region)
        assert bytes(view) == bytes([region + 1]) * len(view)
    replica.remove()


@pytest.mark.parametrize(
    "other",
    [
        RegionSizes(slots=65, accounts=64 * 96, dirty=8 * 129, prefixes=1 << 14, sent=8 * 513),
        RegionSizes(slots=64, accounts=64 * 88, dirty=8 * 129, prefixes=1 << 14, sent=8 * 513),
        RegionSizes(slots=64, accounts=64 * 96, dirty=8 * 129, prefixes=1 << 15, sent=8 * 513),
    ],
)
def test_attach_refuses_another_layout(tmp_path: Path, other: RegionSizes) -> None:
    replica = SharedReplica.create(tmp_path / "r", relays=1, sizes=SIZES)
    with pytest.raises(SharedMemoryError, match="was made for"):
        SharedReplica.attach(tmp_path / "r", writer=0, sizes=other)
    replica.remove()


def test_attach_refuses_damage_and_absence(tmp_path: Path) -> None:
    with pytest.raises(SharedMemoryError, match="cannot use"):
        SharedReplica.attach(tmp_path / "nothing")
    replica = SharedReplica.create(tmp_path / "r", relays=2, sizes=SIZES)
    with pytest.raises(SharedMemoryError, match="no relay 2"):
        SharedReplica.attach(tmp_path / "r", writer=2)
    file = tmp_path / "r" / "relay-1.shm"
    content = file.read_bytes()
    for damaged, message in (
        (b"X" + content[1:], "not a replica file"),
        (content[:8] + b"\xff" + content[9:], "not a replica file"),
        (content[:4096], "header is damaged"),
        (content[:100], "too short"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(SharedMemoryError, match=message):
            SharedReplica.attach(tmp_path / "r", writer=0)
    file.write_bytes(content)
    (tmp_path / "r" / "relay-0.shm").write_bytes(content)
    with pytest.raises(SharedMemoryError, match="header is damaged"):
        SharedReplica.attach(tmp_path / "r", writer=0)
    replica.remove()


def test_a_running_replica_keeps_its_directory_and_a_dead_one_does_not(tmp_path: Path) -> None:
    first = SharedReplica.create(tmp_path / "r", relays=3, sizes=SIZES)
    with pytest.raises(SharedMemoryError, match="in use"):
        SharedReplica.create(tmp_path / "r", relays=1, sizes=SIZES)
    assert (tmp_path / "r" / "relay-2.shm").exists()
    lock = first._lock
    assert lock is not None
    os.close(lock._fd)  # what the kernel does when the holder is killed: nothing is cleaned up
    second = SharedReplica.create(tmp_path / "r", relays=1, sizes=SIZES)
    assert not (tmp_path / "r" / "relay-2.shm").exists()
    second.remove()


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(SharedMemoryError, match="open to others"):
        SharedReplica.create(tmp_path / "open", relays=1, sizes=SIZES)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SharedMemoryError, match="not a directory"):
        SharedReplica.create(tmp_path / "link", relays=1, sizes=SIZES)


def test_without_room_nothing_is_left_behind(tmp_path: Path) -> None:
    huge = RegionSizes(slots=64, accounts=1 << 50, dirty=8, prefixes=8, sent=8)
    with pytest.raises(SharedMemoryError, match="cannot allocate"):
        SharedReplica.create(tmp_path / "r", relays=1, sizes=huge)
    assert not (tmp_path / "r").exists()


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    with pytest.raises(SharedMemoryError, match="too long"):
        SharedReplica.create(directory, relays=1, sizes=SIZES)
    assert not directory.exists()


def test_directory_names_differ_by_run_dir_and_replica_and_stay_short(tmp_path: Path) -> None:
    names = {
        shared_directory(str(tmp_path / run), replica)
        for run in ("a", "b")
        for replica in ("r0", "r1", "x" * 128, "x" * 127 + "y")
    }
    assert len(names) == 8
    assert all(len(str(name / "agent.sock")) <= 107 for name in names)
    assert shared_directory(str(tmp_path), "r0") == shared_directory(str(tmp_path / "." / "z" / ".."), "r0")
    for bad in ("", "..", "a/b", "a b", "x" * 129, "r\n"):
        with pytest.raises(SharedMemoryError):
            shared_directory(str(tmp_path), bad)


def test_heartbeat_crosses_processes_mappings(tmp_path: Path) -> None:
    replica = SharedReplica.create(tmp_path / "r", relays=1, sizes=SIZES)
    relay = SharedReplica.attach(tmp_path / "r", writer=0)
    assert replica.heartbeat(0).read().state is ProcessState.ABSENT
    own = relay.heartbeat(0)
    own.start(123, 10.0)
    own.beat(11.5, ProcessState.SERVING, 4, 9)
    beat = replica.heartbeat(0).read()
    assert (beat.pid, beat.state, beat.snapshot_version, beat.inflight) == (123, ProcessState.SERVING, 4, 9)
    assert (beat.started_s, beat.beat_s) == (10.0, 11.5)
    assert beat.is_fresh(12.0, 1.0)
    assert not beat.is_fresh(13.0, 1.0)
    own.beat(12.0, ProcessState.STOPPED, 4, 0)
    assert not replica.heartbeat(0).read().is_fresh(12.0, 1.0)
    replica.remove()


def test_the_routing_core_runs_on_it(tmp_path: Path) -> None:
    sizes = region_sizes(128)
    replica = SharedReplica.create(tmp_path / "r", relays=2, sizes=sizes)
    relays = [SharedReplica.attach(tmp_path / "r", writer=i, sizes=sizes) for i in range(2)]
    buffers = [relay_buffers(relay, i) for i, relay in enumerate(relays)]
    writer = AccountsWriter(buffers[0].own.accounts, DirtyLog(buffers[0].own.dirty))
    reader = AccountsReader((buffers[1].own.accounts, buffers[1].siblings[0].accounts, buffers[1].remote.accounts))
    entry = writer.dispatch(5, 100, 300, 0.25, 1.0)
    assert reader.load(5).inflight == 1
    writer.first_token(entry, 1.5)
    assert reader.row(5).kv_tokens == 300
    writer.finish(entry)
    assert reader.row(5).inflight == 0
    assert not reader.load(4).inflight
    replica.remove()


def test_clearing_a_dead_relay_gives_back_work_and_keeps_what_is_true_of_targets(tmp_path: Path) -> None:
    replica = SharedReplica.create(tmp_path / "r", relays=2, sizes=region_sizes(128))
    own = regions_of(replica, 0)
    writer = AccountsWriter(own.accounts, DirtyLog(own.dirty))
    for slot in (3, 7):
        writer.dispatch(slot, 100, 300, 0.25, 1.0)
    writer.first_token(writer.dispatch(7, 50, 50, 0.1, 1.0), 1.2)
    writer.set_circuit(9, 4, 99.0)
    reader = AccountsReader((own.accounts,))
    seen = DirtyReader(own.dirty)
    assert clear_accounts(replica, 0, time.monotonic()) == 3
    for slot in range(128):
        row = reader.row(slot)
        work = (row.inflight, row.decodes, row.queued_prefill_tokens, row.queued_prefill_s, row.kv_tokens)
        assert work == (0, 0, 0.0, 0.0, 0.0)
    assert reader.row(3).stored_tokens == 100
    assert reader.load(9).failures == 4
    assert reader.load(9).circuit_until_s == 99.0
    assert sorted(seen.take(1000) or ()) == [3, 7, 9]
    replica.remove()
