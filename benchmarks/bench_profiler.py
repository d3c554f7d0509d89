"""What a profile costs the process that is profiled: CPU time per sample when it is idle, beside its work when busy."""

import argparse
import asyncio
import json
import time

import uvloop

from twofold.runtime import sampler
from twofold.runtime.sampler import Clock

DEPTH = 12
TURNS = 20


async def at_depth(depth: int, seconds: float, clock: Clock | None) -> tuple[float, int]:
    """(CPU seconds of the process, samples) of an event loop that does nothing, ``depth`` functions deep."""
    if depth:
        return await at_depth(depth - 1, seconds, clock)
    before_s = time.process_time()
    if clock is None:
        await asyncio.sleep(seconds)
        return time.process_time() - before_s, 0
    profile = await sampler.record("bench", seconds=seconds, clock=clock)
    return time.process_time() - before_s, sum(thread.samples for thread in profile.threads)


def turn() -> int:
    """A few microseconds of work."""
    value = 0
    for number in range(50):
        value += number
    return value


async def spin(cpu_s: float) -> float:
    """Turns of an event loop per CPU second of its own thread."""
    until_s, turns = time.thread_time() + cpu_s, 0
    while time.thread_time() < until_s:
        for _ in range(TURNS):
            turn()
        turns += 1
        await asyncio.sleep(0)
    return turns / cpu_s


async def busy(cpu_s: float, clock: Clock | None) -> tuple[float, float]:
    """(turns per CPU second of the main thread, CPU seconds of the process per one of the main thread)."""
    taking = None
    if clock is not None:
        taking = asyncio.create_task(sampler.record("bench", seconds=sampler.MAX_SECONDS, clock=clock))
        await asyncio.sleep(0.05)
    before_s = time.process_time()
    rate = await spin(cpu_s)
    used_s = time.process_time() - before_s
    if taking is not None:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
    return rate, used_s / cpu_s


async def bench(seconds: float) -> dict[str, dict[str, float]]:
    """Figures by clock."""
    idle_s, _ = await at_depth(DEPTH, seconds, None)
    plain, _ = await busy(seconds, None)
    result = {}
    for clock in Clock:
        cpu_s, samples = await at_depth(DEPTH, seconds, clock)
        rate, cores = await busy(seconds, clock)
        result[clock.value] = {
            "us_per_sample_idle": round(1e6 * (cpu_s - idle_s) / samples, 1) if samples else 0.0,
            "cores_idle": round((cpu_s - idle_s) / seconds, 4),
            "extra_cores_busy": round(cores - 1.0, 4),
            "slowdown_busy": round(plain / rate - 1.0, 4),
        }
    return result


def main() -> None:
    """Prints a table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each of the six parts")
    arguments = parser.parse_args()
    result = uvloop.run(bench(arguments.seconds))
    print(
        f"{'clock':>6}  {'us/sample, idle':>16}  {'cores, idle':>11}  {'extra cores, busy':>17}  {'slowdown, busy':>14}"
    )
    for clock, figures in result.items():
        print(
            f"{clock:>6}  {figures['us_per_sample_idle']:>16.1f}  {figures['cores_idle']:>11.3f}  "
            f"{figures['extra_cores_busy']:>17.3f}  {figures['slowdown_busy']:>14.1%}"
        )
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
