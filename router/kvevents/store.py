"""Index files in a replica's shared memory: the agent makes them, relays map the newest one."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from router.kvevents.index_writer import KvIndexWriter
from router.routing.kv_index import buckets_for, index_bytes
from router.shm.files import SharedMemoryError, create_mapped, open_mapped
from router.shm.kv_file import index_path


class IndexStore:
    """Makes the index of one replica, and larger ones as it fills up to ``max_blocks`` entries."""

    def __init__(
        self, directory: Path, slots: int, max_blocks: int, *, nonce: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._directory = directory
        self._slots = slots
        self._max_buckets = buckets_for(max_blocks)
        self._nonce = nonce

    def create(self, blocks: int) -> KvIndexWriter:
        """A new, empty index for about ``blocks`` entries; it takes the place of whatever index there was.
        Raises SharedMemoryError."""
        self._supersede_file()
        writer = self._make(min(buckets_for(max(blocks, 1)), self._max_buckets))
        self._publish()
        return writer

    def grow(self, old: KvIndexWriter) -> KvIndexWriter | None:
        """An index of twice the size with the content of ``old``; None at the limit or without room."""
        buckets = 2 * old.buckets
        if buckets > self._max_buckets:
            return None
        try:
            writer = self._make(buckets)
        except SharedMemoryError:
            return None
        writer.apply(old.export())
        for slot in range(self._slots):
            writer.set_view(slot, *old.view(slot))
        self._publish()
        old.supersede()
        return writer

    def remove(self) -> None:
        """Take the index away: readers have none from then on."""
        self._supersede_file()
        index_path(self._directory).unlink(missing_ok=True)

    def _make(self, buckets: int) -> KvIndexWriter:
        path = self._partial
        path.unlink(missing_ok=True)
        mapped = create_mapped(path, index_bytes(self._slots, buckets))
        return KvIndexWriter(memoryview(mapped), self._slots, buckets, nonce=self._nonce())

    def _publish(self) -> None:
        os.replace(self._partial, index_path(self._directory))

    def _supersede_file(self) -> None:
        """An earlier agent's index: its readers are to let go of it."""
        try:
            mapped = open_mapped(index_path(self._directory), writable=True)
        except SharedMemoryError:
            return
        KvIndexWriter.supersede_region(memoryview(mapped))

    @property
    def _partial(self) -> Path:
        path = index_path(self._directory)
        return path.with_name(path.name + ".new")
