"""The load that one replica reports: absolute values by target ordinal, and what changed lately."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from math import inf
from typing import NamedTuple

from twofold.v1 import router_pb2

MAX_ENTRIES = 65_536
MAX_ORDINAL = 1 << 20
MAX_PREFIXES = 4096
RECENT_TICKS = 64
_CACHED_MERGES = 8


class Row(NamedTuple):
    """One target's values, as LoadTick has them."""

    inflight: int
    decodes: int
    queued_prefill_tokens: float
    queued_prefill_s: float
    kv_tokens: float
    stored_tokens: float
    failures: int


_Values = tuple[int, int, float, float, float, float, int]
"""A Row as a plain tuple (0: requests in flight, 6: failures), which is what thousands a second are kept as."""
_COLUMNS = Row._fields


class LoadError(ValueError):
    """A tick that no router would send; ``field`` names the culprit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ReplicaLoad:
    """Rows of one replica's present stream.

    ``since`` answers a reader that has seen everything up to a serial: the last tick as it came, or one tick that
    merges all it missed, or all rows when it has seen nothing or missed too much. Memory is bounded by the number of
    targets.
    """

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self.serial = 0
        self.sequence = -1
        self.inflight = 0
        self._epoch = 0
        self._rows: dict[int, _Values] = {}
        self._recent: deque[tuple[router_pb2.LoadTick, tuple[int, ...]]] = deque(maxlen=RECENT_TICKS)
        self._encoded: OrderedDict[int, bytes] = OrderedDict()

    def apply(self, tick: router_pb2.LoadTick) -> list[tuple[int, int]]:
        """Take a tick of the present epoch; (ordinal, failures) where the failures changed. Raises LoadError.

        A tick that is not newer than the last one changes nothing.
        """
        count = len(tick.ordinals)
        if count > MAX_ENTRIES:
            raise LoadError("load.ordinals", f"more than {MAX_ENTRIES} values")
        if len(tick.prefixes) > MAX_PREFIXES:
            del tick.prefixes[MAX_PREFIXES:]
        columns = [getattr(tick, name) for name in _COLUMNS]
        for name, column in zip(_COLUMNS, columns, strict=True):
            if len(column) != count:
                raise LoadError(f"load.{name}", f"{len(column)} values for {count} ordinals")
        rows = list(zip(tick.ordinals, zip(*columns, strict=True), strict=True))
        for ordinal, (_, _, tokens, seconds, kv_tokens, stored, _) in rows:
            if ordinal >= MAX_ORDINAL:
                raise LoadError("load.ordinals", f"a value above {MAX_ORDINAL}")
            # Written so that it is false for NaN.
            if not (0.0 <= tokens < inf and 0.0 <= seconds < inf and 0.0 <= kv_tokens < inf and 0.0 <= stored < inf):
                raise LoadError("load", "a value that is negative or not finite")
        if tick.sequence <= self.sequence:
            return []
        if tick.epoch != self._epoch:
            self._rows, self._epoch, self.inflight = {}, tick.epoch, 0
            self._recent.clear()
        self.sequence = tick.sequence
        failures = []
        held = self._rows
        for ordinal, row in rows:
            before = held.get(ordinal, _NOTHING)
            held[ordinal] = row
            self.inflight += row[0] - before[0]
            if row[6] != before[6]:
                failures.append((ordinal, row[6]))
        self.serial += 1
        self._recent.append((tick, tuple([ordinal for ordinal, _ in rows])))
        self._encoded.clear()
        return failures

    def row(self, ordinal: int) -> Row:
        """Present values of a target; zeros where it reported none."""
        return Row._make(self._rows.get(ordinal, _NOTHING))

    def rows(self) -> Iterable[tuple[int, Row]]:
        """All rows."""
        return ((ordinal, Row._make(row)) for ordinal, row in self._rows.items())

    def keep_only(self, ordinals: set[int]) -> None:
        """Forget targets that are no more, so that their number can mean another one later."""
        for ordinal in [ordinal for ordinal in self._rows if ordinal not in ordinals]:
            self.inflight -= self._rows.pop(ordinal)[0]

    def since(self, serial: int) -> bytes:
        """Encoded ReportResponse with what a reader at ``serial`` (0: nothing) does not know yet.

        The same bytes for all readers at ``serial``. What several replicas have to say can be put together by joining
        the bytes: repeated fields of encoded messages add up.
        """
        encoded = self._encoded.get(serial)
        if encoded is None:
            missed = self.serial - serial
            full = serial == 0 or missed > len(self._recent)
            load = self._all() if full else self._recent[-1][0] if missed == 1 else self._merged(missed)
            peer = router_pb2.PeerLoad(replica_id=self.replica_id, load=load, full=full)
            encoded = router_pb2.ReportResponse(peers=(peer,)).SerializeToString()
            self._encoded[serial] = encoded
            while len(self._encoded) > _CACHED_MERGES:
                self._encoded.popitem(last=False)
        return encoded

    def _all(self) -> router_pb2.LoadTick:
        tick = self._tick_of(self._rows)
        if self._recent:
            tick.prefixes.extend(self._recent[-1][0].prefixes)
        return tick

    def _merged(self, missed: int) -> router_pb2.LoadTick:
        ticks = list(self._recent)[-missed:]
        merged = self._tick_of(sorted({ordinal for _, numbers in ticks for ordinal in numbers}))
        for tick, _ in reversed(ticks):
            room = MAX_PREFIXES - len(merged.prefixes)
            merged.prefixes.extend(tick.prefixes[:room])
        return merged

    def _tick_of(self, ordinals: Iterable[int]) -> router_pb2.LoadTick:
        """The present rows of some targets."""
        tick = router_pb2.LoadTick(epoch=self._epoch, sequence=max(0, self.sequence))
        rows = [(ordinal, self._rows[ordinal]) for ordinal in ordinals if ordinal in self._rows]
        tick.ordinals.extend(ordinal for ordinal, _ in rows)
        for index, name in enumerate(_COLUMNS):
            getattr(tick, name).extend(row[index] for _, row in rows)
        return tick


_NOTHING: _Values = (0, 0, 0.0, 0.0, 0.0, 0.0, 0)
