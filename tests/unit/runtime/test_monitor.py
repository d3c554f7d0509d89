"""Lag of the event loop, pauses of the collector, and maxima that forget."""

import asyncio
import gc

from twofold.runtime.monitor import LAG_BOUNDS_S, RuntimeMonitor, WindowMax


def test_window_max_forgets_after_one_to_two_windows() -> None:
    found = WindowMax()
    found.add(3.0, 100.0)
    found.add(1.0, 105.0)
    assert found.get(109.0) == 3.0
    found.add(2.0, 111.0)
    assert found.get(119.0) == 3.0
    assert found.get(121.0) == 2.0
    assert found.get(131.5) == 0.0


def test_lag_goes_into_its_bucket() -> None:
    monitor = RuntimeMonitor(lambda: 0.0)
    for lag_s in (-0.5, 0.001, 0.0011, 99.0):
        monitor.late(lag_s, 0.0)
    assert monitor.lag_counts[0] == 2
    assert monitor.lag_counts[1] == 1
    assert monitor.lag_counts[len(LAG_BOUNDS_S)] == 1
    assert monitor.lag_max.get(0.0) == 99.0


async def test_a_blocked_loop_is_seen() -> None:
    monitor = RuntimeMonitor()
    watching = asyncio.create_task(monitor.watch_loop(0.0))
    while not sum(monitor.lag_counts):
        await asyncio.sleep(0)
    watching.cancel()
    assert monitor.lag_sum_s >= 0.0


def test_collections_are_counted_until_closed() -> None:
    monitor = RuntimeMonitor()
    monitor.watch_collector()
    monitor.watch_collector()
    try:
        gc.collect()
        assert monitor.collections[2] == 1
        assert monitor.pause_s[2] > 0.0
    finally:
        monitor.close()
    gc.collect()
    assert monitor.collections[2] == 1
