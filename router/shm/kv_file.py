"""A relay's hold on the index of cached blocks that its agent keeps; see ``router.routing.kv_index``."""

import os
from pathlib import Path

from router.routing.kv_index import KvIndexError, KvIndexReader
from router.shm.files import SharedMemoryError, open_mapped

MAX_AGE_S = 2.0
"""An index whose writer gave no sign of life for so long is not believed any more."""


def index_path(directory: Path) -> Path:
    """Where the index of the replica in ``directory`` lies."""
    return directory / "kv.index"


class KvIndexFile:
    """Maps the newest index and lets go of one that is superseded or has aged. ``reader`` is None without one."""

    def __init__(self, directory: Path) -> None:
        self._path = index_path(directory)
        self._file: tuple[int, int] | None = None
        self._mapped: KvIndexReader | None = None
        self.reader: KvIndexReader | None = None

    def refresh(self, now_s: float) -> None:
        """To be called a few times a second. ``now_s``: CLOCK_MONOTONIC."""
        mapped = self._mapped
        if mapped is None or mapped.superseded:
            mapped = self._map()
        alive = mapped is not None and not mapped.superseded and now_s - mapped.beat_s <= MAX_AGE_S
        self.reader = mapped if alive else None

    def _map(self) -> KvIndexReader | None:
        try:
            info = os.stat(self._path)
        except OSError:
            self._file = self._mapped = None
            return None
        if self._file == (info.st_dev, info.st_ino):
            return self._mapped
        try:
            self._mapped = KvIndexReader(memoryview(open_mapped(self._path, writable=False)))
        except (SharedMemoryError, KvIndexError):
            self._mapped = None
        self._file = (info.st_dev, info.st_ino)
        return self._mapped
