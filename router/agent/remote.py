"""Load of the other replicas on its way down into shared memory.

Each peer's rows are kept by ordinal, whether or not this replica knows the target yet; the sums by slot follow every
row by its difference, so that a row costs the same whatever the number of peers. A new table sums up anew.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from router.agent.load import SlotMap
from router.routing.accounts import AccountsReader, AccountsWriter, LoadRow
from router.routing.buffers import RelayRegions
from router.routing.dirty_log import DirtyLog
from router.routing.prefix import split_broadcast
from router.routing.prefix_table import PrefixWriter

MAX_PEERS = 1024
MAX_ROWS_PER_PEER = 65_536
FULL_REPORT_S = 2.0
"""Within this time a replica that was just heard of has reported every slot it has load on."""
SILENT_KEPT_S = 60.0
"""A silent replica's rows are kept for so long, not counted, in case it is only the line that was slow."""

Row = tuple[int, int, float, float, float, float, int]
"""Figures of one target in the order of LoadTick: inflight, decodes, queued prefill tokens, queued prefill seconds, KV
tokens, stored tokens, failures. Plain tuples: an agent takes in thousands of them a second."""
_NOTHING: Row = (0, 0, 0.0, 0.0, 0.0, 0.0, 0)
_STORED = 5
_EMPTY = LoadRow()


class News(NamedTuple):
    """What another replica says: rows by ordinal, and sent prefixes by ordinal."""

    rows: Sequence[tuple[int, Row]] = ()
    prefixes: Sequence[tuple[int, Sequence[int]]] = ()


class _Peer:
    """What one other replica said last."""

    __slots__ = ("epoch", "first_s", "rows", "seen_s", "silent", "stored")

    def __init__(self, now_s: float) -> None:
        self.epoch = 0
        self.rows: dict[int, Row] = {}
        """By ordinal of ``epoch``."""
        self.stored: dict[int, float] = {}
        """Its own stored-tokens clock by slot, as far as it was counted."""
        self.first_s = now_s
        self.seen_s = now_s
        self.silent = False

    def stored_gain(self, slot: int, stored_tokens: float, now_s: float) -> float:
        """Tokens it put on the target since its last report of it."""
        before = self.stored.get(slot)
        self.stored[slot] = stored_tokens
        if before is None:
            # What a replica stored before it was heard of is history; a slot it first uses later is news.
            return stored_tokens if now_s - self.first_s > FULL_REPORT_S else 0.0
        gain = stored_tokens - before
        return gain if gain >= 0.0 else stored_tokens  # it started again and counts from zero


class _Sum:
    """Sum over the counted peers for one slot."""

    __slots__ = ("decodes", "failures", "inflight", "kv_tokens", "queued_s", "queued_tokens")

    def __init__(self) -> None:
        self.inflight = self.decodes = self.failures = 0
        self.queued_tokens = self.queued_s = self.kv_tokens = 0.0

    def change(self, before: Row, row: Row) -> None:
        """One peer's row was ``before`` and is ``row``."""
        inflight, decodes, queued_tokens, queued_s, kv_tokens, _, failures = row
        if before is not _NOTHING:
            inflight0, decodes0, queued_tokens0, queued_s0, kv_tokens0, _, failures0 = before
            inflight -= inflight0
            decodes -= decodes0
            queued_tokens -= queued_tokens0
            queued_s -= queued_s0
            kv_tokens -= kv_tokens0
            failures -= failures0
        self.inflight += inflight
        self.decodes += decodes
        self.queued_tokens += queued_tokens
        self.queued_s += queued_s
        self.kv_tokens += kv_tokens
        self.failures += failures

    def row(self, stored_tokens: float) -> LoadRow:
        """As a row. Rounding of figures that are no multiples of a quantum must not make an amount negative."""
        queued_tokens, queued_s, kv_tokens = self.queued_tokens, self.queued_s, self.kv_tokens
        return LoadRow(
            inflight=self.inflight,
            decodes=self.decodes,
            queued_prefill_tokens=max(0.0, queued_tokens),
            queued_prefill_s=max(0.0, queued_s),
            kv_tokens=max(0.0, kv_tokens),
            stored_tokens=stored_tokens,
            failures=self.failures,
        )


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
        self._sums: dict[int, _Sum] = {}
        self._stored: dict[int, float] = {}
        self._map = SlotMap()
        self.dropped_ticks = 0

    @property
    def peers(self) -> Mapping[str, float]:
        """Replicas that are counted, and when they were last heard of (CLOCK_MONOTONIC)."""
        return {name: peer.seen_s for name, peer in self._peers.items() if not peer.silent}

    @property
    def prefix_evictions(self) -> int:
        """Entries of the table of remote prefixes that made room for others."""
        return self._prefixes.evictions

    def recover(self, now_s: float) -> None:
        """Begin after an earlier agent: its peers' work is unknown until they report; what they stored stays."""
        for slot in range(self._remote.slots):
            row = self._remote.row(slot)
            if row != _EMPTY:
                self._stored[slot] = row.stored_tokens
                self._write(slot, now_s)

    def receive(
        self, replica_id: str, epoch: int, news: News, slots: SlotMap, now_s: float, *, full: bool = False
    ) -> None:
        """Take in what another replica says. ``full``: it has no rows but these.

        Rows of another epoch than that of ``slots``, and of ordinals that are not in it, wait for a map that has them.
        """
        if slots is not self._map:
            self.place(slots, frozenset(), now_s)
        peer = self._peers.get(replica_id)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                self.dropped_ticks += 1
                return
            peer = self._peers[replica_id] = _Peer(now_s)
        peer.seen_s = now_s
        if peer.silent:
            self._set_silent(peer, False, now_s)
        if epoch != peer.epoch:
            self._drop_rows(peer, list(peer.rows), now_s)
            peer.epoch = epoch
        if full and peer.rows:
            named = {ordinal for ordinal, _ in news.rows}
            self._drop_rows(peer, [ordinal for ordinal in peer.rows if ordinal not in named], now_s)
        self._take_rows(peer, news.rows, now_s)
        if epoch == slots.epoch:
            self._insert_prefixes(news.prefixes, slots, now_s)

    def _take_rows(self, peer: _Peer, rows: Iterable[tuple[int, Row]], now_s: float) -> None:
        held, stored = peer.rows, self._stored
        slot_of = self._map.slot_of_ordinal if peer.epoch == self._map.epoch else {}
        for ordinal, row in rows:
            before = held.get(ordinal, _NOTHING)
            if before is _NOTHING and len(held) >= MAX_ROWS_PER_PEER:
                continue
            held[ordinal] = row
            slot = slot_of.get(ordinal)
            if slot is not None:
                stored[slot] = stored.get(slot, 0.0) + peer.stored_gain(slot, row[_STORED], now_s)
                self._change(slot, before, row, now_s)

    def _drop_rows(self, peer: _Peer, ordinals: Iterable[int], now_s: float) -> None:
        slot_of = self._map.slot_of_ordinal if self._counts(peer) else {}
        for ordinal in ordinals:
            before = peer.rows.pop(ordinal)
            slot = slot_of.get(ordinal)
            if slot is not None:
                self._change(slot, before, _NOTHING, now_s)

    def _counts(self, peer: _Peer) -> bool:
        return not peer.silent and peer.epoch == self._map.epoch

    def _change(self, slot: int, before: Row, row: Row, now_s: float) -> None:
        total = self._sums.get(slot)
        if total is None:
            total = self._sums[slot] = _Sum()
        total.change(before, row)
        self._writer.set_remote(slot, total.row(self._stored.get(slot, 0.0)), now_s)

    def forget_peer(self, replica_id: str, now_s: float) -> None:
        """A replica left: its work is gone, what it stored stays."""
        peer = self._peers.pop(replica_id, None)
        if peer is not None:
            self._drop_rows(peer, list(peer.rows), now_s)

    def expire(self, now_s: float) -> list[str]:
        """No longer count replicas that are silent; returns their names. They count again when they are heard of."""
        silent = []
        for name, peer in list(self._peers.items()):
            silent_s = now_s - peer.seen_s
            if peer.silent and silent_s > SILENT_KEPT_S:
                del self._peers[name]
            elif not peer.silent and silent_s > self._peer_timeout_s:
                self._set_silent(peer, True, now_s)
                silent.append(name)
        return silent

    def _set_silent(self, peer: _Peer, silent: bool, now_s: float) -> None:
        peer.silent = silent
        if peer.epoch != self._map.epoch:
            return
        for ordinal, row in peer.rows.items():
            slot = self._map.slot_of_ordinal.get(ordinal)
            if slot is not None:
                self._change(slot, *((row, _NOTHING) if silent else (_NOTHING, row)), now_s)

    def place(self, slots: SlotMap, fresh: Collection[int], now_s: float) -> None:
        """Another table is in force. Slots in ``fresh`` belong to another target than before: start from nothing."""
        before, self._map = self._map, slots
        for slot in fresh:
            self._forget_stored(slot)
        if before.epoch == slots.epoch:
            moved = [
                ordinal
                for ordinal, slot in before.slot_of_ordinal.items()
                if slot in fresh or slots.slot_of_ordinal.get(ordinal) != slot
            ]
            for peer in self._peers.values():
                if peer.epoch == slots.epoch:
                    for ordinal in moved:
                        peer.rows.pop(ordinal, None)
        self._sum_up(fresh, now_s)

    def clear_slots(self, slots: Iterable[int], now_s: float) -> None:
        """Forget everything about some slots."""
        for slot in slots:
            self._forget_stored(slot)
            self._sums.pop(slot, None)
            ordinal = self._map.ordinal_of_slot.get(slot)
            for peer in self._peers.values():
                if ordinal is not None and peer.epoch == self._map.epoch:
                    peer.rows.pop(ordinal, None)
            self._write(slot, now_s)

    def _forget_stored(self, slot: int) -> None:
        self._stored.pop(slot, None)
        for peer in self._peers.values():
            peer.stored.pop(slot, None)

    def _sum_up(self, fresh: Iterable[int], now_s: float) -> None:
        before, self._sums = self._sums, {}
        for peer in self._peers.values():
            if peer.epoch != self._map.epoch:
                continue
            for ordinal, row in peer.rows.items():
                slot = self._map.slot_of_ordinal.get(ordinal)
                if slot is None:
                    continue
                if slot not in peer.stored:
                    self._stored[slot] = self._stored.get(slot, 0.0) + peer.stored_gain(slot, row[_STORED], now_s)
                if not peer.silent:
                    self._sums.setdefault(slot, _Sum()).change(_NOTHING, row)
        for slot in {*fresh, *before, *self._sums}:
            if slot < self._remote.slots:
                self._write(slot, now_s)

    def _write(self, slot: int, now_s: float) -> None:
        total = self._sums.get(slot, _NO_SUM)
        row = total.row(self._stored.get(slot, 0.0))
        if row != self._remote.row(slot):
            self._writer.set_remote(slot, row, now_s)

    def _insert_prefixes(self, prefixes: Iterable[tuple[int, Sequence[int]]], slots: SlotMap, now_s: float) -> None:
        for ordinal, told in prefixes:
            slot = slots.slot_of_ordinal.get(ordinal)
            parts = split_broadcast(told)
            if slot is None or parts is None:
                continue
            hashes, deepest = parts
            stored = self._all.load(slot).stored_tokens
            self._prefixes.insert(slots.salt_of_slot[slot], hashes, deepest, stored, now_s)


_NO_SUM = _Sum()
