"""SnapshotBoard: versions, sharing of rings, recovery, and readers beside a writer in another process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from router.shm.board import SnapshotBoard
from router.shm.files import SharedMemoryError


def test_an_empty_board_reads_as_nothing(tmp_path: Path) -> None:
    board = SnapshotBoard.create(tmp_path / "b")
    assert board.version == 0
    assert board.read() is None
    board.close()


def test_versions_grow_and_old_files_go(tmp_path: Path) -> None:
    board = SnapshotBoard.create(tmp_path / "b")
    reader = SnapshotBoard.attach(tmp_path / "b")
    for number in range(1, 8):
        assert board.publish(b"t%d" % number, b"r%d" % (number // 3)) == number
        assert reader.version == number
        version, table, rings = reader.read() or pytest.fail("nothing published")
        assert (version, table, bytes(rings)) == (number, b"t%d" % number, b"r%d" % (number // 3))
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert [n for n in names if n.startswith("table")] == ["table.6", "table.7"]
    assert len([n for n in names if n.startswith("rings")]) == 1
    with pytest.raises(SharedMemoryError, match="read-only"):
        reader.publish(b"", b"")


def test_unchanged_rings_are_not_written_again(tmp_path: Path) -> None:
    board = SnapshotBoard.create(tmp_path / "b")
    board.publish(b"one", b"rings" * 1000)
    before = {p.name: p.stat().st_ino for p in (tmp_path / "b").glob("rings.*")}
    board.publish(b"two", b"rings" * 1000)
    board.publish(b"three", b"rings" * 1000)
    assert {p.name: p.stat().st_ino for p in (tmp_path / "b").glob("rings.*")} == before


def test_rings_held_by_a_reader_outlive_later_versions(tmp_path: Path) -> None:
    board = SnapshotBoard.create(tmp_path / "b")
    board.publish(b"one", b"first rings")
    held = board.read()
    assert held is not None
    assert held[2].readonly
    for number in range(5):
        board.publish(b"later", b"other rings %d" % number)
    board.close()
    assert bytes(held[2]) == b"first rings"


def test_tables_and_rings_may_grow_and_be_empty(tmp_path: Path) -> None:
    board = SnapshotBoard.create(tmp_path / "b")
    for size in (0, 1, 4096, 3_000_000, 10, 0):
        board.publish(b"t" * size, b"r" * size)
        read = board.read()
        assert read is not None
        assert (len(read[1]), len(read[2])) == (size, size)


def test_a_new_writer_goes_on_where_one_died(tmp_path: Path) -> None:
    first = SnapshotBoard.create(tmp_path / "b")
    first.publish(b"one", b"rings")
    first.publish(b"two", b"rings")
    (tmp_path / "b" / "table.3.tmp").write_bytes(b"half")
    (tmp_path / "b" / "table.3").write_bytes(b"written, its number never stored")
    first.close()
    second = SnapshotBoard.attach(tmp_path / "b", writable=True)
    assert not list((tmp_path / "b").glob("*.tmp"))
    read = second.read()
    assert read is not None
    assert read[:2] == (2, b"two")
    assert second.publish(b"three", b"rings") == 3
    assert len(list((tmp_path / "b").glob("rings.*"))) == 1
    assert second.publish(b"four", b"new rings") == 4
    read = second.read()
    assert read is not None
    assert bytes(read[2]) == b"new rings"


def test_damage_is_noticed(tmp_path: Path) -> None:
    board = SnapshotBoard.create(tmp_path / "b")
    board.publish(b"table", b"rings")
    path = tmp_path / "b" / "table.1"
    good = path.read_bytes()
    for bad in (good[:10], good[:-1], good[:-1] + b"X", b"X" + good[1:]):
        path.write_bytes(bad)
        with pytest.raises(SharedMemoryError):
            board.read()
    path.write_bytes(good)
    (tmp_path / "b" / "rings.1").write_bytes(b"short")
    board.read()
    (tmp_path / "b" / "rings.1").write_bytes(b"longer than it was")
    with pytest.raises(SharedMemoryError, match="damaged"):
        board.read()
    path.unlink()
    with pytest.raises(SharedMemoryError, match="missing"):
        board.read()
    (tmp_path / "b" / "cell").write_bytes(bytes(4096))
    with pytest.raises(SharedMemoryError, match="no snapshot board"):
        SnapshotBoard.attach(tmp_path / "b")


WRITER = """
import sys
from pathlib import Path
from router.shm.board import SnapshotBoard

board = SnapshotBoard.attach(Path(sys.argv[1]), writable=True)
print("ready", flush=True)
for number in range(2, int(sys.argv[2]) + 1):
    body = number.to_bytes(8, "little")
    board.publish(body * (1 + number * 37 % 4001), body * (1 + number * 53 % 5003))
"""


def test_readers_beside_a_writing_process_never_see_torn_data(tmp_path: Path) -> None:
    versions = 3000
    one = (1).to_bytes(8, "little")
    SnapshotBoard.create(tmp_path / "b").publish(one, one)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "b"), str(versions)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        reader = SnapshotBoard.attach(tmp_path / "b")
        seen, last, deadline = set(), 0, time.monotonic() + 60
        while last < versions and time.monotonic() < deadline:
            read = reader.read()
            assert read is not None
            version, table, rings = read
            body = version.to_bytes(8, "little")
            assert table == body * len(table[::8])
            assert bytes(rings) == body * (len(rings) // 8)
            assert version >= last
            last = version
            seen.add(version)
        assert last == versions
        assert len(seen) > 20, "the reader never ran beside the writer"
        writer.stdout.close()
        assert writer.wait(timeout=10) == 0
    finally:
        writer.kill()
        writer.wait()
