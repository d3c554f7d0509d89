"""The writer of the index of cached blocks: counts copies per block and target, remembers who stored a block last.

A batch of changes of any number of targets is applied by a fixed number of numpy calls. Readers see its sum; what an
engine did to one block between two looks at its socket is of no interest to them.
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np

from router.kvevents.table import I64, U64, KeyTable, nonzero_keys
from router.routing.kv_index import (
    BEAT_OFFSET,
    BUCKET_BYTES,
    HEADER,
    HEADER_BYTES,
    HOLES,
    MAGIC,
    NO_SLOT,
    SLOT_ROW,
    SUPERSEDED_OFFSET,
    WAYS,
    ViewState,
    capacity_blocks,
    index_bytes,
    slot_rows_bytes,
)

PRIVATE_BYTES_PER_WAY = 8 + 4 + 2 + 2
"""Predecessor, successors, copies and owner of a block, in the agent's own memory."""
REPAIRS_PER_BATCH = 64
"""Blocks whose last storer dropped them while others hold them, for which another holder is looked up at most."""
_MAX_COPIES = 0xFFFF
_BEAT = Struct("<d")
_STATE = 0xFF


class Batch(NamedTuple):
    """Changes in the order in which they happened: slot, block hash, hash of the block before it (0: none, or a
    removal), copies stored (positive) or dropped (negative)."""

    slots: I64
    hashes: U64
    parents: U64
    deltas: I64


class Changes:
    """Collects a Batch from events."""

    __slots__ = ("deltas", "hashes", "parents", "slots")

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.hashes: list[int] = []
        self.parents: list[int] = []
        self.deltas: list[int] = []

    def __len__(self) -> int:
        return len(self.hashes)

    def stored(self, slot: int, hashes: Sequence[int], parent: int | None) -> None:
        """The target at ``slot`` stored a run of blocks of one chain behind ``parent``."""
        count = len(hashes)
        self.slots += [slot] * count
        self.hashes += hashes
        self.parents.append(parent or 0)
        self.parents += hashes[:-1]
        self.deltas += [1] * count

    def removed(self, slot: int, hashes: Sequence[int]) -> None:
        """The target at ``slot`` dropped one copy of each of these blocks."""
        count = len(hashes)
        self.slots += [slot] * count
        self.hashes += hashes
        self.parents += [0] * count
        self.deltas += [-1] * count

    def batch(self) -> Batch:
        """What was collected."""
        return Batch(
            np.array(self.slots, np.int64),
            np.array(self.hashes, np.uint64),
            np.array(self.parents, np.uint64),
            np.array(self.deltas, np.int64),
        )


class _Groups(NamedTuple):
    """A batch by (block, target): one row a group."""

    keys: U64
    hashes: U64
    slots: I64
    net: I64
    """Sum of the changes."""
    lowest: I64
    """Smallest running sum."""
    stored_at: I64
    """Index in the batch of the last store, -1 where there is none."""


class KvIndexWriter:
    """Writes an index into ``region`` (zeroed, at least ``index_bytes(slots, buckets)`` long). ``nonce`` makes the
    salts of the slots differ from those of other indices."""

    def __init__(self, region: memoryview, slots: int, buckets: int, *, nonce: int = 0) -> None:
        if len(region) < index_bytes(slots, buckets):
            raise ValueError("the region is too small for the index")
        self._region = region
        self._nonce = nonce
        self.slots = slots
        self.buckets = buckets
        ways = buckets * WAYS
        presence = HEADER_BYTES + slot_rows_bytes(slots)
        storers = presence + buckets * BUCKET_BYTES
        packed = np.frombuffer(region, np.uint16, 2 * ways, storers + buckets * BUCKET_BYTES).reshape(ways, 2)
        self._storer_slot, self._holders = packed[:, 0], packed[:, 1]
        self._parent = np.zeros(ways, np.uint64)
        self._children = np.zeros(ways, np.uint32)
        self._copies = np.zeros(ways, np.uint16)
        self._owner = np.zeros(ways, np.uint16)
        """Slot + 1."""
        private = (self._parent, self._children, self._copies, self._owner)
        self._presence = KeyTable(np.frombuffer(region, np.uint64, ways, presence), private)
        self._storers = KeyTable(np.frombuffer(region, np.uint64, ways, storers), (packed,))
        self._salts = np.zeros(slots, np.uint64)
        self._generations = [0] * slots
        self._holes = np.zeros(slots, np.int64)
        """Blocks listed whose predecessor is not, by slot."""
        self._overflowed: set[int] = set()
        self.unknown_removals = 0
        """Removals of blocks that were not listed: to be expected of partial views only."""
        for slot in range(slots):
            self._new_salt(slot)
        HEADER.pack_into(region, 0, MAGIC, 0, slots, HEADER_BYTES, buckets, 0.0)

    @property
    def blocks(self) -> int:
        """Entries: (block, target) pairs listed."""
        return self._presence.count

    @property
    def distinct_blocks(self) -> int:
        """Different blocks listed."""
        return self._storers.count

    @property
    def capacity(self) -> int:
        """Entries that the index is meant to hold at most."""
        return capacity_blocks(self.buckets)

    @property
    def holes(self) -> int:
        """Blocks listed whose predecessor is not, over all slots."""
        return int(self._holes.sum())

    def supersede(self) -> None:
        """Tell the readers that another index is in force."""
        self.supersede_region(self._region)

    @staticmethod
    def supersede_region(region: memoryview) -> None:
        """``supersede`` for an index that another process wrote."""
        region[SUPERSEDED_OFFSET] = 1

    def beat(self, now_s: float) -> None:
        """Give a sign of life. ``now_s`` is CLOCK_MONOTONIC."""
        _BEAT.pack_into(self._region, BEAT_OFFSET, now_s)

    def set_view(self, slot: int, state: ViewState, block_tokens: int = 0) -> None:
        """What readers may make of ``slot`` from now on."""
        self._write_row(slot, state, block_tokens)

    def view(self, slot: int) -> tuple[ViewState, int]:
        """What ``set_view`` said last."""
        _, state, block_tokens = SLOT_ROW.unpack_from(self._region, HEADER_BYTES + slot * SLOT_ROW.size)
        return ViewState(state & _STATE), block_tokens

    def clear(self, slot: int) -> int:
        """Forget all blocks of the target at ``slot``; its view stays what it was. Returns how many there were."""
        mine = np.flatnonzero(self._owner == slot + 1)
        hashes = nonzero_keys(self._presence.keys[mine] ^ self._salts[slot])
        # With another salt, readers lose sight of all entries at once.
        self._new_salt(slot)
        self._holes[slot] = 0
        self._write_row(slot, *self.view(slot))
        self._erase(mine)
        self._drop_holders(hashes, np.full(len(mine), slot, np.int64))
        return len(mine)

    def take_overflowed(self) -> set[int]:
        """Slots whose blocks found no room since the last call: their views are wrong until cleared."""
        taken, self._overflowed = self._overflowed, set()
        return taken

    def blocks_of(self, slot: int) -> dict[int, int]:
        """Every block listed for ``slot`` and its copies, for tests and inspection."""
        mine = np.flatnonzero(self._owner == slot + 1)
        hashes = self._presence.keys[mine] ^ self._salts[slot]
        return dict(zip(hashes.tolist(), self._copies[mine].tolist(), strict=True))

    def export(self) -> Batch:
        """All entries, as changes that lead to them: to move to a larger index."""
        live = np.flatnonzero(self._owner)
        slots = self._owner[live].astype(np.int64) - 1
        salts = self._salts[slots]
        parents = self._parent[live]
        return Batch(
            slots,
            self._presence.keys[live] ^ salts,
            np.where(parents == 0, parents, parents ^ salts),
            self._copies[live].astype(np.int64),
        )

    def apply(self, batch: Batch) -> None:
        """Apply a batch of changes."""
        if not len(batch.hashes):
            return
        groups = self._group(batch)
        at = self._presence.find(groups.keys)
        had = np.where(at >= 0, self._copies[at], 0).astype(np.int64)
        # A removal of what is not listed changes nothing, so a count never falls below 0 on its way.
        unknown = np.maximum(-(had + groups.lowest), 0)
        self.unknown_removals += int(unknown.sum())
        now = had + groups.net + unknown
        kept = (had > 0) & (now > 0)
        self._copies[at[kept]] = np.minimum(now[kept], _MAX_COPIES)
        again = kept & (groups.stored_at >= 0)
        self._restore(groups, np.flatnonzero(again))
        gone = (had > 0) & (now == 0)
        self._remove(at[gone])
        added = self._add(batch, groups, np.flatnonzero((had == 0) & (now > 0)), now)
        self._add_holders(groups, added)
        self._drop_holders(groups.hashes[gone], groups.slots[gone])
        self._show_holes(groups.slots)

    def _group(self, batch: Batch) -> _Groups:
        keys = nonzero_keys(batch.hashes ^ self._salts[batch.slots])
        order = np.argsort(keys, kind="stable")
        ordered, deltas = keys[order], batch.deltas[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        sums = np.cumsum(deltas)
        before = sums[starts] - deltas[starts]
        counts = np.diff(np.append(starts, len(ordered)))
        running = sums - np.repeat(before, counts)
        first = order[starts]
        return _Groups(
            keys=ordered[starts],
            hashes=nonzero_keys(batch.hashes[first]),
            slots=batch.slots[first],
            net=np.add.reduceat(deltas, starts),
            lowest=np.minimum.reduceat(running, starts),
            stored_at=np.maximum.reduceat(np.where(deltas > 0, order, -1), starts),
        )

    def _remove(self, positions: I64) -> None:
        """Take blocks off; one that leaves successors behind makes holes, one that was a hole fills it."""
        if not len(positions):
            return
        parents = self._parent[positions]
        owners = self._owner[positions].astype(np.int64) - 1
        found = self._find_parents(parents)
        np.subtract.at(self._children, found[found >= 0], 1)
        np.subtract.at(self._holes, owners[(found < 0) & (parents != 0)], 1)
        np.add.at(self._holes, owners, self._children[positions].astype(np.int64))
        self._erase(positions)

    def _erase(self, positions: I64) -> None:
        self._presence.remove(positions)
        for array in (self._parent, self._children, self._copies, self._owner):
            array[positions] = 0

    def _add(self, batch: Batch, groups: _Groups, rows: I64, copies: I64) -> I64:
        """Enter new blocks; returns the rows that found room."""
        if not len(rows):
            return rows
        at = self._presence.insert(groups.keys[rows])
        if (at < 0).any():
            self._overflowed.update(groups.slots[rows[at < 0]].tolist())
            rows, at = rows[at >= 0], at[at >= 0]
        slots = groups.slots[rows]
        stored = groups.stored_at[rows]
        parents = batch.parents[stored]
        parents = np.where(parents == 0, parents, nonzero_keys(parents ^ self._salts[slots]))
        self._adopt(groups.keys[rows], at, slots)
        self._parent[at] = parents
        self._copies[at] = np.minimum(copies[rows], _MAX_COPIES)
        self._owner[at] = slots + 1
        found = self._find_parents(parents)
        np.add.at(self._children, found[found >= 0], 1)
        np.add.at(self._holes, slots[(found < 0) & (parents != 0)], 1)
        return rows

    def _find_parents(self, parents: U64) -> I64:
        return np.where(parents == 0, -1, self._presence.find(parents))

    def _adopt(self, keys: U64, at: I64, slots: I64) -> None:
        """Fill the holes that new blocks close: their successors were there before them."""
        for slot in np.unique(slots[self._holes[slots] > 0]).tolist():
            parents = self._parent[self._owner == slot + 1]
            mine = slots == slot
            children = np.array([int((parents == key).sum()) for key in keys[mine]], np.uint32)
            self._children[at[mine]] += children
            self._holes[slot] -= int(children.sum())

    def _show_holes(self, slots: I64) -> None:
        for slot in np.unique(slots).tolist():
            row = HEADER_BYTES + slot * SLOT_ROW.size
            _, state, _ = SLOT_ROW.unpack_from(self._region, row)
            if bool(state & HOLES) != bool(self._holes[slot]):
                self._write_row(slot, *self.view(slot))

    def _add_holders(self, groups: _Groups, rows: I64) -> None:
        if not len(rows):
            return
        rows = rows[np.argsort(groups.stored_at[rows], kind="stable")]
        hashes = groups.hashes[rows]
        at = self._storers.find(hashes)
        missing = np.unique(hashes[at < 0])
        if len(missing):
            placed = self._storers.insert(missing)
            self._holders[placed[placed >= 0]] = 0
            at = self._storers.find(hashes)
        fits = at >= 0
        np.add.at(self._holders, at[fits], 1)
        # Of several rows of one block the last assignment, that of the last storer, stands.
        self._storer_slot[at[fits]] = groups.slots[rows[fits]].astype(np.uint16)

    def _restore(self, groups: _Groups, rows: I64) -> None:
        """Blocks of which a target stored one more copy."""
        rows = rows[np.argsort(groups.stored_at[rows], kind="stable")]
        at = self._storers.find(groups.hashes[rows])
        self._storer_slot[at[at >= 0]] = groups.slots[rows[at >= 0]].astype(np.uint16)

    def _drop_holders(self, hashes: U64, slots: I64) -> None:
        if not len(hashes):
            return
        at = self._storers.find(hashes)
        at, slots, hashes = at[at >= 0], slots[at >= 0], hashes[at >= 0]
        np.subtract.at(self._holders, at, 1)
        left = self._holders[at]
        self._storers.remove(np.unique(at[left == 0]))
        stale = (left > 0) & (self._storer_slot[at] == slots)
        self._storer_slot[at[stale]] = NO_SLOT
        for block_hash, position in zip(hashes[stale][:REPAIRS_PER_BATCH], at[stale], strict=False):
            holders = np.flatnonzero(self._presence.find(nonzero_keys(block_hash ^ self._salts)) >= 0)
            if len(holders):
                self._storer_slot[position] = holders[0]

    def _new_salt(self, slot: int) -> None:
        self._generations[slot] += 1
        self._salts[slot] = _splitmix(self._nonce ^ slot << 40 ^ self._generations[slot])
        _, state, block_tokens = SLOT_ROW.unpack_from(self._region, HEADER_BYTES + slot * SLOT_ROW.size)
        SLOT_ROW.pack_into(
            self._region, HEADER_BYTES + slot * SLOT_ROW.size, int(self._salts[slot]), state, block_tokens
        )

    def _write_row(self, slot: int, state: ViewState, block_tokens: int) -> None:
        flags = HOLES if self._holes[slot] else 0
        row = HEADER_BYTES + slot * SLOT_ROW.size
        SLOT_ROW.pack_into(self._region, row, int(self._salts[slot]), int(state) | flags, block_tokens)


def memory_bytes(slots: int, buckets: int) -> int:
    """All memory of an index, shared and private."""
    return index_bytes(slots, buckets) + buckets * WAYS * PRIVATE_BYTES_PER_WAY


def _splitmix(value: int) -> int:
    """A well-mixed 64-bit number (Steele, Lea, Flood: SplitMix, 2014), never 0."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return (value ^ value >> 31) or 1
