"""Soak: thousands of streams for many minutes through one replica with two relays, every token checked.

Emulated engines with a slow step keep the pace low enough for a small machine, so that what is watched is the router:
does its memory stay flat once its tables are full, does it give back every descriptor, is every token right?
"""

import argparse
import asyncio
import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from lib_processes import MIB, ProcessWatch, engine_pids, growth, raise_file_limit, replica_pids
from lib_soak_load import Mix, SoakLoad

from controlplane.discovery.fleet_file import FleetFile
from twofold.cli.demo_fleet import engine_admin_urls, on_free_ports
from twofold.cli.fleet_runner import Fleet, FleetStartError
from twofold.replay import engines
from twofold.replay.client import Client, parse_url
from twofold.replay.compare import worst_lateness
from twofold.runtime.monitor import LAG_BOUNDS_S, RuntimeMonitor

MODEL = "soak"
RELAYS = 2
ENGINES, ENGINES_PER_PROCESS = 8, 4
READY_S = 60.0
SAMPLE_S = 2.0
REQUEST_TIMEOUT_S = 600.0
FILL_CONCURRENCY = 64
DRAIN_S = 30.0
FLAT_SHARE, FLAT_MB = 0.03, 1.5
"""A process is flat when its memory grew by no more than this between the first and last tenth of the run."""
FD_SHARE, FD_SLACK = 0.1, 24
"""Descriptors follow the streams, whose number at any moment is not quite constant."""
FDS_KEPT = 8
"""More descriptors than before the first request that a process may have once all clients are gone."""


def soak_fleet(itl_s: float, streams: int) -> FleetFile:
    """One replica with two relays before engines whose steps take ``itl_s``."""
    profile = {
        "name": "soak",
        "base": "h100-8b-tp1",
        "law": {"base_s": itl_s},
        "kv_capacity_tokens": 1_000_000,
        "max_num_seqs": max(64, streams),
        "max_num_batched_tokens": 131_072,
        "max_model_len_tokens": 131_072,
    }
    group = {
        "profile": "soak",
        "engine": "emulated",
        "replicas": ENGINES,
        "engines_per_process": ENGINES_PER_PROCESS,
        "fault_injection": True,
    }
    pool = {"name": "soak", "models": [MODEL], "max_inflight_per_target": max(1024, streams), "workers": [group]}
    mapping = {
        "name": "soak",
        "routers": {"replicas": 1, "relays": RELAYS},
        "profiles": [profile],
        "pools": [pool],
    }
    return on_free_ports(mapping)


class Soak:
    """One run. ``report`` gives the figures afterwards."""

    def __init__(self, arguments: argparse.Namespace, fleet: Fleet) -> None:
        self._arguments = arguments
        self._fleet = fleet
        self._monitor = RuntimeMonitor()
        self._client = Client(parse_url(fleet.router_urls[0]), time.monotonic)
        self.load = SoakLoad(self._client, MODEL, mix=Mix(), seed=arguments.seed, timeout_s=REQUEST_TIMEOUT_S)
        self._routers: list[str] = []
        self._watch = ProcessWatch({})
        self._fds_before: dict[str, int] = {}
        self._fds_after: dict[str, int] = {}
        self._measured_from_s = 0.0
        self._measured_until_s = 0.0
        self._streams_seen: list[int] = []
        self._host_busy = 0.0
        self._tokens_at_start = 0
        self._drained = False
        self._left_in_router = 0
        self._lateness: float | None = None

    async def run(self) -> None:
        """Fill, ramp, warm up, measure, drain."""
        arguments = self._arguments
        self._find_processes()
        self._watch.sample()
        self._fds_before = {name: samples[-1].fds for name, samples in self._watch.samples.items()}
        note(f"filling the router's tables with {arguments.fill_requests} prefixes")
        sampling = asyncio.create_task(self._sample())
        lag = asyncio.create_task(self._monitor.watch_loop())
        try:
            await self.load.fill(
                arguments.fill_requests, FILL_CONCURRENCY, lambda done: note(f"filled {done}", line=True)
            )
            note(f"{arguments.streams} streams in {arguments.ramp_s:g} s, then {arguments.warmup_s:g} s of warm-up")
            gc.collect()
            gc.freeze()
            streams = asyncio.create_task(self.load.run(arguments.streams, arguments.ramp_s))
            try:
                await self._pause(arguments.ramp_s + arguments.warmup_s, streams)
                await self._measure(streams)
            finally:
                streams.cancel()
                await asyncio.gather(streams, return_exceptions=True)
                gc.unfreeze()
            self._lateness = worst_lateness(
                await asyncio.gather(*map(engines.engine_stats, engine_admin_urls(self._fleet.file)))
            )
            await self._client.close()
            await self._drain()
        finally:
            sampling.cancel()
            lag.cancel()
            await asyncio.gather(sampling, lag, return_exceptions=True)
            await self._client.close()

    def _find_processes(self) -> None:
        fleet = self._fleet
        assert fleet.control_plane is not None
        assert fleet.control_plane.pid is not None
        assert fleet.routers[0].pid is not None
        routers = replica_pids(fleet.routers[0].pid) | {"controlplane": fleet.control_plane.pid}
        self._routers = list(routers)
        others = engine_pids(fleet.control_plane.pid) | {"generator": psutil.Process().pid}
        self._watch = ProcessWatch(routers | others)

    async def _sample(self) -> None:
        while True:
            self._watch.sample()
            if self._measured_from_s and not self._measured_until_s:
                self._streams_seen.append(self.load.under_way)
            await asyncio.sleep(SAMPLE_S)

    async def _measure(self, streams: "asyncio.Task[None]") -> None:
        before = psutil.cpu_times()
        self._tokens_at_start = self.load.totals.delivered
        self._monitor.lag_counts[:] = [0] * len(self._monitor.lag_counts)
        self._measured_from_s = time.monotonic()
        await self._pause(60.0 * self._arguments.minutes, streams)
        self._measured_until_s = time.monotonic()
        now = psutil.cpu_times()
        total = sum(now) - sum(before)
        self._host_busy = 1.0 - (now.idle + now.iowait - before.idle - before.iowait) / total if total > 0 else 0.0

    async def _pause(self, wait_s: float, streams: "asyncio.Task[None]") -> None:
        """Wait, telling how it goes; ends at once with the error of streams that broke."""
        until_s = time.monotonic() + wait_s
        while (left_s := until_s - time.monotonic()) > 0:
            await asyncio.wait({streams}, timeout=min(left_s, 10.0))
            if streams.done():
                streams.result()
                raise RuntimeError("the streams ended by themselves")
            totals = self.load.totals
            note(
                f"{left_s:5.0f} s left: {self.load.under_way} streams, {totals.requests} requests, "
                f"{totals.delivered} tokens, {len(totals.violations)} wrong, {sum(totals.errors.values())} errors",
                line=True,
            )

    async def _drain(self) -> None:
        """With all clients gone the router must give everything back."""
        watch = self._watch
        until_s = time.monotonic() + DRAIN_S
        kept = FDS_KEPT + 1
        while (kept > 0 or self._left_in_router) and time.monotonic() < until_s:
            await asyncio.sleep(0.5)
            watch.sample()
            self._fds_after = {name: samples[-1].fds for name, samples in watch.samples.items()}
            self._left_in_router = await self._inflight()
            kept = max(self._fds_after[name] - self._fds_before[name] for name in self._routers)
        self._drained = kept <= FDS_KEPT and self._left_in_router == 0

    async def _inflight(self) -> int:
        url = f"{self._fleet.router_admin_urls[0]}/debug/state"
        async with aiohttp.ClientSession() as session, session.get(url) as reply:
            state = await reply.json()
        return sum(relay["inflight"] for relay in state["relays"].values())

    def report(self) -> dict[str, Any]:
        """The value of the RESULT line."""
        totals, window_s = self.load.totals, self._measured_until_s - self._measured_from_s
        memory = {name: self._memory(name) for name in self._watch.samples}
        descriptors = {name: self._descriptors(name) for name in self._routers}
        return {
            "streams": self._arguments.streams,
            "duration_s": round(window_s, 1),
            "requests": totals.requests,
            "errors": sum(totals.errors.values()),
            "tokens_delivered": totals.delivered,
            "tokens_verified": totals.verified,
            "chain_violations": len(totals.violations),
            "rss_mb": {name: memory[name] for name in self._routers},
            "rss_flat": not self._watch.gone and all(self._flat(name) for name in self._routers),
            "open_fds_flat": self._drained and all(found["flat"] for found in descriptors.values()),
            "disconnects": totals.disconnects,
            "errors_by_kind": dict(totals.errors),
            "tokens_per_s": round((totals.delivered - self._tokens_at_start) / window_s, 1),
            "streams_under_way_min": min(self._streams_seen, default=0),
            "open_fds": descriptors,
            "inflight_after_drain": self._left_in_router,
            "processes_lost": sorted(self._watch.gone),
            "others_rss_mb": {name: memory[name] for name in memory if name not in self._routers},
            "cores": {name: round(self._watch.cores(name, self._measured_from_s), 3) for name in memory},
            "host_cpu": round(self._host_busy, 3),
            "generator_lag_p99_s": lag_quantile(self._monitor.lag_counts, 0.99),
            "engine_lateness_p99_ratio": self._lateness,
        }

    def write_samples(self, path: Path) -> None:
        """All looks at all processes, as CSV; times count from the beginning of the measured time."""
        lines = ["process,at_s,rss_bytes,private_bytes,fds,cpu_s"]
        for name, samples in self._watch.samples.items():
            lines += [
                f"{name},{s.at_s - self._measured_from_s:.1f},{s.rss_bytes},{s.private_bytes},{s.fds},{s.cpu_s:.2f}"
                for s in samples
            ]
        path.write_text("\n".join(lines) + "\n")

    def _points(self, name: str, field: str) -> list[tuple[float, float]]:
        samples = self._watch.since(name, self._measured_from_s)
        return [(s.at_s, float(getattr(s, field))) for s in samples if s.at_s <= self._measured_until_s]

    def _memory(self, name: str) -> dict[str, float]:
        found, private = growth(self._points(name, "rss_bytes")), growth(self._points(name, "private_bytes"))
        return {
            "after_warmup": round(found.first / MIB, 1),
            "end": round(found.last / MIB, 1),
            "slope_mb_per_h": round(found.slope_per_h / MIB, 2),
            "private_end": round(private.last / MIB, 1),
            "private_slope_mb_per_h": round(private.slope_per_h / MIB, 2),
        }

    def _flat(self, name: str) -> bool:
        found = growth(self._points(name, "rss_bytes"))
        return found.last - found.first <= max(FLAT_SHARE * found.first, FLAT_MB * MIB)

    def _descriptors(self, name: str) -> dict[str, Any]:
        found = growth(self._points(name, "fds"))
        before, after = self._fds_before[name], self._fds_after.get(name, 0)
        grew = found.last > found.first * (1 + FD_SHARE) + FD_SLACK
        return {
            "before": before,
            "after_warmup": round(found.first),
            "end": round(found.last),
            "after_drain": after,
            "flat": not grew and after <= before + FDS_KEPT,
        }


def lag_quantile(counts: Sequence[int], q: float) -> float | None:
    """Upper bound of the bucket that holds the ``q`` quantile; None above the last bound or without values."""
    total, below = sum(counts), 0
    for count, bound in zip(counts, LAG_BOUNDS_S, strict=False):
        below += count
        if total and below >= q * total:
            return bound
    return None


def note(text: str, *, line: bool = False) -> None:
    """Progress on standard error; on a terminal ``line`` is overwritten by the next one."""
    ends = "\r" if line and sys.stderr.isatty() else "\n"
    sys.stderr.write(f"soak: {text:<100}{ends}")
    sys.stderr.flush()


def table(result: dict[str, Any]) -> str:
    """The figures by process as aligned text."""
    rows = [("process", "MB after warm-up", "MB at end", "MB/h", "of it private", "fds", "fds at end", "cores")]
    for name, memory in (result["rss_mb"] | result["others_rss_mb"]).items():
        fds = result["open_fds"].get(name, {})
        rows.append(
            (
                name,
                f"{memory['after_warmup']:.1f}",
                f"{memory['end']:.1f}",
                f"{memory['slope_mb_per_h']:+.1f}",
                f"{memory['private_end']:.1f}",
                str(fds.get("after_warmup", "")),
                str(fds.get("end", "")),
                f"{result['cores'][name]:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000, help="streams at any time (default 2000)")
    parser.add_argument("--minutes", type=float, default=15.0, help="measured time (default 15)")
    parser.add_argument("--itl-s", type=float, default=0.5, help="time between tokens of a stream (default 0.5)")
    parser.add_argument("--ramp-s", type=float, default=20.0, help="time in which the streams start (default 20)")
    parser.add_argument(
        "--warmup-s", type=float, default=120.0, help="time with all streams before measuring (default 120)"
    )
    parser.add_argument(
        "--fill-requests", type=int, default=150_000, help="short requests at first, to fill tables (default 150000)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", help="write every look at every process to this CSV file")
    parser.add_argument("--run-dir", help="keep logs and state here; default: a temporary directory")
    return parser.parse_args(argv)


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run it in a fleet of its own."""
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        run_dir = arguments.run_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="twofold-soak-"))
        fleet = Fleet(soak_fleet(arguments.itl_s, arguments.streams), Path(run_dir), log_level="warning")
        async with fleet:
            await fleet.wait_ready(READY_S)
            run = Soak(arguments, fleet)
            await run.run()
            result = run.report()
            if arguments.samples:
                run.write_samples(Path(arguments.samples))
        for text in (*run.load.totals.error_texts, *run.load.totals.violations[:20]):
            note(text)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """0 when nothing was wrong, grew or was left behind; 1 otherwise; 130 when interrupted."""
    arguments = parse(argv)
    try:
        result = uvloop.run(soak(arguments))
    except KeyboardInterrupt:
        note("interrupted; the fleet has ended")
        return 130
    except (FleetStartError, OSError, RuntimeError) as error:
        note(f"failed: {error}")
        return 1
    print(table(result))
    print(
        f"\n{result['requests']} requests, {result['errors']} errors, {result['disconnects']} clients left; "
        f"{result['tokens_verified']} of {result['tokens_delivered']} tokens verified, "
        f"{result['chain_violations']} wrong; {result['tokens_per_s']:.0f} tokens/s, host {result['host_cpu']:.0%} busy"
    )
    print("RESULT " + json.dumps(result))
    proven = result["tokens_verified"] == result["tokens_delivered"] > 0
    clean = not result["errors"] and not result["chain_violations"] and proven
    return 0 if clean and result["rss_flat"] and result["open_fds_flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
