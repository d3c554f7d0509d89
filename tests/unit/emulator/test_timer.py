"""The timer keeps the order of times and is never early, on both event loops."""

import asyncio
import time
from collections.abc import Callable

import pytest
import uvloop

from emulator.server.timer import PreciseTimer


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_order_and_never_early(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def run() -> list[tuple[float, float]]:
        loop = asyncio.get_running_loop()
        timer = PreciseTimer(loop)
        seen: list[tuple[float, float]] = []
        done = loop.create_future()
        base = time.monotonic()

        def note(due: float) -> None:
            seen.append((due, time.monotonic()))
            if due == base + 0.0101:
                # From inside a callback: a time before those that wait, and one that has passed.
                timer.call_at(base + 0.012, lambda: note(base + 0.012))
                timer.call_at(base, lambda: note(base))
            if len(seen) == 6:
                done.set_result(None)

        for offset in (0.0305, 0.0101, 0.0203, -1.0):
            timer.call_at(base + offset, lambda due=base + offset: note(due))
        await asyncio.wait_for(done, 20)
        timer.close()
        return seen

    with asyncio.Runner(loop_factory=factory) as runner:
        seen = runner.run(run())
    assert all(at_s >= due for due, at_s in seen)
    waiting = [due for due, _ in seen if due > seen[0][0] + 1.01]
    assert waiting == sorted(waiting)
    assert len(seen) == 6


def test_closed_timer_runs_nothing() -> None:
    async def run() -> list[int]:
        timer = PreciseTimer(asyncio.get_running_loop())
        seen: list[int] = []
        timer.call_at(time.monotonic() + 0.01, lambda: seen.append(1))
        timer.close()
        await asyncio.sleep(0.05)
        return seen

    assert asyncio.run(run()) == []


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_callback_that_schedules_far_ahead_does_not_delay_the_next_one(
    factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def run() -> None:
        timer = PreciseTimer(asyncio.get_running_loop())
        second = asyncio.get_running_loop().create_future()
        base = time.monotonic()
        timer.call_at(base + 0.01, lambda: timer.call_at(base + 3600, lambda: None))
        timer.call_at(base + 0.02, lambda: second.set_result(None))
        await asyncio.wait_for(second, 20)
        timer.close()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())
