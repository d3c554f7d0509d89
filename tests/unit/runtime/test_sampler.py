"""The sampling profiler: what it sees, what it refuses, and what it leaves behind (nothing)."""

import asyncio
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
import uvloop

from twofold.runtime import sampler
from twofold.runtime.sampler import BusyError, Clock, Profile

SPIN_S = 0.3
ENOUGH = 20
"""Samples of the function that uses twenty times what the other does: so many are never the other's by chance."""


def burn(cpu_s: float) -> None:
    """Use CPU time."""
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


def hot(cpu_s: float) -> None:
    burn(cpu_s)


def cold(cpu_s: float) -> None:
    burn(cpu_s)


def seen_in(profile: Profile, function: str) -> int:
    """Samples of the main thread with ``function`` on the stack."""
    main = next(thread for thread in profile.threads if thread.name == "MainThread")
    return sum(count for stack, count in main.stacks if f";{function} (" in stack)


async def profile_of(work: Callable[[], None], clock: Clock) -> Profile:
    """A profile of an event loop that runs ``work`` again and again."""
    taking = asyncio.create_task(sampler.record("me", seconds=SPIN_S, clock=clock))
    await asyncio.sleep(0)
    while not taking.done():
        work()
        await asyncio.sleep(0)
    return await taking


def callbacks() -> None:
    hot(10e-3)
    cold(0.5e-3)


@pytest.mark.parametrize("clock", list(Clock))
async def test_sees_what_uses_the_time(clock: Clock) -> None:
    seen: Counter[str] = Counter()
    async with asyncio.timeout(60.0):
        while seen["hot"] < ENOUGH:
            profile = await profile_of(callbacks, clock)
            seen.update({function: seen_in(profile, function) for function in ("hot", "cold", "burn")})
    assert profile.process == "me"
    assert profile.clock is clock
    assert profile.cpu_s > 0
    assert seen["cold"] < seen["hot"]
    assert seen["burn"] > 0
    assert any("burn (unit/runtime/test_sampler.py:" in stack for stack, _ in profile.threads[0].stacks)


def test_short_callbacks_of_uvloop_are_seen_on_the_cpu_clock() -> None:
    """uvloop gives the interpreter lock away around every callback, which no sampling thread can follow."""

    async def run() -> int:
        loop = asyncio.get_running_loop()
        stopped = False

        def turn() -> None:
            if not stopped:
                loop.call_soon(hot, 20e-6)
                loop.call_soon(cold, 2e-6)
                loop.call_later(0.001, turn)

        turn()
        seen = 0
        async with asyncio.timeout(60.0):
            while not seen:
                profile = await sampler.record("me", seconds=SPIN_S, clock=Clock.CPU)
                seen = seen_in(profile, "hot") + seen_in(profile, "cold")
        stopped = True
        return seen

    assert uvloop.run(run()) > 0


async def test_other_threads_that_work_are_in_a_wall_profile() -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            burn(0.001)

    def wait() -> None:
        stop.wait()

    threads = [threading.Thread(target=work, name="worker"), threading.Thread(target=wait, name="waiter")]
    for thread in threads:
        thread.start()
    try:
        profile = await sampler.record("me", seconds=SPIN_S)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    names = {thread.name for thread in profile.threads}
    assert {"MainThread", "worker"} <= names
    assert "waiter" not in names
    assert profile.idle_threads >= 1


@pytest.mark.parametrize("clock", list(Clock))
async def test_one_at_a_time_and_cancellable(clock: Clock) -> None:
    interval_s, threads = sys.getswitchinterval(), threading.active_count()
    first = asyncio.create_task(sampler.record("me", seconds=60.0, clock=clock))
    await asyncio.sleep(0)
    with pytest.raises(BusyError):
        await sampler.record("me", seconds=0.1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert sys.getswitchinterval() == interval_s
    assert threading.active_count() == threads
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert (await sampler.record("me", seconds=0.05, clock=clock)).clock is clock


@pytest.mark.parametrize(
    ("seconds", "hz"), [(0.0, 100.0), (61.0, 100.0), (1.0, 0.5), (1.0, 201.0), (float("nan"), 1.0)]
)
async def test_bounds(seconds: float, hz: float) -> None:
    with pytest.raises(ValueError):
        await sampler.record("me", seconds=seconds, hz=hz)


async def test_stacks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "MAX_STACKS", 1)
    profile = await profile_of(callbacks, Clock.WALL)
    main = next(thread for thread in profile.threads if thread.name == "MainThread")
    assert len(main.stacks) <= 2
    assert sum(count for _, count in main.stacks) == main.samples
