"""The shared memory of one router replica: one file per writing process, each mapped read-only by everybody else.

Writers are the relays 0..P-1 and the agent (``AGENT``). A writer's file holds its heartbeat and the regions that
the routing core asked for; this module knows their sizes, never their contents. A process maps its own file
writable and those of its siblings read-only, so that no fault of one process can damage the figures of another.

One file more is written by all (``SHARED``): the table of prefixes believed to be cached. It holds hints, of which any
value is harmless, and one table is looked up where there would be one per writer.
"""

import enum
import mmap
import os
import shutil
import struct
from pathlib import Path

import msgspec

from router.shm.board import SnapshotBoard
from router.shm.counters import CounterSlab
from router.shm.files import (
    PAGE_BYTES,
    SOCKET_PATH_BYTES,
    DirectoryLock,
    SharedMemoryError,
    check_private_directory,
    close_quietly,
    create_mapped,
    make_private_directory,
    open_mapped,
    round_up_to_page,
)
from router.shm.heartbeat import HEARTBEAT_BYTES, Heartbeat

LAYOUT_VERSION = 2
AGENT = -1
"""Index of the agent among the writers."""
SHARED = -2
"""In the place of a writer: the file that all of them write."""
MAX_RELAYS = 256
MAX_SLOTS = 1 << 16

_MAGIC = b"TWFOLDRP"
_HEADER = struct.Struct("<8sIIIi")
"""magic, layout version, relays, slots, writer."""
_REGION = struct.Struct("<QQ")
"""offset, bytes."""


class Region(enum.IntEnum):
    """Parts of a writer's file."""

    HEARTBEAT = 0
    ACCOUNTS = 1
    """Live load by slot."""
    DIRTY = 2
    """Log of the slots whose accounts changed."""
    SENT = 3
    """Ring of prefixes sent, for the agent's broadcast."""
    SLOTS = 4
    """The agent's ledger: the number of slots ever given out, 8 bytes."""


class RegionSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that the routing core wants for each region of one writer, for ``slots`` target slots; ``prefixes``: once,
    for all of them."""

    slots: int
    accounts: int
    dirty: int
    prefixes: int
    sent: int

    def of(self, region: Region) -> int:
        """Bytes of ``region``."""
        fixed = {Region.HEARTBEAT: HEARTBEAT_BYTES, Region.SLOTS: 8}
        if region in fixed:
            return fixed[region]
        return (self.accounts, self.dirty, self.sent)[region - Region.ACCOUNTS]


class SharedReplica:
    """The mapped files of one replica.

    ``create`` belongs to the launcher, which also removes the directory; ``attach`` to relays and agent.
    """

    def __init__(
        self, directory: Path, relays: int, sizes: RegionSizes, files: dict[int, mmap.mmap], writer: int | None
    ) -> None:
        self.directory = directory
        self.relays = relays
        self.sizes = sizes
        self.writer = writer
        self._files = files
        self._lock: DirectoryLock | None = None
        self.board: SnapshotBoard

    @property
    def slots(self) -> int:
        """Number of target slots."""
        return self.sizes.slots

    @classmethod
    def create(cls, directory: Path, *, relays: int, sizes: RegionSizes) -> "SharedReplica":
        """Lay out the files of a new replica, all writable here, and lock the directory.

        What a replica that died left behind is removed. Raises SharedMemoryError when a running replica uses the
        directory, when it is not private, or when there is no room (nothing is left behind then).
        """
        if not 1 <= relays <= MAX_RELAYS or not 1 <= sizes.slots <= MAX_SLOTS:
            raise SharedMemoryError(f"a replica has 1..{MAX_RELAYS} relays and 1..{MAX_SLOTS} slots")
        if len(os.fsencode(agent_socket(directory))) > SOCKET_PATH_BYTES:
            raise SharedMemoryError(f"{directory}: path is too long for a Unix socket in it")
        make_private_directory(directory)
        lock = DirectoryLock(directory)
        try:
            _empty(directory, keep=lock.path)
            files = {
                writer: _create_file(directory, writer, relays, sizes) for writer in (*range(relays), AGENT, SHARED)
            }
            replica = cls(directory, relays, sizes, files, None)
            replica.board = SnapshotBoard.create(directory / "board")
        except (SharedMemoryError, OSError) as error:
            _empty(directory, keep=lock.path)
            lock.release()
            _remove_directory(directory)
            if isinstance(error, SharedMemoryError):
                raise
            raise SharedMemoryError(f"cannot lay out {directory}: {error.strerror}") from None
        replica._lock = lock
        return replica

    @classmethod
    def attach(cls, directory: Path, *, writer: int | None = None, sizes: RegionSizes | None = None) -> "SharedReplica":
        """Map the files of a replica: those of ``writer`` writable, all others read-only.

        ``sizes``, when given, must be what the replica was made for. Raises SharedMemoryError when anything is
        missing or made for another layout, number of relays or number of slots.
        """
        check_private_directory(directory)
        agent_file = open_mapped(_writer_path(directory, AGENT), writable=writer == AGENT)
        shared_file = open_mapped(_writer_path(directory, SHARED), writable=writer is not None)
        relays, found = _check_header(directory, AGENT, agent_file, shared_file)
        if _check_header(directory, SHARED, shared_file, shared_file)[0] != relays:
            raise SharedMemoryError(f"{_writer_path(directory, SHARED)}: made for another replica than its siblings")
        if sizes is not None and sizes != found:
            raise SharedMemoryError(f"{directory} was made for {found}, this process needs {sizes}")
        if writer is not None and not AGENT <= writer < relays:
            raise SharedMemoryError(f"{directory} has {relays} relays, there is no relay {writer}")
        files = {AGENT: agent_file, SHARED: shared_file}
        for index in range(relays):
            files[index] = open_mapped(_writer_path(directory, index), writable=writer == index)
            if _check_header(directory, index, files[index], shared_file) != (relays, found):
                path = _writer_path(directory, index)
                raise SharedMemoryError(f"{path}: made for another replica than its siblings")
        replica = cls(directory, relays, found, files, writer)
        replica.board = SnapshotBoard.attach(directory / "board", writable=writer == AGENT)
        return replica

    def region(self, writer: int, region: Region) -> memoryview:
        """Bytes of a region of ``writer`` (``AGENT`` or a relay's index); read-only unless it is this process's
        own."""
        return self._view(writer, region)

    @property
    def prefixes(self) -> memoryview:
        """The table of prefixes, of all writers; writable for every one of them."""
        return self._view(SHARED, 0)

    def _view(self, writer: int, number: int) -> memoryview:
        file = self._files[writer]
        offset, size_bytes = _REGION.unpack_from(file, _HEADER.size + number * _REGION.size)
        return memoryview(file)[offset : offset + size_bytes]

    def heartbeat(self, writer: int) -> Heartbeat:
        """The heartbeat of ``writer``."""
        return Heartbeat(self.region(writer, Region.HEARTBEAT))

    def counters(self, process: str) -> CounterSlab:
        """The counters of this process, created or taken over from an earlier life. Raises SharedMemoryError."""
        return CounterSlab.open(counter_path(self.directory, process))

    def counter_paths(self) -> list[Path]:
        """Counter files of all processes that ever ran in this replica."""
        return sorted(self.directory.glob("counters.*"))

    def close(self) -> None:
        """Unmap. Memoryviews that are still held stay valid. Idempotent."""
        self.board.close()
        for file in self._files.values():
            close_quietly(file)

    def remove(self) -> None:
        """Unmap, remove the directory and drop the lock. Only for whoever created the replica. Idempotent."""
        self.close()
        if self._lock is not None:
            _empty(self.directory, keep=self._lock.path)
            self._lock.release()
            self._lock = None
            _remove_directory(self.directory)


def agent_socket(directory: Path) -> Path:
    """Where the agent listens for its relays."""
    return directory / "agent.sock"


def counter_path(directory: Path, process: str) -> Path:
    """Counter file of a process, for example "relay-0" or "agent"."""
    return directory / f"counters.{process}"


def writer_name(writer: int) -> str:
    """Name of a writing process: "agent" or "relay-<index>"; "shared" for all of them."""
    return {AGENT: "agent", SHARED: "shared"}.get(writer, f"relay-{writer}")


def _writer_path(directory: Path, writer: int) -> Path:
    return directory / f"{writer_name(writer)}.shm"


def _create_file(directory: Path, writer: int, relays: int, sizes: RegionSizes) -> mmap.mmap:
    wanted = [sizes.prefixes] if writer == SHARED else [sizes.of(region) for region in Region]
    end = PAGE_BYTES + sum(round_up_to_page(size_bytes) for size_bytes in wanted)
    file = create_mapped(_writer_path(directory, writer), end)
    offset = PAGE_BYTES
    for number, size_bytes in enumerate(wanted):
        _REGION.pack_into(file, _HEADER.size + number * _REGION.size, offset, size_bytes)
        offset += round_up_to_page(size_bytes)
    _HEADER.pack_into(file, 0, _MAGIC, LAYOUT_VERSION, relays, sizes.slots, writer)
    return file


def _check_header(directory: Path, writer: int, file: mmap.mmap, shared: mmap.mmap) -> tuple[int, RegionSizes]:
    """Relays and sizes in the header of a file; of the prefixes in that of the ``shared`` one. Raises
    SharedMemoryError unless it is whole."""
    path = _writer_path(directory, writer)
    magic, layout, relays, slots, stored_writer = _HEADER.unpack_from(file, 0)
    if magic != _MAGIC or layout != LAYOUT_VERSION:
        raise SharedMemoryError(f"{path}: not a replica file of layout {LAYOUT_VERSION}")
    entries = [_REGION.unpack_from(file, _HEADER.size + region * _REGION.size) for region in Region]
    if stored_writer != writer or any(offset + size > len(file) for offset, size in entries):
        raise SharedMemoryError(f"{path}: header is damaged")
    _, prefixes = _REGION.unpack_from(shared, _HEADER.size)
    return relays, RegionSizes(
        slots=slots,
        accounts=entries[Region.ACCOUNTS][1],
        dirty=entries[Region.DIRTY][1],
        prefixes=prefixes,
        sent=entries[Region.SENT][1],
    )


def _empty(directory: Path, *, keep: Path) -> None:
    for path in directory.iterdir():
        if path == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove_directory(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        pass  # somebody is already making a new replica there
