"""Load of this replica on its way up.

Values are absolute. What changed goes out with the next tick; figures that creep without being marked (tokens
of running streams) go out when they moved far enough, looked at once a second. The control plane keeps what every
replica reported and begins each stream with all of it, so nothing need be repeated; it is all the same, every 10 s.
"""

from collections.abc import Mapping, Sequence

import msgspec

from router.routing.accounts import AccountsReader, LoadRow
from router.routing.buffers import RelayRegions
from router.routing.dirty_log import DirtyReader
from router.routing.prefix_table import target_salt
from router.routing.sent_prefixes import SentPrefixReader
from twofold.model.fleet import FleetSnapshot, Target

MAX_SLOTS_PER_TICK = 2048
MAX_PREFIXES_PER_TICK = 128
TICKS_PER_REFRESH = 50
REFRESHES_PER_REPEAT = 10
KV_DRIFT_SHARE = 1 / 16
KV_DRIFT_TOKENS = 512.0
STORED_DRIFT_TOKENS = 4096.0
"""Smaller changes of a slot's tokens are not worth a row: a price moves by less than a thousandth."""

_NOTHING = LoadRow()


class SlotMap(msgspec.Struct, frozen=True, kw_only=True):
    """Slots, ordinals and targets of one snapshot, for translating between shared memory and the wire."""

    epoch: int = 0
    slot_of_ordinal: Mapping[int, int] = {}
    ordinal_of_slot: Mapping[int, int] = {}
    salt_of_slot: Mapping[int, int] = {}

    @classmethod
    def of(cls, snapshot: FleetSnapshot, slots: Mapping[str, int]) -> "SlotMap":
        """The map of ``snapshot`` under the slot assignment ``slots``; targets without a slot are left out."""
        placed: list[tuple[Target, int]] = [
            (target, slots[target.target_id]) for target in snapshot.targets if target.target_id in slots
        ]
        return cls(
            epoch=snapshot.epoch,
            slot_of_ordinal={target.ordinal: slot for target, slot in placed},
            ordinal_of_slot={slot: target.ordinal for target, slot in placed},
            salt_of_slot={slot: target_salt(target.target_id, target.incarnation) for target, slot in placed},
        )


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """What one load tick carries: rows by ordinal, and sent prefixes by ordinal."""

    rows: tuple[tuple[int, LoadRow], ...] = ()
    prefixes: tuple[tuple[int, Sequence[int]], ...] = ()


class LoadCollector:
    """Finds out what changed in the accounts of this replica's relays since the last tick."""

    def __init__(self, relays: Sequence[RelayRegions], sent: Sequence[memoryview]) -> None:
        self._accounts = AccountsReader(tuple(regions.accounts for regions in relays))
        self._dirty = [DirtyReader(regions.dirty) for regions in relays]
        self._sent = [SentPrefixReader(region) for region in sent]
        self._changed: dict[int, None] = {}
        self._last: dict[int, LoadRow] = {}
        self._refresh: list[int] = []
        self._ticks = 0
        self._first_sender = 0
        self._map = SlotMap()

    @property
    def pending(self) -> int:
        """Changed slots that did not fit into the last tick."""
        return len(self._changed)

    @property
    def overruns(self) -> tuple[int, int]:
        """How often changed slots, and sent prefixes, were missed because this lagged behind a relay."""
        return sum(reader.overruns for reader in self._dirty), sum(reader.overruns for reader in self._sent)

    def restart(self) -> None:
        """Begin a new stream: its reader knows nothing yet."""
        self._last.clear()
        self._changed = dict.fromkeys(range(self._accounts.slots))

    def collect(self, slots: SlotMap) -> Tick:
        """The next tick. Slots that are no target of ``slots`` are dropped."""
        if slots is not self._map:
            self._remap(slots)
        self._note_changes()
        rows = []
        taken = 0
        for slot in list(self._changed):
            if taken >= MAX_SLOTS_PER_TICK:
                break
            del self._changed[slot]
            ordinal = slots.ordinal_of_slot.get(slot)
            if ordinal is None:
                self._last.pop(slot, None)
                continue
            row = self._accounts.row(slot)
            if row != self._last.get(slot, _NOTHING):
                self._last[slot] = row
                rows.append((ordinal, row))
                taken += 1
        rows.extend(self._refreshed(slots, {ordinal for ordinal, _ in rows}))
        return Tick(rows=tuple(rows), prefixes=tuple(self._prefixes(slots)))

    def _remap(self, slots: SlotMap) -> None:
        """Ordinals changed: what was told under the old ones is void."""
        before, self._map = self._map, slots
        if slots.epoch != before.epoch:
            self.restart()
            return
        for slot, ordinal in slots.ordinal_of_slot.items():
            if before.ordinal_of_slot.get(slot) != ordinal:
                self._last.pop(slot, None)
                self._changed[slot] = None

    def _note_changes(self) -> None:
        for reader in self._dirty:
            while reader.pending:
                changed = reader.take(MAX_SLOTS_PER_TICK)
                if changed is None:
                    self._changed = dict.fromkeys(range(self._accounts.slots))
                    break
                self._changed.update(dict.fromkeys(changed))

    def _refreshed(self, slots: SlotMap, sent: set[int]) -> list[tuple[int, LoadRow]]:
        turn = self._ticks % TICKS_PER_REFRESH
        if turn == 0:
            self._refresh = list(slots.ordinal_of_slot)
        batch = self._refresh[turn::TICKS_PER_REFRESH]
        repeat = self._ticks // TICKS_PER_REFRESH % REFRESHES_PER_REPEAT == REFRESHES_PER_REPEAT - 1
        self._ticks += 1
        rows = []
        for slot in batch:
            ordinal = slots.ordinal_of_slot.get(slot)
            if ordinal is None or ordinal in sent:
                continue
            row = self._accounts.row(slot)
            last = self._last.get(slot, _NOTHING)
            if _drifted(last, row) or (repeat and (row.inflight or row.failures)):
                self._last[slot] = row
                rows.append((ordinal, row))
        return rows

    def _prefixes(self, slots: SlotMap) -> list[tuple[int, Sequence[int]]]:
        prefixes: list[tuple[int, Sequence[int]]] = []
        count = len(self._sent)
        for turn in range(count):
            reader = self._sent[(self._first_sender + turn) % count]
            for slot, hashes in reader.drain(MAX_PREFIXES_PER_TICK - len(prefixes)):
                ordinal = slots.ordinal_of_slot.get(slot)
                if ordinal is not None:
                    prefixes.append((ordinal, hashes))
            if len(prefixes) >= MAX_PREFIXES_PER_TICK:
                break
        self._first_sender += 1
        return prefixes


def _drifted(told: LoadRow, row: LoadRow) -> bool:
    """Whether ``row`` differs from what was told by so much that others should know."""
    if told == row:
        return False
    return (
        abs(row.kv_tokens - told.kv_tokens) > max(KV_DRIFT_TOKENS, KV_DRIFT_SHARE * told.kv_tokens)
        or abs(row.stored_tokens - told.stored_tokens) > STORED_DRIFT_TOKENS
        or _exact(row) != _exact(told)
    )


def _exact(row: LoadRow) -> tuple[float, ...]:
    return row.inflight, row.decodes, row.queued_prefill_tokens, row.queued_prefill_s, row.failures
