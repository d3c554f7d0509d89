"""Callbacks at precise times. The event loop's own timers round to a millisecond, half a step of a fast engine."""

import asyncio
import ctypes
import heapq
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_TFD_NONBLOCK_CLOEXEC = 0o4000 | 0o2000000


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("it_interval", _Timespec), ("it_value", _Timespec)]


class PreciseTimer:
    """Runs callbacks at times of CLOCK_MONOTONIC, through one Linux timerfd; elsewhere through the loop's own timers.

    A callback that is due runs in the order of its time. Nothing ticks while nothing is scheduled.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._armed_for = 0.0
        self._fd = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = int(self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC))
        if self._fd >= 0:
            self._value = _Itimerspec()
            self._value_pointer = ctypes.byref(self._value)
            loop.add_reader(self._fd, self._fire)

    def call_at(self, when_s: float, callback: Callable[[], None]) -> None:
        """Run ``callback`` at ``when_s``, or as soon as possible where that has passed."""
        self._sequence += 1
        heapq.heappush(self._heap, (when_s, self._sequence, callback))
        if self._fd < 0:
            self._loop.call_later(max(0.0, when_s - time.monotonic()), self._run_due)
        elif not self._armed_for or when_s < self._armed_for:
            self._arm(when_s)

    def close(self) -> None:
        """Forget all callbacks and release the descriptor."""
        self._heap.clear()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _arm(self, when_s: float) -> None:
        self._armed_for = when_s
        # An all-zero value would disarm the timer.
        nanoseconds = max(1, int(when_s * 1e9))
        self._value.it_value.tv_sec, self._value.it_value.tv_nsec = divmod(nanoseconds, 1_000_000_000)
        self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, self._value_pointer, None)

    def _fire(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._armed_for = 0.0
        self._run_due()
        # A callback may have armed the timer for its own next time while an earlier one was waiting already.
        if self._heap and self._fd >= 0 and (not self._armed_for or self._heap[0][0] < self._armed_for):
            self._arm(self._heap[0][0])

    def _run_due(self) -> None:
        now = time.monotonic()  # the loop's own clock is cached and rounded
        while self._heap and self._heap[0][0] <= now:
            callback = heapq.heappop(self._heap)[2]
            callback()
