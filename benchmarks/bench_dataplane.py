"""What a relay costs beside other routers: CPU per request and per streamed event, added latency, memory.

All proxies run at once over the same worker stand-ins and are visited one after the other in short bursts of the same
requests; each figure is the median over bursts. Costs are CPU time (user and system) of a proxy's whole process tree,
so that other work on the machine counts little; every byte of every answer is checked.
"""

import argparse
import asyncio
import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from dataplane import client
from dataplane.loads import FILL, LOADS, Load, requests, unrelated_requests
from dataplane.proxies import Proxy, ProxyError, spent_s, start

WORKERS = 4
PEERS = "nginx,vllm-router,sglang-router"
POLICIES = {"vllm-router": ("round_robin", "cache_aware"), "sglang-router": ("cache_aware",)}
RAMP_S = {"s64": 0.6, "s512": 1.2}
WARM_UP_SHARE = 0.1
BURST_TIMEOUT_S = 60.0


class Visit(NamedTuple):
    """One burst on one proxy. Costs in microseconds of CPU per request or event."""

    cost_us: float
    beside_us: float
    parts_us: dict[str, float]
    """By process of the tree."""
    ratio: float
    """CPU of the proxy over CPU of the load generator."""
    ttft_s: list[float]
    payload_bytes: int
    errors: list[str]


class Bench:
    """Visits the proxies and keeps what came of it."""

    def __init__(self, workers: list[int], seconds: float) -> None:
        self._workers = workers
        self._seconds = seconds
        self.visits: dict[tuple[str, str], list[Visit]] = {}

    async def visit(self, name: str, proxy: Proxy | None, load: Load, round_number: int, share: float = 1.0) -> Visit:
        """One burst; ``proxy`` None goes to the workers directly."""
        seconds = self._seconds * share
        count = load.requests(seconds)
        # Made beforehand where there are few of them; the cost of making the others is the generator's.
        made = requests(load, round_number, count)
        burst = client.Burst(load, iter(list(made)) if load.events else made)
        connections = await client.connect(burst, [proxy.port] if proxy else self._workers, load.connections)
        await asyncio.sleep(0.05)
        before = (proxy.cpu_s(), proxy.beside_cpu_s()) if proxy else ({}, {})
        own_s = time.process_time()
        await client.run(burst, connections, RAMP_S.get(load.name, 0.0), BURST_TIMEOUT_S)
        own_s = time.process_time() - own_s
        after = (proxy.cpu_s(), proxy.beside_cpu_s()) if proxy else ({}, {})
        spent = spent_s(before[0], after[0])
        for connection in connections:
            connection.close()
        if burst.right + len(burst.errors) < count:
            burst.errors.append(f"{burst.right} answers to {count} requests")
        units = load.units(seconds)
        return Visit(
            cost_us=1e6 * spent / units,
            beside_us=1e6 * spent_s(before[1], after[1]) / units,
            parts_us={
                role: 1e6 * (after[0].get(pid, 0.0) - before[0].get(pid, 0.0)) / units
                for pid, role in (proxy.roles() if proxy else {}).items()
            },
            ratio=spent / own_s,
            ttft_s=burst.first_event_s,
            payload_bytes=burst.payload_bytes,
            errors=burst.errors,
        )

    async def fill(self, proxy: Proxy, count: int) -> dict[str, float]:
        """Memory by process once every bounded map has met more entries than it holds."""
        await asyncio.to_thread(set_pace, self._workers[0], FILL)
        burst = client.Burst(FILL, unrelated_requests(count))
        connections = await client.connect(burst, [proxy.port], FILL.connections)
        await client.run(burst, connections, 0.0, 2 * BURST_TIMEOUT_S)
        memory = proxy.rss_mb()
        for connection in connections:
            connection.close()
        if burst.errors:
            say(f"fill: {len(burst.errors)} ERRORS, first: {burst.errors[0]}")
        return memory

    async def run(self, proxies: dict[str, Proxy | None], loads: list[Load], rounds: int) -> None:
        """``rounds`` visits of every proxy with every load, after one short visit that does not count."""
        for load in loads:
            await asyncio.to_thread(set_pace, self._workers[0], load)
            for name, proxy in proxies.items():
                await self.visit(name, proxy, load, -1, WARM_UP_SHARE)
        for round_number in range(rounds):
            for load in loads:
                await asyncio.to_thread(set_pace, self._workers[0], load)
                names = list(proxies)
                turn = round_number % len(names)
                for name in names[turn:] + names[:turn]:
                    gc.collect()
                    visit = await self.visit(name, proxies[name], load, round_number)
                    self.visits.setdefault((name, load.name), []).append(visit)
                    note = f"; {len(visit.errors)} ERRORS, first: {visit.errors[0]}" if visit.errors else ""
                    parts = " ".join(f"{role} {cost:.1f}" for role, cost in visit.parts_us.items())
                    beside = f", beside it {visit.beside_us:.1f}" if visit.beside_us else ""
                    say(
                        f"round {round_number + 1}/{rounds} {load.name:5} {name:25} {visit.cost_us:8.1f} us"
                        f" ({parts}{beside}){note}"
                    )

    def figures(self, name: str, loads: list[Load]) -> dict[str, Any]:
        """The keys of one proxy."""
        found: dict[str, Any] = {}
        errors = 0
        for load in loads:
            visits = self.visits[name, load.name]
            errors += sum(len(visit.errors) for visit in visits)
            if name != "direct":
                found[load.key] = round(statistics.median(visit.cost_us for visit in visits), 1)
                found[f"{load.key}_min"] = round(min(visit.cost_us for visit in visits), 1)
                found[f"{load.key}_per_load_cpu"] = round(statistics.median(visit.ratio for visit in visits), 2)
            if load.name == "s64":
                found["ttft_p50_ms"] = round(1e3 * statistics.median(t for visit in visits for t in visit.ttft_s), 2)
        found["payload_bytes"] = sum(visit.payload_bytes for load in loads for visit in self.visits[name, load.name])
        found["errors"] = errors
        return found


def set_pace(port: int, load: Load) -> None:
    """Tell the worker stand-ins how to answer."""
    body = json.dumps({"events": load.events, "gap_ms": load.gap_ms}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/pace", data=body), timeout=5):
        pass


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def names_of(peers: str) -> list[str]:
    """The proxies to measure: the peers, each with its policies, then Twofold."""
    names = []
    for peer in filter(None, peers.split(",")):
        names += [f"{peer}:{policy}" for policy in POLICIES[peer]] if peer in POLICIES else [peer]
    return [*names, "twofold"]


def table(result: dict[str, Any], loads: list[Load]) -> str:
    """The figures as aligned text: median (least; proxy CPU over load generator CPU)."""
    rows = [("proxy", *(load.key for load in loads), "ttft_added_p50_ms", "rss_mb")]
    for name, figures in result.items():
        if figures is None:
            rows.append((name, *("not measured" for _ in loads), "", ""))
            continue
        cells = [
            f"{figures[load.key]} ({figures[load.key + '_min']}; {figures[load.key + '_per_load_cpu']})"
            if load.key in figures
            else "-"
            for load in loads
        ]
        rows.append((name, *cells, str(figures.get("ttft_added_p50_ms", "-")), str(figures.get("rss_mb", "-"))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


async def measure(arguments: argparse.Namespace, workers: list[int], folder: Path) -> dict[str, Any]:
    """Everything that goes into RESULT."""
    loads = [LOADS[name] for name in arguments.loads.split(",")]
    running: dict[str, Proxy | None] = {"direct": None}
    result: dict[str, Any] = dict.fromkeys(["direct", *names_of(arguments.peers)])
    bench = Bench(workers, arguments.seconds)
    task = asyncio.current_task()
    assert task is not None
    # A run that is told to stop must not leave routers behind.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        for name in names_of(arguments.peers):
            say(f"starting {name}")
            try:
                running[name] = await asyncio.to_thread(start, name, workers, folder)
            except ProxyError as error:
                say(f"{name}: {error}")
        await bench.run(running, loads, arguments.rounds)
        for name, proxy in running.items():
            figures = result[name] = bench.figures(name, loads)
            if proxy is not None:
                memory = proxy.rss_mb()
                figures["rss_mb"] = round(sum(memory.values()), 1)
                figures["rss_mb_by_process"] = memory
                if name == "twofold" and arguments.fill:
                    say(f"filling the maps of {name}")
                    figures["rss_mb_full_by_process"] = await bench.fill(proxy, arguments.fill)
    finally:
        for proxy in running.values():
            if proxy is not None:
                await asyncio.to_thread(proxy.stop)
    direct_ms = result["direct"].get("ttft_p50_ms")
    for figures in result.values():
        if figures is not None and direct_ms is not None:
            figures["ttft_added_p50_ms"] = round(figures.pop("ttft_p50_ms") - direct_ms, 2)
    return result


def main() -> int:
    """Prints the table and the RESULT line; 1 when answers were wrong or missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default=PEERS, help="comma-separated, of nginx, vllm-router, sglang-router")
    parser.add_argument("--loads", default=",".join(LOADS), help="comma-separated, of " + ", ".join(LOADS))
    parser.add_argument("--rounds", type=int, default=3, help="bursts of each load on each proxy")
    parser.add_argument("--seconds", type=float, default=1.0, help="size of a burst of unstreamed requests")
    parser.add_argument("--fill", type=int, default=70_000, help="unrelated requests before memory is read again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="twofold-bench-") as folder:
        upstream = subprocess.Popen(
            [sys.executable, "-m", "dataplane.upstream", str(WORKERS)],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert upstream.stdout is not None
            workers = json.loads(upstream.stdout.readline())
            result = uvloop.run(measure(arguments, workers, Path(folder)))
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM
        finally:
            upstream.terminate()
            upstream.wait()
    loads = [LOADS[name] for name in arguments.loads.split(",")]
    print("CPU time: median (least; over the load generator's), microseconds\n" + table(result, loads))
    print("RESULT " + json.dumps(result))
    return 1 if any(figures["errors"] for figures in result.values() if figures is not None) else 0


if __name__ == "__main__":
    sys.exit(main())
