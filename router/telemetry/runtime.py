"""What a process of a replica says of its event loop and garbage collector, in its counters."""

from router.shm.counters import CounterSlab
from twofold.runtime.monitor import GENERATIONS, LAG_BOUNDS_S, RuntimeMonitor


class Flow:
    """A counter cell that follows a figure which only grows while this process lives."""

    __slots__ = ("_cell", "_cells", "_last")

    def __init__(self, slab: CounterSlab, cell: int) -> None:
        self._cells = slab.cells
        self._cell = cell
        self._last = 0.0

    def to(self, value: float) -> None:
        """The figure is ``value`` now. One that fell began anew elsewhere: the counter waits for it to grow again."""
        if value > self._last:
            self._cells[self._cell] += value - self._last
        self._last = value


class RuntimeSeries:
    """Writes the figures of a RuntimeMonitor into a slab; ``flush`` about once a second."""

    def __init__(self, slab: CounterSlab, process: str, monitor: RuntimeMonitor) -> None:
        self._slab = slab
        self._monitor = monitor
        lag = slab.histogram(
            "twofold_loop_lag_seconds",
            "How late timers of the event loop fire, by process",
            LAG_BOUNDS_S,
            ("process",),
        ).series(process)
        self._lag = [Flow(slab, lag.base + bucket) for bucket in range(len(LAG_BOUNDS_S) + 1)]
        self._lag_sum = Flow(slab, lag.sum_cell)
        self._lag_max = slab.gauge(
            "twofold_loop_lag_max_seconds", "Latest timer of the last 10 to 20 seconds, by process", ("process",)
        ).cell(process)
        labels = ("process", "generation")
        collections = slab.counter("twofold_gc_collections_total", "Garbage collections, by process", labels)
        pauses = slab.counter("twofold_gc_pause_seconds_total", "Time in garbage collections, by process", labels)
        self._collections = [Flow(slab, collections.cell(process, str(g))) for g in range(GENERATIONS)]
        self._pauses = [Flow(slab, pauses.cell(process, str(g))) for g in range(GENERATIONS)]
        self._pause_max = slab.gauge(
            "twofold_gc_pause_max_seconds", "Longest collection of the last 10 to 20 seconds, by process", ("process",)
        ).cell(process)

    def flush(self, now_s: float) -> None:
        """Bring the counters up to ``now_s`` (monotonic)."""
        monitor = self._monitor
        for flow, count in zip(self._lag, monitor.lag_counts, strict=True):
            flow.to(count)
        self._lag_sum.to(monitor.lag_sum_s)
        for flow, count in zip(self._collections, monitor.collections, strict=True):
            flow.to(count)
        for flow, pause_s in zip(self._pauses, monitor.pause_s, strict=True):
            flow.to(pause_s)
        self._slab.set(self._lag_max, monitor.lag_max.get(now_s))
        self._slab.set(self._pause_max, monitor.pause_max.get(now_s))
