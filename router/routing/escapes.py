"""Keeps the least-work heaps in step with the accounts, in bounded time per decision."""

from collections.abc import Callable, Collection, Iterable

from router.routing.accounts import Load
from router.routing.dirty_log import DirtyReader
from router.routing.least_work import LeastWork
from router.routing.price import refusal
from router.routing.state import PoolState, TargetState
from router.routing.types import RequestFeatures

_CHANGES_PER_DECISION = 48
_RESCAN_EVERY_S = 0.1
_MAX_ADAPTER_HEAPS = 64


class Escapes:
    """One heap per pool, and per adapter that not every target of the pool serves (made on first use)."""

    __slots__ = ("_adapter_heaps", "_heaps", "_load", "_pool_of", "_readers", "_rescan", "_rescanned_s")

    def __init__(self, load: Callable[[int], Load], readers: tuple[DirtyReader, ...]) -> None:
        self._load = load
        self._readers = readers
        self._heaps: dict[str, LeastWork] = {}
        self._adapter_heaps: dict[tuple[str, str], LeastWork] = {}
        self._pool_of: dict[int, tuple[str, TargetState]] = {}
        self._rescan = False
        self._rescanned_s = float("-inf")

    def install(self, pools: dict[str, PoolState]) -> None:
        """Begins anew with the targets of ``pools`` that take work: an idle one that takes none would stay on top."""
        self._pool_of = {
            state.slot: (name, state) for name, pool in pools.items() for state in pool.targets if not state.refusal
        }
        self._adapter_heaps = {}
        self._heaps = {name: self._heap(pool, "") for name, pool in pools.items()}
        self._rescan = False

    def best(self, request: RequestFeatures, pool: PoolState, exclude: Collection[int], now_s: float) -> int | None:
        """Slot of the target with the least work that may take the request."""
        self._catch_up(now_s)
        load, by_slot = self._load, pool.by_slot

        def eligible(slot: int) -> bool:
            return not refusal(by_slot[slot], load(slot), request, exclude, now_s)

        return self._heap_for(request.adapter, pool).best(eligible)

    def _heap_for(self, adapter: str, pool: PoolState) -> LeastWork:
        name = pool.pool.name
        if not adapter:
            return self._heaps[name]
        heap = self._adapter_heaps.get((name, adapter))
        if heap is None:
            heap = self._heap(pool, adapter)
            if len(heap) == len(self._heaps[name]):
                return self._heaps[name]
            if len(self._adapter_heaps) >= _MAX_ADAPTER_HEAPS:
                del self._adapter_heaps[next(iter(self._adapter_heaps))]
            self._adapter_heaps[(name, adapter)] = heap
        return heap

    def _heap(self, pool: PoolState, adapter: str) -> LeastWork:
        return LeastWork(
            (state.slot, state.idle_work_s(self._load(state.slot)))
            for state in pool.targets
            if not state.refusal and state.has_adapter(adapter)
        )

    def _catch_up(self, now_s: float) -> None:
        """Takes in what changed. More than fits one decision waits for the next; what was missed altogether is made up
        for by a rescan, at most every 0.1 s."""
        for reader in self._readers:
            if reader.pending:
                changed = reader.take(_CHANGES_PER_DECISION)
                if changed is None:
                    self._rescan = True
                else:
                    self._refresh(changed)
        if self._rescan and now_s - self._rescanned_s >= _RESCAN_EVERY_S:
            self._rescan = False
            self._rescanned_s = now_s
            self._refresh(self._pool_of)

    def _refresh(self, slots: Iterable[int]) -> None:
        adapter_heaps = self._adapter_heaps
        for slot in dict.fromkeys(slots):
            known = self._pool_of.get(slot)
            if known is None:
                continue
            name, state = known
            work_s = state.idle_work_s(self._load(slot))
            self._heaps[name].update(slot, work_s)
            for (pool, _), heap in adapter_heaps.items():
                if pool == name:
                    heap.update(slot, work_s)
