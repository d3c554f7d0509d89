"""Load of this replica on its way up, and load of the other replicas on its way down into shared memory.

Values are absolute, so a tick that is lost, repeated or coalesced does no harm. What changed goes out with the next
tick; besides, every slot with load goes out once a second, so that a replica that joined later learns of it.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from router.routing.accounts import AccountsReader, AccountsWriter, LoadRow
from router.routing.buffers import RelayRegions
from router.routing.dirty_log import DirtyLog, DirtyReader
from router.routing.prefix import split_broadcast
from router.routing.prefix_table import PrefixWriter, target_salt
from router.routing.sent_prefixes import SentPrefixReader
from twofold.model.fleet import FleetSnapshot, Target

MAX_SLOTS_PER_TICK = 2048
MAX_PREFIXES_PER_TICK = 128
MAX_PEERS = 1024
TICKS_PER_REFRESH = 50
FULL_REPORT_S = 2.0
"""Within this time a replica that was just heard of has reported every slot it has load on."""

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
        self._first_sender = 0

    @property
    def pending(self) -> int:
        """Changed slots that did not fit into the last tick."""
        return len(self._changed)

    def restart(self) -> None:
        """Begin a new stream: its reader knows nothing yet."""
        self._last.clear()
        self._changed = dict.fromkeys(range(self._accounts.slots))

    def collect(self, slots: SlotMap) -> Tick:
        """The next tick. Slots that are no target of ``slots`` are dropped."""
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

    def _note_changes(self) -> None:
        for reader in self._dirty:
            while reader.pending:
                changed = reader.take(MAX_SLOTS_PER_TICK)
                if changed is None:
                    self._changed = dict.fromkeys(range(self._accounts.slots))
                    break
                self._changed.update(dict.fromkeys(changed))

    def _refreshed(self, slots: SlotMap, sent: set[int]) -> list[tuple[int, LoadRow]]:
        if not self._refresh:
            self._refresh = list(slots.ordinal_of_slot)
        share = -(-len(slots.ordinal_of_slot) // TICKS_PER_REFRESH)
        batch, self._refresh = self._refresh[:share], self._refresh[share:]
        rows = []
        for slot in batch:
            ordinal = slots.ordinal_of_slot.get(slot)
            if ordinal is None or ordinal in sent:
                continue
            row = self._accounts.row(slot)
            if row != _NOTHING or slot in self._last:
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


class _Peer:
    """What one other replica said last."""

    __slots__ = ("first_s", "rows", "seen_s")

    def __init__(self, now_s: float) -> None:
        self.rows: dict[int, LoadRow] = {}
        self.first_s = now_s
        self.seen_s = now_s

    def stored_since(self, slot: int, row: LoadRow, now_s: float) -> float:
        """Tokens it put on the target since its last report of it."""
        before = self.rows.get(slot)
        if before is None:
            # What a replica stored before it was heard of is history; a slot it first uses later is news.
            return row.stored_tokens if now_s - self.first_s > FULL_REPORT_S else 0.0
        gain = row.stored_tokens - before.stored_tokens
        return gain if gain >= 0.0 else row.stored_tokens  # it started again and counts from zero


class RemoteLoad:
    """Writes the sum over the other replicas into the remote region, and the prefixes they sent into its table.

    ``stored_tokens`` is a clock for the ageing of caches: it counts what other replicas stored since they were heard
    of, and neither jumps nor goes back when replicas or this agent come and go.
    """

    def __init__(self, remote: RelayRegions, relays: Sequence[RelayRegions], *, peer_timeout_s: float) -> None:
        self._writer = AccountsWriter(remote.accounts, DirtyLog(remote.dirty))
        self._prefixes = PrefixWriter(remote.prefixes)
        self._all = AccountsReader((remote.accounts, *(regions.accounts for regions in relays)))
        self._remote = AccountsReader((remote.accounts,))
        self._peer_timeout_s = peer_timeout_s
        self._peers: dict[str, _Peer] = {}
        self._stored: dict[int, float] = {}
        self.dropped_ticks = 0

    @property
    def peers(self) -> Mapping[str, float]:
        """Replicas heard of, and when last (CLOCK_MONOTONIC)."""
        return {name: peer.seen_s for name, peer in self._peers.items()}

    def recover(self, now_s: float) -> None:
        """Begin after an earlier agent: its peers' work is unknown until they report; what they stored stays."""
        for slot in range(self._remote.slots):
            row = self._remote.row(slot)
            if row != _NOTHING:
                self._stored[slot] = row.stored_tokens
                self._write(slot, now_s)

    def receive(self, replica_id: str, epoch: int, tick: Tick, slots: SlotMap, now_s: float) -> None:
        """Take in a tick of another replica. Ticks of another epoch and unknown ordinals are dropped."""
        if epoch != slots.epoch:
            self.dropped_ticks += 1
            return
        peer = self._peers.get(replica_id)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                self.dropped_ticks += 1
                return
            peer = self._peers[replica_id] = _Peer(now_s)
        peer.seen_s = now_s
        for ordinal, row in tick.rows:
            slot = slots.slot_of_ordinal.get(ordinal)
            if slot is None:
                continue
            self._stored[slot] = self._stored.get(slot, 0.0) + peer.stored_since(slot, row, now_s)
            peer.rows[slot] = row
            self._write(slot, now_s)
        self._insert_prefixes(tick.prefixes, slots, now_s)

    def forget_peer(self, replica_id: str, now_s: float) -> None:
        """A replica left: its work is gone, what it stored stays."""
        peer = self._peers.pop(replica_id, None)
        if peer is None:
            return
        for slot in peer.rows:
            self._write(slot, now_s)

    def expire(self, now_s: float) -> list[str]:
        """Forget replicas that are silent; returns their names."""
        silent = [name for name, peer in self._peers.items() if now_s - peer.seen_s > self._peer_timeout_s]
        for name in silent:
            self.forget_peer(name, now_s)
        return silent

    def clear_slots(self, slots: Iterable[int], now_s: float) -> None:
        """Slots that belong to another target now: nothing is known of them."""
        for slot in slots:
            self._stored.pop(slot, None)
            for peer in self._peers.values():
                peer.rows.pop(slot, None)
            self._write(slot, now_s)

    def _write(self, slot: int, now_s: float) -> None:
        inflight = decodes = failures = 0
        queued_tokens = queued_s = kv_tokens = 0.0
        for peer in self._peers.values():
            row = peer.rows.get(slot)
            if row is None:
                continue
            inflight += row.inflight
            decodes += row.decodes
            failures += row.failures
            queued_tokens += row.queued_prefill_tokens
            queued_s += row.queued_prefill_s
            kv_tokens += row.kv_tokens
        total = LoadRow(
            inflight=inflight,
            decodes=decodes,
            queued_prefill_tokens=queued_tokens,
            queued_prefill_s=queued_s,
            kv_tokens=kv_tokens,
            stored_tokens=self._stored.get(slot, 0.0),
            failures=failures,
        )
        self._writer.set_remote(slot, total, now_s)

    def _insert_prefixes(self, prefixes: Iterable[tuple[int, Sequence[int]]], slots: SlotMap, now_s: float) -> None:
        for ordinal, told in prefixes:
            slot = slots.slot_of_ordinal.get(ordinal)
            parts = split_broadcast(told)
            if slot is None or parts is None:
                continue
            hashes, deepest = parts
            stored = self._all.load(slot).stored_tokens
            self._prefixes.insert(slots.salt_of_slot[slot], hashes, deepest, stored, now_s)
