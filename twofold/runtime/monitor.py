"""How late a process's event loop is, and how long the garbage collector stops it."""

import asyncio
import bisect
import gc
import time
from collections.abc import Callable
from typing import Any

LAG_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
WINDOW_S = 10.0
GENERATIONS = 3


class WindowMax:
    """The largest value of the last 10 to 20 seconds, for gauges that nobody resets."""

    __slots__ = ("_before", "_now", "_until_s")

    def __init__(self) -> None:
        self._before = self._now = 0.0
        self._until_s = 0.0

    def add(self, value: float, now_s: float) -> None:
        """Take in a value at ``now_s`` (monotonic seconds)."""
        self._turn(now_s)
        if value > self._now:
            self._now = value

    def get(self, now_s: float) -> float:
        """The maximum as of ``now_s``."""
        self._turn(now_s)
        return max(self._now, self._before)

    def _turn(self, now_s: float) -> None:
        if now_s < self._until_s:
            return
        self._before = self._now if now_s < self._until_s + WINDOW_S else 0.0
        self._now = 0.0
        self._until_s = now_s + WINDOW_S


class RuntimeMonitor:
    """Figures of one process since its start, fed by ``watch_collector`` and by ``watch_loop`` or calls of ``late``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._collecting_since_s = 0.0
        self.lag_counts = [0] * (len(LAG_BOUNDS_S) + 1)
        """Values per bucket of LAG_BOUNDS_S, not cumulative; the last one is above all bounds."""
        self.lag_sum_s = 0.0
        self.lag_max = WindowMax()
        self.collections = [0] * GENERATIONS
        self.pause_s = [0.0] * GENERATIONS
        self.pause_max = WindowMax()

    def late(self, lag_s: float, now_s: float) -> None:
        """A timer of the event loop fired ``lag_s`` after it was due."""
        lag_s = max(0.0, lag_s)
        self.lag_counts[bisect.bisect_left(LAG_BOUNDS_S, lag_s)] += 1
        self.lag_sum_s += lag_s
        self.lag_max.add(lag_s, now_s)

    def watch_collector(self) -> None:
        """Count and time garbage collections from now on."""
        if self._on_collection not in gc.callbacks:
            gc.callbacks.append(self._on_collection)

    def close(self) -> None:
        """Stop counting. Idempotent."""
        if self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)

    async def watch_loop(self, interval_s: float = 0.1) -> None:
        """Measure the lateness of a timer of the running loop, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + interval_s
            await asyncio.sleep(interval_s)
            self.late(loop.time() - due_s, self._clock())

    def _on_collection(self, phase: str, info: dict[str, Any]) -> None:
        now_s = self._clock()
        if phase == "start":
            self._collecting_since_s = now_s
            return
        generation = min(info["generation"], GENERATIONS - 1)
        pause_s = now_s - self._collecting_since_s
        self.collections[generation] += 1
        self.pause_s[generation] += pause_s
        self.pause_max.add(pause_s, now_s)
