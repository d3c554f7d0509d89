"""Which KV blocks each target holds, in shared memory: layout and reader. The agent is the one writer.

Two hash tables of buckets of eight ways; a key lies in one of the two buckets that its bits name, so a look-up reads
at most 128 bytes and a removal is one store. *Presence*: key = block hash xor the slot's salt, there while the target
at that slot holds at least one copy of the block. *Storers*: key = block hash, value = the slot that stored it last and
how many slots hold it. Both sides of an update are single aligned words, so a reader that races with the writer sees a
block a moment too early or too late, never nonsense.

A view is *exact* once every event since the target's cache was empty has been seen, *partial* after a gap that could
not be healed (what is listed is there, more may be), and otherwise absent. An engine that evicts what was used least
recently drops a chain from its tail, hence a binary search; the writer flags a slot where that does not hold
(``HOLES``), and there the reader goes through the chain block by block.
"""

import enum
from collections.abc import Sequence
from struct import Struct

MAGIC = b"TWFKVIX1"
HEADER = Struct("<8sQIIQd")
"""magic, superseded (0 or 1), slots, slot row offset, buckets of each table, last sign of life of the writer."""
HEADER_BYTES = 4096
SUPERSEDED_OFFSET = 8
BEAT_OFFSET = 32
SLOT_ROW = Struct("<QII")
"""salt, state and flags, tokens of a block."""
WAYS = 8
BUCKET_BYTES = 8 * WAYS
STORER_BYTES = 4 * WAYS
NO_SLOT = 0xFFFF
HOLES = 0x100
"""Flag beside the state of a slot: some block is listed whose predecessor is not."""
MAX_FILL = 0.75
"""Of the ways. Two choices of eight ways hardly ever overflow below 0.85."""
STORER_TRIES = 4
_MASK = (1 << 64) - 1


class ViewState(enum.IntEnum):
    """What is known of a target's cache."""

    NONE = 0
    PARTIAL = 1
    EXACT = 2


class KvIndexError(ValueError):
    """The bytes are no index of this layout."""


def buckets_for(blocks: int) -> int:
    """Buckets of each table for ``blocks`` entries at MAX_FILL: a power of two."""
    wanted = max(1, int(blocks / (MAX_FILL * WAYS)) + 1)
    return 1 << (wanted - 1).bit_length()


def capacity_blocks(buckets: int) -> int:
    """Entries that tables of so many buckets are meant to hold."""
    return int(buckets * WAYS * MAX_FILL)


def slot_rows_bytes(slots: int) -> int:
    """Bytes of the slot rows, a multiple of a bucket's."""
    return -(-slots * SLOT_ROW.size // BUCKET_BYTES) * BUCKET_BYTES


def index_bytes(slots: int, buckets: int) -> int:
    """Bytes of a whole index."""
    return HEADER_BYTES + slot_rows_bytes(slots) + buckets * (2 * BUCKET_BYTES + STORER_BYTES)


class KvIndexReader:
    """Look-ups in an index. Raises KvIndexError when ``region`` is none."""

    __slots__ = ("_buckets", "_presence", "_region", "_rows", "_storer_keys", "_storers", "slots")

    def __init__(self, region: memoryview) -> None:
        if len(region) < HEADER_BYTES:
            raise KvIndexError("too short for an index of KV blocks")
        magic, _, slots, rows, buckets, _ = HEADER.unpack_from(region, 0)
        if magic != MAGIC or buckets & (buckets - 1) or not buckets or len(region) < index_bytes(slots, buckets):
            raise KvIndexError("not an index of KV blocks of this layout")
        self.slots: int = slots
        self._region = region
        self._rows: int = rows
        self._buckets: int = buckets - 1
        self._presence = rows + slot_rows_bytes(slots)
        self._storer_keys = self._presence + buckets * BUCKET_BYTES
        self._storers = self._storer_keys + buckets * BUCKET_BYTES

    @property
    def superseded(self) -> bool:
        """Whether the agent has gone over to another index."""
        return self._region[SUPERSEDED_OFFSET] != 0

    @property
    def beat_s(self) -> float:
        """When the writer last gave a sign of life (CLOCK_MONOTONIC); without one the index ages."""
        beat: float = _BEAT(self._region, BEAT_OFFSET)[0]
        return beat

    def view(self, slot: int) -> tuple[ViewState, int]:
        """(what is known of the target at ``slot``, tokens of its blocks)."""
        if slot >= self.slots:
            return ViewState.NONE, 0
        _, state, block_tokens = SLOT_ROW.unpack_from(self._region, self._rows + slot * SLOT_ROW.size)
        return ViewState(state & 0xFF), block_tokens

    def leading_blocks(self, slot: int, hashes: Sequence[int]) -> int:
        """Leading blocks of a chain that the target at ``slot`` is known to hold; -1 without a view of it.

        O(log n) look-ups for a chain of n blocks, one where it holds all or nothing.
        """
        if slot >= self.slots:
            return -1
        salt, state, _ = SLOT_ROW.unpack_from(self._region, self._rows + slot * SLOT_ROW.size)
        if not state & 0xFF:
            return -1
        total = len(hashes)
        if not total:
            return 0
        region, base, mask = self._region, self._presence, self._buckets
        low, high, middle = 0, total, total - 1
        first = True
        while low < high:
            key = hashes[middle] ^ salt or 1
            if key in _KEYS(region, base + (key & mask) * 64) or key in _KEYS(region, base + (key >> 32 & mask) * 64):
                low = middle + 1
            else:
                high = middle
                if first and middle:
                    # Most targets hold all of a prompt or none of it.
                    first, middle = False, 0
                    continue
            first = False
            middle = (low + high) // 2
        if state & HOLES and low:
            for at in range(low):
                if not self._holds(hashes[at] ^ salt or 1):
                    return at
        return low

    def last_storer(self, hashes: Sequence[int]) -> tuple[int, int] | None:
        """(slot, leading blocks) of the target that last stored the deepest block of the chain that any target still
        holds; None where nobody is known to hold any."""
        low, high = 0, len(hashes)
        if not high or self.storer_of(hashes[0]) is None:
            return None
        low = 1
        middle = high - 1
        while low < high:
            if self.storer_of(hashes[middle]) is not None:
                low = middle + 1
            else:
                high = middle
            middle = (low + high) // 2
        for depth in range(low, max(0, low - STORER_TRIES), -1):
            slot = self.storer_of(hashes[depth - 1])
            if slot is not None and slot != NO_SLOT:
                return slot, depth
        return None

    def is_held(self, block_hash: int) -> bool:
        """Whether any target is known to hold the block."""
        return self.storer_of(block_hash) is not None

    def is_exact(self, slot: int) -> bool:
        """Whether all that the target at ``slot`` holds is listed."""
        return self.view(slot)[0] is ViewState.EXACT

    def storer_of(self, block_hash: int) -> int | None:
        """Slot that stored the block last, NO_SLOT where it has dropped it and others hold it, None where nobody
        does."""
        key = block_hash or 1
        for bucket in (key & self._buckets, key >> 32 & self._buckets):
            keys = _KEYS(self._region, self._storer_keys + bucket * BUCKET_BYTES)
            if key in keys:
                at = self._storers + bucket * STORER_BYTES + 4 * keys.index(key)
                slot: int = _STORER(self._region, at)[0]
                return slot
        return None

    def _holds(self, key: int) -> bool:
        region, base, mask = self._region, self._presence, self._buckets
        return key in _KEYS(region, base + (key & mask) * 64) or key in _KEYS(region, base + (key >> 32 & mask) * 64)


_KEYS = Struct(f"<{WAYS}Q").unpack_from
_STORER = Struct("<HH").unpack_from
_BEAT = Struct("<d").unpack_from
