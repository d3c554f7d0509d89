"""Ring of dispatched prefixes from a relay to its agent, which broadcasts them to the other replicas.

Hints only: a reader that lags loses the oldest, and nothing waits.
"""

from collections.abc import Sequence
from struct import Struct

DEFAULT_WORDS = 1 << 15
MAX_HASHES = 128
"""More than any prompt has: the depth schedule to 4096 chunks plus the deepest chunk is 81."""
_HEADER_WORDS = 1
_PACK = tuple(Struct(f"={1 + count}Q").pack_into for count in range(MAX_HASHES + 1))


def region_bytes(words: int = DEFAULT_WORDS) -> int:
    """Bytes of a ring of ``words`` 8-byte words."""
    return 8 * (_HEADER_WORDS + words)


class SentPrefixes:
    """Writer side: records are one word (slot << 32 | count) and ``count`` hashes; the header counts words written."""

    __slots__ = ("_capacity", "_region", "_words")

    def __init__(self, region: memoryview) -> None:
        self._region = region
        self._words = region.cast("Q")
        self._capacity = len(self._words) - _HEADER_WORDS

    def append(self, slot: int, hashes: Sequence[int]) -> None:
        """Records that a prompt with these chain hashes (see ``prefix.broadcast_hashes``) went to ``slot``."""
        words, capacity = self._words, self._capacity
        if len(hashes) > MAX_HASHES:
            hashes = hashes[:MAX_HASHES]
        count = len(hashes)
        head = words[0]
        at = head % capacity
        if at + count < capacity:
            _PACK[count](self._region, 8 * (_HEADER_WORDS + at), slot << 32 | count, *hashes)
        else:
            for number, word in enumerate((slot << 32 | count, *hashes)):
                words[_HEADER_WORDS + (at + number) % capacity] = word
        words[0] = head + count + 1


class SentPrefixReader:
    """Reader side, with its own position; begins at what is newest."""

    __slots__ = ("_capacity", "_cursor", "_words", "overruns")

    def __init__(self, region: memoryview) -> None:
        self._words = region.cast("Q")
        self._capacity = len(self._words) - _HEADER_WORDS
        self._cursor = self._words[0]
        self.overruns = 0
        """Times that records were lost because this reader lagged."""

    def drain(self, limit: int = 1024) -> list[tuple[int, list[int]]]:
        """(slot, hashes) of at most ``limit`` records written since the last call, oldest first."""
        words, capacity = self._words, self._capacity
        records: list[tuple[int, list[int]]] = []
        head, cursor = words[0], self._cursor
        while cursor != head and len(records) < limit:
            # Records near the writer's edge may be overwritten while they are copied: keep away, and check after.
            if not 0 < words[0] - cursor <= capacity - MAX_HASHES - 1:
                self.overruns += 1
                cursor = words[0]
                break
            at = cursor % capacity
            word = words[_HEADER_WORDS + at]
            slot, count = word >> 32, word & 0xFFFFFFFF
            if count > MAX_HASHES:
                cursor = words[0]
                break
            hashes = [words[_HEADER_WORDS + (at + 1 + i) % capacity] for i in range(count)]
            cursor += count + 1
            if words[0] - cursor > capacity - MAX_HASHES - 1:
                self.overruns += 1
                cursor = words[0]
                break
            records.append((slot, hashes))
        self._cursor = cursor
        return records
