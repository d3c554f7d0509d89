"""A vectorised bucketed hash set over shared memory: many keys found, inserted and removed by a few numpy calls."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from router.routing.kv_index import WAYS

U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

_SHIFT = np.uint64(32)
_ONE = np.uint64(1)
_WAY_NUMBERS = np.arange(WAYS, dtype=np.int64)
_MAX_ROUNDS = 64


class KeyTable:
    """Keys (never 0) in buckets of eight ways, each in one of its two buckets. Positions are indices of ways.

    The array may be shared with readers: every change of a key is one aligned 8-byte store. ``beside`` are arrays with
    one value a position; they move along when a key has to make room (a step of cuckoo hashing, Pagh and Rodler 2001).
    """

    def __init__(self, keys: U64, beside: Sequence[npt.NDArray[Any]] = ()) -> None:
        buckets = len(keys) // WAYS
        if buckets & (buckets - 1) or not buckets:
            raise ValueError("a key table needs a power of two of buckets")
        self.keys = keys
        self.count = 0
        self._beside = tuple(beside)
        self._rows = keys.reshape(buckets, WAYS)
        self._mask = np.uint64(buckets - 1)

    def find(self, keys: U64) -> I64:
        """Position of each key, -1 where it is absent."""
        first = (keys & self._mask).astype(np.int64)
        found = self._in_bucket(first, keys)
        rest = np.flatnonzero(found < 0)
        if rest.size:
            second = ((keys[rest] >> _SHIFT) & self._mask).astype(np.int64)
            found[rest] = self._in_bucket(second, keys[rest])
        return found

    def insert(self, keys: U64) -> I64:
        """Enter distinct keys that are absent; position of each, -1 where both its buckets are full."""
        placed = np.full(len(keys), -1, dtype=np.int64)
        pending = np.arange(len(keys))
        for _ in range(_MAX_ROUNDS):
            if not pending.size:
                break
            wanted = keys[pending]
            position = self._free_way(wanted)
            fits = position >= 0
            pending, position, wanted = pending[fits], position[fits], wanted[fits]
            # Of several keys that aim at one way the last store stands; the others see that and try again.
            self.keys[position] = wanted
            won = self.keys[position] == wanted
            placed[pending[won]] = position[won]
            pending = pending[~won]
        for index in np.flatnonzero(placed < 0).tolist():
            moved = self._make_room(int(keys[index]))
            if moved is not None:
                free, new = moved
                placed[placed == free] = new
                self.keys[free] = keys[index]
                placed[index] = free
        self.count += int((placed >= 0).sum())
        return placed

    def remove(self, positions: I64) -> None:
        """Remove the keys at distinct positions."""
        self.keys[positions] = 0
        self.count -= len(positions)

    def _in_bucket(self, buckets: I64, keys: U64) -> I64:
        hits = self._rows[buckets] == keys[:, None]
        way = hits.argmax(axis=1)
        return np.where(hits[np.arange(len(keys)), way], buckets * WAYS + way, -1)

    def _free_way(self, keys: U64) -> I64:
        """A free way for each key, in the emptier of its buckets; -1 where there is none. Keys that begin at the same
        bucket take its free ways in turn, so that few of them collide."""
        first = (keys & self._mask).astype(np.int64)
        second = ((keys >> _SHIFT) & self._mask).astype(np.int64)
        free_first, free_second = self._rows[first] == 0, self._rows[second] == 0
        count_first, count_second = free_first.sum(axis=1), free_second.sum(axis=1)
        take_second = count_second > count_first
        free = np.where(take_second[:, None], free_second, free_first)
        count = np.where(take_second, count_second, count_first)
        bucket = np.where(take_second, second, first)
        turn = (keys >> np.uint64(56)).astype(np.int64) % np.maximum(count, 1)
        # The turn-th free way of the bucket.
        way = ((np.cumsum(free, axis=1) > turn[:, None]) & free).argmax(axis=1)
        return np.where(count > 0, bucket * WAYS + way, -1)

    def _make_room(self, key: int) -> tuple[int, int] | None:
        """Move one key of the two full buckets of ``key`` to its other bucket: (position now free, where it went)."""
        mask = int(self._mask)
        for bucket in {key & mask, key >> 32 & mask}:
            for position in range(bucket * WAYS, bucket * WAYS + WAYS):
                there = int(self.keys[position])
                other = (there >> 32 & mask) if there & mask == bucket else there & mask
                free = np.flatnonzero(self._rows[other] == 0)
                if len(free):
                    new = other * WAYS + int(free[0])
                    for array in self._beside:
                        array[new] = array[position]
                        array[position] = 0
                    # Readers find it in one place or the other at every moment.
                    self.keys[new] = there
                    return position, new
        return None


def nonzero_keys(values: U64) -> U64:
    """``values`` with 0, which marks a free way, taken for 1."""
    return np.where(values == 0, _ONE, values)
