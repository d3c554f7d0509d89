"""Lookup on the two consistent-hash rings: the four home targets of a key."""

from bisect import bisect_left

MAX_HOMES = 4
MAX_REMEMBERED = 4096
"""Keys of which a pool's rings remember the homes."""


class Ring:
    """Sorted positions (64-bit), the slot that owns each, and an index by the keys' top bits that leaves a handful of
    positions to search: views over the bytes that ``ring_build`` made."""

    __slots__ = ("_index", "_positions", "_shift", "_slots")

    def __init__(self, positions: memoryview, slots: memoryview, index: memoryview) -> None:
        self._positions = positions.cast("B").cast("Q")
        self._slots = slots.cast("B").cast("H")
        self._index = index.cast("B").cast("I")
        self._shift = 64 - (len(self._index) - 1).bit_length() + 1

    def __len__(self) -> int:
        return len(self._positions)

    def extend(self, key: int, homes: list[int], missing: int) -> None:
        """Appends ``missing`` successors of ``key`` that are not in ``homes`` yet."""
        slots, index = self._slots, self._index
        bucket = key >> self._shift
        at = bisect_left(self._positions, key, index[bucket], index[bucket + 1])
        size = len(slots)
        for _ in range(size):
            slot = slots[at] if at < size else slots[at - size]
            if slot not in homes:
                homes.append(slot)
                missing -= 1
                if not missing:
                    return
            at += 1


class DualRing:
    """Both rings of a pool.

    ``version`` identifies the members and weights they were built from: equal versions give equal homes everywhere.
    """

    __slots__ = ("_a", "_b", "_known", "_wanted_a", "_wanted_b", "members", "version")

    def __init__(self, version: str, members: int, a: Ring, b: Ring) -> None:
        self.version = version
        self.members = members
        self._wanted_a = min(2, members)
        self._wanted_b = min(MAX_HOMES, members) - self._wanted_a
        self._known: dict[int, tuple[int, ...]] = {}
        self._a = a
        self._b = b

    def homes(self, key: int) -> tuple[int, ...]:
        """Slots of the key's first two distinct successors on ring A, then of the first two on ring B that differ
        from those. Fewer where the pool has fewer members; of three, ring B names one."""
        known = self._known.get(key)
        if known is not None:
            return known
        found: list[int] = []
        if self._wanted_a:
            self._a.extend(key, found, self._wanted_a)
        if self._wanted_b:
            self._b.extend(key, found, self._wanted_b)
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        homes = self._known[key] = tuple(found)
        return homes
