"""What probing costs: cores of the control plane for 100 workers, and CPU time of an engine for one scrape.

The control plane's own prober and reducer run in a process of their own against stand-ins for engines, which answer the
recorded metrics body of a real vLLM with figures that move. Measured at the schedule of production (healthy workers,
routers reporting: 0.2 Hz), without routers (1 Hz) and at the fastest (2 Hz), for engines that answer the needed series
alone, as vLLM does, and for engines that always answer the whole body. Every probe must succeed.

The engine's side is measured on a real vLLM (--engine-url URL, or --vllm to start one), else on the emulator.
"""

import argparse
import asyncio
import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import uvloop
from lib_fleet import engines, free_port, usage

from controlplane.core import Core
from controlplane.fleet.events import ConfigChanged, SourceChanged
from controlplane.fleet.values import ProbeOutcome, Source, WorkerSpec
from controlplane.probes.client import NAMED_METRICS, ProbeClient
from controlplane.probes.prober import Intervals, Prober
from twofold.model.fleet import Health, Pool
from twofold.profiles import get

ROOT = Path(__file__).parent.parent
SCHEDULES = {"production": 5.0, "no routers": 1.0, "fastest": 0.5}


async def probe_for_ever(ports: list[int], interval_s: float) -> None:
    """The control plane's part: probe the workers at these ports, reduce the results; a line of counts at SIGTERM."""
    profile = get("l4-8b-tp1")
    core = Core(1)
    counts = dict.fromkeys(ProbeOutcome, 0)

    def observe(outcome: ProbeOutcome, seconds: float) -> None:
        counts[outcome] += 1

    versions = itertools.count(1)
    now_s = time.monotonic()
    pool = Pool(name="p", models=("m",))
    core.push(ConfigChanged(at_s=now_s, version=next(versions), pools=(pool,), profiles=(profile,)))
    workers = tuple(
        WorkerSpec(worker_id=f"w{port}", url=f"http://127.0.0.1:{port}", pool="p", profile=profile.name)
        for port in ports
    )
    core.push(SourceChanged(at_s=now_s, source=Source.FILE, version=next(versions), workers=workers))
    client = ProbeClient()
    prober = Prober(
        client,
        core.push,
        lambda worker_id: core.state.workers.get(worker_id),
        lambda target_id: (0, 0),
        lambda: True,
        observe=observe,
        intervals=Intervals(unsure=min(0.5, interval_s), reported=interval_s),
    )
    core.start()
    prober.set_workers((worker.worker_id, worker.url, "m") for worker in workers)
    prober.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    while any(record.health is not Health.HEALTHY for record in core.state.workers.values()) or not core.state.workers:
        await asyncio.sleep(0.05)
    # One whole interval more, so that the burst of the beginning has spread out.
    await asyncio.sleep(interval_s)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    before = dict(counts)
    await stop.wait()
    sys.stdout.write(json.dumps({outcome: counts[outcome] - before[outcome] for outcome in counts}) + "\n")
    await prober.stop()
    await client.close()
    await core.stop()


def bench_cores(workers: int, interval_s: float, seconds: float, *, filters: bool) -> tuple[float, float, float]:
    """(cores, probes per second, CPU ms of the stand-ins per probe) for ``workers`` workers."""
    with engines(workers, filters=filters) as (stand_ins, ports):
        argv = [sys.executable, __file__, "--probe", json.dumps(ports), "--interval", str(interval_s)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("the prober did not start")
            begun_s, before_s, engines_s = time.monotonic(), usage(process.pid)[0], usage(stand_ins.pid)[0]
            time.sleep(seconds)
            used_s, passed_s = usage(process.pid)[0] - before_s, time.monotonic() - begun_s
            engines_s = usage(stand_ins.pid)[0] - engines_s
            process.send_signal(signal.SIGTERM)
            counts = json.loads(process.stdout.readline())
        finally:
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()
    done = sum(counts.values())
    if not done or counts[ProbeOutcome.OK] != done:
        raise RuntimeError(f"probes that failed: {counts}")
    return used_s / passed_s, done / passed_s, 1e3 * engines_s / done


def get_url(url: str, accept: str = "identity") -> bytes:
    """Body of a GET."""
    request = urllib.request.Request(url, headers={"accept-encoding": accept})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return bytes(reply.read())


def listener(port: int) -> int:
    """Pid of the process that listens on a port of this machine. Raises RuntimeError."""
    for connection in psutil.net_connections("tcp"):
        local: Any = connection.laddr
        if connection.status == psutil.CONN_LISTEN and local.port == port and connection.pid:
            return int(connection.pid)
    raise RuntimeError(f"no process found that listens on port {port}")


def bench_engine(url: str, scrapes: int) -> dict[str, tuple[float, int]]:
    """Kind of scrape -> (CPU ms of the engine's front process for one, bytes of the answer)."""
    pid = listener(int(url.rsplit(":", 1)[1]))
    kinds = {
        "whole": ("/metrics", "identity"),
        "whole, gzip": ("/metrics/", "gzip"),
        "by name": (NAMED_METRICS, "identity"),
        "/health": ("/health", "identity"),
    }
    found = {}
    for kind, (path, accept) in kinds.items():
        try:
            size = len(get_url(url + path, accept))
        except OSError:
            continue
        before_s = usage(pid)[0]
        for _ in range(scrapes):
            get_url(url + path, accept)
        found[kind] = (1e3 * (usage(pid)[0] - before_s) / scrapes, size)
    return found


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """A running emulated engine's URL."""
    port = free_port()
    argv = [sys.executable, "-m", "emulator", "--profile", "l4-8b-tp1", "--model", "m", "--port", str(port)]
    process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_for(f"http://127.0.0.1:{port}", 30.0)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def wait_for(url: str, timeout_s: float) -> None:
    """Wait until an engine is healthy. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError):
            get_url(url + "/health")
            return
        time.sleep(0.2)
    raise TimeoutError(f"{url} is not healthy after {timeout_s:g} s")


@contextlib.contextmanager
def vllm() -> Iterator[str]:
    """A real vLLM on CPU with the tiny model of the tests: its URL."""
    venv = subprocess.run([str(ROOT / "scripts/install_vllm.sh")], check=True, stdout=subprocess.PIPE, text=True)
    sys.path.insert(0, str(ROOT / "tests" / "vllm"))
    settings: Any = importlib.import_module("vllm_engine")
    port = free_port()
    python = str(Path(venv.stdout.split()[-1]) / "bin" / "python")
    argv = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*argv, *settings.ENGINE_ARGS],
        env={**os.environ, **settings.ENGINE_ENV},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}", 180.0)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def bench(options: argparse.Namespace) -> dict[str, object]:
    """All measurements; prints the tables."""
    result: dict[str, object] = {}
    print(f"{'schedule':>12}  {'answers':>8}  {'probes/s':>8}  {'cores per 100 workers':>21}  {'us per probe':>12}")
    worst = 0.0
    for schedule, interval_s in SCHEDULES.items():
        for filters in (True, False):
            sys.stderr.write(f"{schedule}, {'by name' if filters else 'whole'}\n")
            cores, rate, _ = bench_cores(options.workers, interval_s, options.seconds, filters=filters)
            us_per_probe = 1e6 * cores / rate
            cores *= 100 / options.workers
            kind = "by name" if filters else "whole"
            print(f"{schedule:>12}  {kind:>8}  {rate:8.1f}  {cores:21.4f}  {us_per_probe:12.0f}")
            result[f"cores_{schedule}_{kind}".replace(" ", "_")] = round(cores, 4)
            if schedule == "production":
                worst = max(worst, cores)
    engine = (
        contextlib.nullcontext(options.engine_url) if options.engine_url else vllm() if options.vllm else emulator()
    )
    name = "engine" if options.engine_url else "vllm" if options.vllm else "emulator"
    sys.stderr.write(f"scrapes of {name}\n")
    with engine as url:
        scrapes = bench_engine(url, options.scrapes)
    print(f"\n{'scrape of ' + name:>20}  {'CPU ms':>7}  {'bytes':>7}")
    for kind, (ms, size) in scrapes.items():
        print(f"{kind:>20}  {ms:7.2f}  {size:7d}")
    asked = scrapes.get("by name", scrapes["whole"])
    return {
        "cores_per_100_workers": round(worst, 4),
        "ms_per_scrape_on_engine": round(asked[0], 3),
        "engine": name,
        "ms_per_whole_scrape_on_engine": round(scrapes["whole"][0], 3),
        "ms_per_gzip_scrape_on_engine": round(scrapes["whole, gzip"][0], 3) if "whole, gzip" in scrapes else None,
        "bytes_per_scrape": asked[1],
        "bytes_per_whole_scrape": scrapes["whole"][1],
        **result,
    }


def main() -> None:
    """Print tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--engine-url", default="", help="http://127.0.0.1:PORT of a running engine on this machine")
    parser.add_argument("--vllm", action="store_true", help="start a real vLLM for the engine's side")
    parser.add_argument("--scrapes", type=int, default=200, help="of the engine, of each kind")
    parser.add_argument("--probe", default="", help=argparse.SUPPRESS)
    parser.add_argument("--interval", type=float, default=5.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        uvloop.run(probe_for_ever(json.loads(options.probe), options.interval))
        return
    print("RESULT " + json.dumps(bench(options)))


if __name__ == "__main__":
    main()
