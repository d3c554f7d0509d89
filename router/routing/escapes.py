"""Keeps the least-work heaps in step with the accounts, in bounded time per decision."""

from collections.abc import Collection

from router.routing.least_work import LeastWork
from router.routing.loads import Loads
from router.routing.price import refusal
from router.routing.state import PoolState, TargetState
from router.routing.types import RequestFeatures

_REFRESHES_PER_DECISION = 64
_FRESH_TOP_TRIES = 16
_MAX_ADAPTER_HEAPS = 64


class Escapes:
    """One heap per pool, and per adapter that not every target of the pool serves (made on first use).

    A decision brings at most _REFRESHES_PER_DECISION changed targets up to date, and whatever comes to the top: under a
    flood of changes the order deeper in the heap lags, the target that is offered never does.
    """

    __slots__ = ("_adapter_heaps", "_heaps", "_loads", "_pool_of")

    def __init__(self, loads: Loads) -> None:
        self._loads = loads
        self._heaps: dict[str, LeastWork] = {}
        self._adapter_heaps: dict[tuple[str, str], LeastWork] = {}
        self._pool_of: dict[int, tuple[str, TargetState]] = {}

    def install(self, pools: dict[str, PoolState]) -> None:
        """Begins anew with the targets of ``pools`` that take work: an idle one that takes none would stay on top."""
        self._pool_of = {
            state.slot: (name, state) for name, pool in pools.items() for state in pool.targets if not state.refusal
        }
        self._adapter_heaps = {}
        self._heaps = {name: self._heap(pool, "") for name, pool in pools.items()}
        self._loads.stale.clear()

    def best(self, request: RequestFeatures, pool: PoolState, exclude: Collection[int], now_s: float) -> int | None:
        """Slot of the target with the least work that may take the request."""
        stale = self._loads.stale
        for _ in range(min(len(stale), _REFRESHES_PER_DECISION)):
            self._refresh(stale.popitem(last=False)[0])
        heap = self._heap_for(request.adapter, pool)
        get, by_slot = self._loads.get, pool.by_slot

        def eligible(slot: int) -> bool:
            return not refusal(by_slot[slot], get(slot), request, exclude, now_s)

        slot = heap.best(eligible)
        for _ in range(_FRESH_TOP_TRIES):
            if slot is None or slot not in stale:
                break
            del stale[slot]
            self._refresh(slot)
            slot = heap.best(eligible)
        return slot

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
            (state.slot, state.idle_work_s(self._loads.get(state.slot)))
            for state in pool.targets
            if not state.refusal and state.has_adapter(adapter)
        )

    def _refresh(self, slot: int) -> None:
        known = self._pool_of.get(slot)
        if known is None:
            return
        name, state = known
        work_s = state.idle_work_s(self._loads.get(slot))
        self._heaps[name].update(slot, work_s)
        for (pool, _), heap in self._adapter_heaps.items():
            if pool == name:
                heap.update(slot, work_s)
