"""Does an emulated engine take the time that the real one does?

Starts a real vLLM engine (CPU build, tiny model), measures it with ``twofold profile``, sends it a seeded mix of
requests, and sends the same requests at the same times to the emulator with the measured profile. Both are alone on the
machine with the load generator, one after the other. Needs the venv that scripts/install_vllm.sh makes.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from emulator.__main__ import read_profiles
from twofold.calibration.engine import Engine
from twofold.calibration.values import Timing
from twofold.cli.replay import run_loop
from twofold.model.profile import EngineProfile
from twofold.profiles import load_profiles

ROOT = Path(__file__).resolve().parents[1]
QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
TOLERANCE = 0.15
READY_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0
TOKEN_IDS = range(300, 900)
"""In the vocabularies of the tiny model and of the emulator."""


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """The workload: lengths are log-uniform, arrivals Poisson, some prompts begin alike."""

    prompt_tokens: tuple[int, int] = (16, 1500)
    output_tokens: tuple[int, int] = (8, 200)
    shared_tokens: int = 512
    shared_prefixes: int = 4
    shared_share: float = 0.3
    """Share of the prompts longer than a prefix that begin with one."""


class Arrival(msgspec.Struct, frozen=True):
    """A request of the mix: when it is sent, its prompt, and how many tokens it asks for."""

    at_s: float
    prompt: list[int]
    output_tokens: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the client saw of one engine, in seconds; ``lateness_s``: p99 of sent minus due."""

    timings: list[Timing]
    """In the order of the requests, on a clock that is 0 at the start of the run."""
    ttft_s: list[float]
    itl_s: list[float]
    e2e_s: list[float]
    cached_tokens: int
    lateness_s: float
    duration_s: float
    host_cpu: float
    steal: float


def arrivals(mix: Mix, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """The requests of a run; the same for the same arguments."""
    rng = random.Random(seed)

    def length(bounds: tuple[int, int]) -> int:
        low, high = bounds
        return round(low * math.exp(rng.random() * math.log(high / low)))

    def words(count: int) -> list[int]:
        return rng.choices(TOKEN_IDS, k=count)

    prefixes = [words(mix.shared_tokens) for _ in range(mix.shared_prefixes)]
    found: list[Arrival] = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        prompt = words(length(mix.prompt_tokens))
        if len(prompt) > mix.shared_tokens and rng.random() < mix.shared_share:
            prompt[: mix.shared_tokens] = rng.choice(prefixes)
        found.append(Arrival(at_s, prompt, length(mix.output_tokens)))
        at_s += rng.expovariate(rate)
    return found


def capacity_rps(profile: EngineProfile, mix: Mix) -> float:
    """Requests of the mix per second that the law allows with the largest batch: base cost shared by all its slots."""
    sample = arrivals(mix, 100.0, 20.0, seed=1)
    law = profile.law
    seconds = 0.0
    for request in sample:
        new = len(request.prompt)
        context = new + request.output_tokens / 2
        per_token_s = law.decode_per_seq_s + law.decode_per_kv_token_s * context + law.base_s / profile.max_num_seqs
        seconds += law.prefill_per_seq_s + law.prefill_work_s(new, 0) + request.output_tokens * per_token_s
    return len(sample) / seconds


async def send_all(url: str, requests: Sequence[Arrival], *, warm_up: int = 24) -> Outcome:
    """Send every request when it is due, whatever became of the others. Raises EngineError for any failure."""
    engine = Engine(url, clock=time.monotonic, seed=7)
    found: dict[int, Timing] = {}
    try:
        await engine.facts()
        for index in range(warm_up):
            await engine.ask(random.Random(index).choices(TOKEN_IDS, k=32 + 8 * index), 8, timeout_s=REQUEST_TIMEOUT_S)
        start_s = time.monotonic() + 0.2
        cpu = psutil.cpu_times()

        async def one(index: int, request: Arrival) -> None:
            await asyncio.sleep(max(0.0, start_s + request.at_s - time.monotonic()))
            found[index] = await engine.ask(request.prompt, request.output_tokens, timeout_s=REQUEST_TIMEOUT_S)

        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                group.create_task(one(index, request))
        end_s = time.monotonic()
        used, steal = _cpu_shares(cpu, psutil.cpu_times())
    finally:
        await engine.close()
    timings = [_shifted(found[index], start_s) for index in range(len(requests))]
    late = [timing.sent_s - request.at_s for timing, request in zip(timings, requests, strict=True)]
    return Outcome(
        timings=timings,
        ttft_s=[timing.ttft_s for timing in timings],
        itl_s=[gap for timing in timings for gap in np.diff(timing.events_s).tolist()],
        e2e_s=[timing.events_s[-1] - timing.sent_s for timing in timings],
        cached_tokens=sum(timing.cached_tokens for timing in timings),
        lateness_s=float(np.quantile(late, 0.99)),
        duration_s=end_s - start_s,
        host_cpu=used,
        steal=steal,
    )


def _shifted(timing: Timing, start_s: float) -> Timing:
    events_s = tuple(event_s - start_s for event_s in timing.events_s)
    return msgspec.structs.replace(timing, sent_s=timing.sent_s - start_s, events_s=events_s)


def _cpu_shares(before: Any, after: Any) -> tuple[float, float]:
    spent = {name: getattr(after, name) - getattr(before, name) for name in after._fields}
    whole = sum(spent.values()) or 1.0
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    return 1 - idle / whole, spent.get("steal", 0.0) / whole


@contextlib.contextmanager
def real_engine(venv: Path, folder: Path) -> Iterator[str]:
    """A vLLM engine as the tests start it, on one OpenMP thread; gives its URL."""
    path = ROOT / "tests" / "vllm" / "vllm_engine.py"
    spec = importlib.util.spec_from_file_location("vllm_engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vllm_engine"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    engine = module.VllmEngine(venv=venv, folder=folder)
    try:
        engine.start()
        engine.wait_ready(READY_TIMEOUT_S)
        yield engine.url
    finally:
        engine.stop()


@contextlib.contextmanager
def emulated_engine(profile_file: Path, name: str, folder: Path) -> Iterator[str]:
    """The emulator with a profile from a file; gives its URL."""
    ready = folder / "ready.json"
    command = [sys.executable, "-m", "emulator", "--profile-file", str(profile_file), "--profile", name]
    command += [
        "--model",
        "tiny",
        "--port",
        "0",
        "--ready-file",
        str(ready),
        "--log-file",
        str(folder / "emulator.log"),
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline_s = time.monotonic() + 60
        while not ready.exists() or not ready.read_text().strip():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit("the emulator did not start: " + (folder / "emulator.log").read_text()[-2000:])
            time.sleep(0.05)
        yield f"http://127.0.0.1:{json.loads(ready.read_text())['ports'][0]}"
    finally:
        process.terminate()
        process.wait(30)


def measure_profile(url: str, out: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Run ``twofold profile``; its RESULT."""
    command = [sys.executable, "-m", "twofold", "profile", url, "--out", str(out), "--name", "measured", *extra]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"twofold profile failed with {done.returncode}")
    line = done.stdout.rstrip().rpartition("\n")[2]
    return dict(json.loads(line.removeprefix("RESULT ")))


def ratios(real: Outcome, emulated: Outcome) -> dict[str, float]:
    """Emulated over real, per kind and quantile."""
    return {
        f"{kind}_{name}_ratio": float(np.quantile(ours, q)) / float(np.quantile(theirs, q))
        for kind, ours, theirs in (
            ("ttft", emulated.ttft_s, real.ttft_s),
            ("itl", emulated.itl_s, real.itl_s),
            ("e2e", emulated.e2e_s, real.e2e_s),
        )
        for name, q in QUANTILES
    }


def print_outcomes(console: Console, real: Outcome, emulated: Outcome) -> None:
    """The figures side by side."""
    table = Table(title="Real engine and emulator, milliseconds", title_justify="left", box=None, pad_edge=False)
    for name in ("", "", "real", "emulated", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for kind, theirs, ours in (
        ("TTFT", real.ttft_s, emulated.ttft_s),
        ("ITL", real.itl_s, emulated.itl_s),
        ("E2E", real.e2e_s, emulated.e2e_s),
    ):
        for name, q in QUANTILES:
            a, b = float(np.quantile(theirs, q)), float(np.quantile(ours, q))
            table.add_row(kind, name, f"{a * 1e3:.2f}", f"{b * 1e3:.2f}", f"{b / a:.3f}")
    console.print(table)
    for name, outcome in (("real", real), ("emulated", emulated)):
        console.print(
            f"{name}: {len(outcome.ttft_s)} requests in {outcome.duration_s:.0f} s, {outcome.cached_tokens} prompt "
            f"tokens from cache, host CPU {outcome.host_cpu:.0%} (stolen {outcome.steal:.1%}), sent late p99 "
            f"{outcome.lateness_s * 1e3:.1f} ms",
            highlight=False,
            soft_wrap=True,
        )


def run(options: argparse.Namespace, folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """The whole comparison; what the RESULT line says."""
    mix = Mix()
    profile_file = Path(options.profile_file or folder / "measured.yaml")
    measured: dict[str, Any] = {}
    with real_engine(Path(options.vllm_venv), folder / "engine") as url:
        note(f"a real engine serves at {url}")
        if not options.profile_file:
            note("measuring its profile")
            extra = ["--max-seconds", str(options.profile_seconds), "--gpu", "CPU", "--plain"]
            measured = measure_profile(url, profile_file, extra)
        (profile,) = load_profiles(read_profiles(str(profile_file))).values()
        capacity = capacity_rps(profile, mix)
        rate = options.rate or options.load * capacity
        requests = arrivals(mix, rate, options.seconds, options.seed)
        note(f"{len(requests)} requests to it: {rate:.1f} per second, {rate / capacity:.0%} of its capacity")
        real = run_loop(send_all(url, requests))
    with emulated_engine(profile_file, profile.name, folder) as url:
        note("the same requests to the emulator")
        emulated = run_loop(send_all(url, requests))
    console = Console(width=110)
    print_outcomes(console, real, emulated)
    found = ratios(real, emulated)
    judged = [value for key, value in found.items() if key.startswith(("ttft", "itl")) and "p99" not in key]
    everything = [value for key, value in found.items() if key.startswith(("ttft", "itl"))]
    if options.dump:
        dump = {"profile": profile, "requests": requests, "real": real, "emulated": emulated}
        Path(options.dump).write_bytes(msgspec.json.encode(dump))
    return {
        **{key: round(value, 4) for key, value in found.items()},
        "within_15_percent": all(abs(value - 1) <= TOLERANCE for value in judged),
        "within_15_percent_p99": all(abs(value - 1) <= TOLERANCE for value in everything),
        "requests": len(requests),
        "requests_per_s": round(rate, 3),
        "share_of_capacity": round(rate / capacity, 3),
        "cached_tokens_real": real.cached_tokens,
        "cached_tokens_emulated": emulated.cached_tokens,
        "host_cpu_real": round(real.host_cpu, 3),
        "host_cpu_emulated": round(emulated.host_cpu, 3),
        "fit_error_ttft": measured.get("fit_error_ttft"),
        "fit_error_itl": measured.get("fit_error_itl"),
    }


def main() -> int:
    """Command line. 0 measured, 2 nothing to measure with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-venv", default=os.environ.get("TWOFOLD_VLLM_VENV", ""), help="venv with vLLM")
    parser.add_argument("--load", type=float, default=0.5, help="share of the engine's capacity (default 0.5)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second instead of --load")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the workload (default 40)")
    parser.add_argument("--profile-seconds", type=float, default=75.0, help="time to measure the profile (default 75)")
    parser.add_argument("--profile-file", default="", help="use this profile instead of measuring one")
    parser.add_argument("--seed", type=int, default=1, help="of the workload")
    parser.add_argument("--dump", default="", help="write all times to this file, as JSON")
    options = parser.parse_args()
    if not options.vllm_venv or not os.access(Path(options.vllm_venv, "bin", "python"), os.X_OK):
        sys.stderr.write("bench_calibration: error: --vllm-venv: set it to what scripts/install_vllm.sh prints\n")
        return 2
    begun_s = time.monotonic()

    def note(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - begun_s:5.0f} s] {text}\n")
        sys.stderr.flush()

    with tempfile.TemporaryDirectory(prefix="twofold-calibration-") as folder:
        result = run(options, Path(folder), note)
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
