"""The shared memory of one router replica: one file per writing process, each mapped read-only by everybody else.

Writers are the relays 0..P-1 and the agent (``AGENT``). A writer's file holds its heartbeat and the regions that
the routing core asked for; this module knows their sizes, never their contents. A process maps its own file
writable and those of its siblings read-only, so that no fault of one process can damage the figures of another.
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

LAYOUT_VERSION = 1
AGENT = -1
"""Index of the agent among the writers."""
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
    PREFIXES = 3
    """Table of prefixes believed to be cached."""
    SENT = 4
    """Ring of prefixes sent, for the agent's broadcast."""
    SLOTS = 5
    """The agent's ledger: the number of slots ever given out, 8 bytes."""


class RegionSizes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that the routing core wants for each region of one writer, for ``slots`` target slots."""

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
        return (self.accounts, self.dirty, self.prefixes, self.sent)[region - Region.ACCOUNTS]


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
            files = {writer: _create_writer(directory, writer, relays, sizes) for writer in (*range(relays), AGENT)}
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
        relays, found = _check_header(directory, AGENT, agent_file, None)
        if sizes is not None and sizes != found:
            raise SharedMemoryError(f"{directory} was made for {found}, this process needs {sizes}")
        if writer is not None and not AGENT <= writer < relays:
            raise SharedMemoryError(f"{directory} has {relays} relays, there is no relay {writer}")
        files = {AGENT: agent_file}
        for index in range(relays):
            files[index] = open_mapped(_writer_path(directory, index), writable=writer == index)
            _check_header(directory, index, files[index], (relays, found))
        replica = cls(directory, relays, found, files, writer)
        replica.board = SnapshotBoard.attach(directory / "board", writable=writer == AGENT)
        return replica

    def region(self, writer: int, region: Region) -> memoryview:
        """Bytes of a region of ``writer`` (``AGENT`` or a relay's index); read-only unless it is this process's
        own."""
        file = self._files[writer]
        offset, size_bytes = _REGION.unpack_from(file, _HEADER.size + region * _REGION.size)
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
    """Name of a writing process: "agent" or "relay-<index>"."""
    return "agent" if writer == AGENT else f"relay-{writer}"


def _writer_path(directory: Path, writer: int) -> Path:
    return directory / f"{writer_name(writer)}.shm"


def _create_writer(directory: Path, writer: int, relays: int, sizes: RegionSizes) -> mmap.mmap:
    offsets: list[tuple[int, int]] = []
    end = PAGE_BYTES
    for region in Region:
        offsets.append((end, sizes.of(region)))
        end += round_up_to_page(sizes.of(region))
    file = create_mapped(_writer_path(directory, writer), end)
    for region, entry in zip(Region, offsets, strict=True):
        _REGION.pack_into(file, _HEADER.size + region * _REGION.size, *entry)
    _HEADER.pack_into(file, 0, _MAGIC, LAYOUT_VERSION, relays, sizes.slots, writer)
    return file


def _check_header(
    directory: Path, writer: int, file: mmap.mmap, expected: tuple[int, RegionSizes] | None
) -> tuple[int, RegionSizes]:
    """Relays and sizes in the header of a writer's file. Raises SharedMemoryError unless it is whole and as
    expected."""
    path = _writer_path(directory, writer)
    magic, layout, relays, slots, stored_writer = _HEADER.unpack_from(file, 0)
    if magic != _MAGIC or layout != LAYOUT_VERSION:
        raise SharedMemoryError(f"{path}: not a replica file of layout {LAYOUT_VERSION}")
    entries = [_REGION.unpack_from(file, _HEADER.size + region * _REGION.size) for region in Region]
    if stored_writer != writer or any(offset + size > len(file) for offset, size in entries):
        raise SharedMemoryError(f"{path}: header is damaged")
    sizes = RegionSizes(
        slots=slots,
        accounts=entries[Region.ACCOUNTS][1],
        dirty=entries[Region.DIRTY][1],
        prefixes=entries[Region.PREFIXES][1],
        sent=entries[Region.SENT][1],
    )
    if expected is not None and expected != (relays, sizes):
        raise SharedMemoryError(f"{path}: made for another replica than its siblings")
    return relays, sizes


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
