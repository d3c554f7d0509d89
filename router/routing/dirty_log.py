"""Ring of changed slots, one per writer: readers catch up in O(changes), and rescan when they lag too far."""

from collections.abc import Sequence

DEFAULT_CAPACITY = 4096
_HEADER_WORDS = 1


def region_bytes(capacity: int = DEFAULT_CAPACITY) -> int:
    """Bytes of a log that remembers ``capacity`` changes."""
    return 8 * (_HEADER_WORDS + capacity)


class DirtyLog:
    """Writer side. One process writes; the header word counts all changes ever made."""

    __slots__ = ("_capacity", "_words")

    def __init__(self, region: memoryview) -> None:
        self._words = region.cast("Q")
        self._capacity = len(self._words) - _HEADER_WORDS

    def mark(self, slot: int) -> None:
        """Records that ``slot`` changed. Call after the change itself, so that a reader sees the new values."""
        words = self._words
        head = words[0]
        words[_HEADER_WORDS + head % self._capacity] = slot
        words[0] = head + 1


class DirtyReader:
    """Reader side; any number per log, each with its own position."""

    __slots__ = ("_capacity", "_cursor", "_words", "overruns")

    def __init__(self, region: memoryview) -> None:
        self._words = region.cast("Q")
        self._capacity = len(self._words) - _HEADER_WORDS
        self._cursor = self._words[0]
        self.overruns = 0
        """Times that changes were missed."""

    @property
    def pending(self) -> bool:
        """Whether anything changed since the last ``take``."""
        return self._words[0] != self._cursor

    def take(self, limit: int) -> Sequence[int] | None:
        """Slots changed since the last call, oldest first, at most ``limit`` (repeats possible).

        None when changes were missed (more than the log holds, or the writer began anew): rescan all slots.
        """
        words, capacity, cursor = self._words, self._capacity, self._cursor
        head = words[0]
        if head == cursor:
            return ()
        # Half the capacity is kept as distance from the writer, which may go on while this reads.
        if not 0 < head - cursor <= capacity // 2:
            self._cursor = head
            self.overruns += 1
            return None
        end = min(head, cursor + limit)
        self._cursor = end
        first, last = cursor % capacity, end % capacity
        if first < last:
            return words[_HEADER_WORDS + first : _HEADER_WORDS + last].tolist()
        return (
            words[_HEADER_WORDS + first : _HEADER_WORDS + capacity].tolist()
            + words[_HEADER_WORDS : _HEADER_WORDS + last].tolist()
        )
