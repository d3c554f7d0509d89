"""Which target has the least work: a heap with lazy deletion, fed by the dirty logs.

Updates are O(log n) in C; an outdated entry is dropped when it comes to the top; the heap is rebuilt when more than
half of it is outdated, so that it is bounded by twice the pool.
"""

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

MAX_SKIPS = 4


class LeastWork:
    """Heap over the slots of one pool (and adapter)."""

    __slots__ = ("_heap", "_work")

    def __init__(self, work: Iterable[tuple[int, float]] = ()) -> None:
        self._work: dict[int, float] = dict(work)
        self._heap: list[tuple[float, int]] = []
        self._rebuild()

    def __len__(self) -> int:
        return len(self._work)

    def __contains__(self, slot: int) -> bool:
        return slot in self._work

    def update(self, slot: int, work_s: float) -> None:
        """The work of a member is now ``work_s``; slots that are no members are ignored."""
        known = self._work.get(slot)
        if known is None or known == work_s:
            return
        self._work[slot] = work_s
        heappush(self._heap, (work_s, slot))
        if len(self._heap) > 2 * len(self._work) + 16:
            self._rebuild()

    def best(self, eligible: Callable[[int], bool]) -> int | None:
        """The slot with the least work that is ``eligible``; None when more than MAX_SKIPS at the top are not."""
        heap, work = self._heap, self._work
        skipped: list[tuple[float, int]] = []
        chosen = None
        while heap:
            value, slot = heap[0]
            if work[slot] != value:
                heappop(heap)
                continue
            if eligible(slot):
                chosen = slot
                break
            if len(skipped) == MAX_SKIPS:
                break
            skipped.append(heappop(heap))
            # The same entry may be in the heap twice, when work went there and back.
            while heap and heap[0] == skipped[-1]:
                heappop(heap)
        for entry in skipped:
            heappush(heap, entry)
        return chosen

    def _rebuild(self) -> None:
        self._heap = [(work_s, slot) for slot, work_s in self._work.items()]
        heapify(self._heap)
