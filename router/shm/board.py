"""The board on which an agent publishes routing tables and from which relays read them, without locks and without
tears.

Every published version is its own immutable file, renamed into place before its number is stored in one aligned
64-bit cell. A reader looks at the cell (one memory read), opens the file of that number and maps its rings
read-only; a version that was removed meanwhile is simply read again under its newer number. No reader can see half
of anything, a writer that dies in the middle leaves only an unnamed temporary file, and rings that did not change
are shared between versions.
"""

import mmap
import os
import struct
from pathlib import Path

import xxhash

from router.shm.files import PAGE_BYTES, SharedMemoryError, close_quietly, create_mapped, open_mapped

_CELL_MAGIC = b"TWFBOARD"
_TABLE_MAGIC = b"TWFTABLE"
LAYOUT_VERSION = 1
_CELL_HEADER = struct.Struct("<8sQ")
_VERSION_INDEX = 8
_TABLE_HEADER = struct.Struct("<8sQQQQQ")
"""magic, version, ring generation, ring bytes, table bytes, xxh3-64 of the table."""

KEEP_VERSIONS = 2
READ_ATTEMPTS = 1000
MAX_TABLE_BYTES = 64 * 1024 * 1024
MAX_RING_BYTES = 256 * 1024 * 1024


class SnapshotBoard:
    """One board; ``create`` and ``attach(writable=True)`` for its one writer, ``attach`` for readers."""

    def __init__(self, directory: Path, cell: mmap.mmap, *, writable: bool) -> None:
        self._directory = directory
        self._cell = cell
        self._writable = writable
        self._versions = memoryview(cell).cast("Q")
        self._ring_generation = 0
        self._ring_digest = b""
        if writable:
            self._recover()

    @classmethod
    def create(cls, directory: Path) -> "SnapshotBoard":
        """An empty board in ``directory``, which is made. Raises SharedMemoryError."""
        directory.mkdir(mode=0o700)
        cell = create_mapped(directory / "cell", PAGE_BYTES)
        _CELL_HEADER.pack_into(cell, 0, _CELL_MAGIC, LAYOUT_VERSION)
        return cls(directory, cell, writable=True)

    @classmethod
    def attach(cls, directory: Path, *, writable: bool = False) -> "SnapshotBoard":
        """The board in ``directory``. Raises SharedMemoryError when it is none, or of another layout version."""
        cell = open_mapped(directory / "cell", writable=writable)
        magic, layout = _CELL_HEADER.unpack_from(cell, 0)
        if magic != _CELL_MAGIC or layout != LAYOUT_VERSION:
            raise SharedMemoryError(f"{directory}: no snapshot board of layout {LAYOUT_VERSION}")
        return cls(directory, cell, writable=writable)

    @property
    def version(self) -> int:
        """Number of the published version; 0 before the first."""
        return self._versions[_VERSION_INDEX]

    def publish(self, table: bytes, rings: bytes) -> int:
        """Make ``table`` and ``rings`` the published version and return its number. Raises SharedMemoryError when
        there is no room; the version before then stays in force."""
        if not self._writable:
            raise SharedMemoryError("this board is attached read-only")
        if len(table) > MAX_TABLE_BYTES or len(rings) > MAX_RING_BYTES:
            raise SharedMemoryError(f"table of {len(table)} or rings of {len(rings)} bytes exceed the bound")
        version = self.version + 1
        digest = xxhash.xxh3_128_digest(rings)
        try:
            if digest != self._ring_digest or not self._ring_path(self._ring_generation).exists():
                self._write(self._ring_path(self._ring_generation + 1), b"", rings)
                self._ring_generation += 1
                self._ring_digest = digest
            header = _TABLE_HEADER.pack(
                _TABLE_MAGIC, version, self._ring_generation, len(rings), len(table), xxhash.xxh3_64_intdigest(table)
            )
            self._write(self._table_path(version), header, table)
        except OSError as error:
            raise SharedMemoryError(f"cannot publish version {version}: {error.strerror}") from None
        self._versions[_VERSION_INDEX] = version
        self._remove_old(version)
        return version

    def read(self) -> tuple[int, bytes, memoryview] | None:
        """The published ``(version, table, rings)``, or None before the first. The rings are mapped read-only and
        stay valid for as long as the memoryview lives. Raises SharedMemoryError when a published file is
        damaged."""
        for _ in range(READ_ATTEMPTS):
            version = self.version
            if version == 0:
                return None
            try:
                return self._read_version(version)
            except FileNotFoundError:
                if self.version == version:
                    raise SharedMemoryError(f"{self._table_path(version)} is published but missing") from None
        raise SharedMemoryError("versions are published faster than they can be read")

    def close(self) -> None:
        """Unmap the cell. Idempotent."""
        self._versions.release()
        close_quietly(self._cell)

    def _table_path(self, version: int) -> Path:
        return self._directory / f"table.{version}"

    def _ring_path(self, generation: int) -> Path:
        return self._directory / f"rings.{generation}"

    @staticmethod
    def _write(path: Path, header: bytes, body: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            for part in (header, body):
                view = memoryview(part)
                while view:
                    view = view[os.write(fd, view) :]
        except OSError:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        os.rename(temporary, path)

    def _read_version(self, version: int) -> tuple[int, bytes, memoryview]:
        path = self._table_path(version)
        content = path.read_bytes()
        try:
            magic, stored, generation, ring_bytes, table_bytes, digest = _TABLE_HEADER.unpack_from(content, 0)
        except struct.error:
            raise SharedMemoryError(f"{path} is too short") from None
        table = content[_TABLE_HEADER.size :]
        if (magic, stored, table_bytes) != (_TABLE_MAGIC, version, len(table)) or (
            xxhash.xxh3_64_intdigest(table) != digest
        ):
            raise SharedMemoryError(f"{path} is damaged")
        if ring_bytes == 0:
            return version, table, memoryview(b"")
        with open(self._ring_path(generation), "rb") as file:
            if os.fstat(file.fileno()).st_size != ring_bytes:
                raise SharedMemoryError(f"{self._ring_path(generation)} is damaged")
            rings = mmap.mmap(file.fileno(), ring_bytes, prot=mmap.PROT_READ)
        return version, table, memoryview(rings)

    def _recover(self) -> None:
        """Go on after a writer that died: forget its temporary files and learn the rings in force."""
        for path in self._directory.glob("*.tmp"):
            path.unlink(missing_ok=True)
        generations = [int(path.suffix[1:]) for path in self._directory.glob("rings.*")]
        self._ring_generation = max(generations, default=0)
        for path in self._directory.glob("table.*"):
            if int(path.suffix[1:]) > self.version:
                path.unlink(missing_ok=True)
        published = self.read() if self.version else None
        if published is not None and self._generation_of(published[0]) == self._ring_generation:
            self._ring_digest = xxhash.xxh3_128_digest(published[2])

    def _generation_of(self, version: int) -> int:
        with open(self._table_path(version), "rb") as file:
            return int(_TABLE_HEADER.unpack(file.read(_TABLE_HEADER.size))[2])

    def _remove_old(self, version: int) -> None:
        kept = set()
        for path in self._directory.glob("table.*"):
            number = int(path.suffix[1:])
            if number <= version - KEEP_VERSIONS:
                path.unlink(missing_ok=True)
            else:
                kept.add(self._generation_of(number))
        for path in self._directory.glob("rings.*"):
            if int(path.suffix[1:]) not in kept:
                path.unlink(missing_ok=True)
