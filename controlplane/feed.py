"""The stream of snapshots: history, coalescing, and one encoding for all readers."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable

from twofold import wire
from twofold.model.fleet import FleetSnapshot
from twofold.runtime.monitor import WindowMax
from twofold.v1 import fleet_pb2

HISTORY = 256
KEEPALIVE_S = 5.0


class SnapshotFeed:
    """Publishes snapshots of one epoch to any number of readers.

    A reader is at a version; it is sent what leads from there to the present one, so a slow reader gets one delta for
    all it missed. The delta between two versions is computed and encoded once, whoever asks for it.
    """

    def __init__(self, *, history: int = HISTORY) -> None:
        self._history: OrderedDict[int, FleetSnapshot] = OrderedDict()
        self._limit = history
        self._deltas: dict[int, bytes] = {}
        self._full: bytes | None = None
        self._changed = asyncio.Event()
        self._current: FleetSnapshot | None = None
        self.encode_s = 0.0
        self.encode_max = WindowMax()
        self.merged = 0
        """Versions that a reader was not sent by themselves, because it was sent a later one."""
        self.readers = 0
        self.snapshot_bytes = 0
        self.deltas_sent = 0
        self.snapshots_sent = 0

    @property
    def kept(self) -> int:
        """Snapshots kept for deltas."""
        return len(self._history)

    @property
    def current(self) -> FleetSnapshot | None:
        """The snapshot published last."""
        return self._current

    def publish(self, snapshot: FleetSnapshot) -> None:
        """Make ``snapshot`` the present one and wake the readers."""
        if self._current is not None and snapshot.version == self._current.version:
            return
        self._current = snapshot
        self._history[snapshot.version] = snapshot
        while len(self._history) > self._limit:
            self._history.popitem(last=False)
        self._deltas = {}
        self._full = None
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self, epoch: int, version: int, *, keepalive_s: float = KEEPALIVE_S) -> AsyncGenerator[bytes, None]:
        """Encoded WatchResponse messages for a reader at (epoch, version); (0, 0) is a reader that has nothing.

        The first comes at once when there is a snapshot, so that a reader that comes back knows it is up to date.
        """
        current = self._current
        at = version if current is not None and epoch == current.epoch else -1
        self.readers += 1
        try:
            if current is not None and at == current.version:
                yield _KEEPALIVE
            while True:
                changed = self._changed
                current = self._current
                if current is not None and at != current.version:
                    yield self._from(at, current)
                    at = current.version
                    continue
                try:
                    async with asyncio.timeout(keepalive_s):
                        await changed.wait()
                except TimeoutError:
                    yield _KEEPALIVE
        finally:
            self.readers -= 1

    def _from(self, at: int, current: FleetSnapshot) -> bytes:
        base = self._history.get(at)
        if base is None:
            self.snapshots_sent += 1
            if self._full is None:
                self._full = self._encode(lambda: fleet_pb2.WatchResponse(snapshot=wire.snapshot_to_proto(current)))
                self.snapshot_bytes = len(self._full)
            return self._full
        self.deltas_sent += 1
        self.merged += current.version - at - 1
        encoded = self._deltas.get(at)
        if encoded is None:
            encoded = self._encode(lambda: fleet_pb2.WatchResponse(delta=wire.diff(base, current)))
            self._deltas[at] = encoded
        return encoded

    def _encode(self, make: Callable[[], fleet_pb2.WatchResponse]) -> bytes:
        begun_s = time.monotonic()
        encoded = make().SerializeToString()
        now_s = time.monotonic()
        self.encode_s += now_s - begun_s
        self.encode_max.add(now_s - begun_s, now_s)
        return encoded


_KEEPALIVE = fleet_pb2.WatchResponse().SerializeToString()
