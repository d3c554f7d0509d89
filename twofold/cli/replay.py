"""``twofold replay``: a workload to any OpenAI-compatible URL, at a chosen speed, with proof of what came back."""

import asyncio
import contextlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from rich.console import Console

from twofold import settings
from twofold.model.fleet import Slo
from twofold.replay import engines, faults, progress, report
from twofold.replay.client import parse_url
from twofold.replay.formats import FORMATS, open_workload
from twofold.replay.formats.open import WorkloadOptions
from twofold.replay.measures import summarise
from twofold.replay.probe import ProbeError, find_model, follows_chain
from twofold.replay.runner import MAX_REQUESTS, LoadGenerator, RunOptions
from twofold.replay.workload import WorkloadError

T = TypeVar("T")

Text = msgspec.Meta
Positive = Annotated[float, msgspec.Meta(gt=0)]


class ReplaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``twofold replay``."""

    url: Annotated[tuple[str, ...], Text(description="base URL; several are used in turn")] = ("http://127.0.0.1:8000",)
    model: Annotated[str, Text(description="model to ask for; default: the first that the URL lists")] = ""
    format: Annotated[
        str, Text(pattern=f"^({'|'.join(FORMATS)})$", description="mooncake, agents, azure or generate")
    ] = "generate"
    trace: Annotated[str, Text(description="workload file (JSON lines or CSV, gzip or plain)")] = ""
    generate: Annotated[str, Text(description="key=value,... parameters of the generated workload")] = ""
    endpoint: Annotated[
        str,
        Text(pattern="^(auto|chat|completions)$", description="auto: chat for generated workloads, else completions"),
    ] = "auto"
    speed: Annotated[float, Text(gt=0, description="divides arrivals and pauses of the workload")] = 1.0
    limit: Annotated[int, Text(ge=0, le=MAX_REQUESTS, description="requests to send, 0 for all")] = 0
    duration_s: Annotated[float, Text(ge=0, description="send nothing new after this, 0 for no bound")] = 0.0
    concurrency_limit: Annotated[int, Text(ge=1, le=65536, description="requests in flight")] = 1024
    sessions_limit: Annotated[int, Text(ge=1, le=65536, description="sessions under way: users of a closed loop")] = (
        4096
    )
    timeout_s: Annotated[float, Text(gt=0, description="for one whole answer")] = 600.0
    stream: Annotated[bool, Text(description="streamed answers")] = True
    verify: Annotated[
        str, Text(pattern="^(auto|on|off)$", description="check the token chain of emulated engines; auto: ask first")
    ] = "auto"
    force_length: Annotated[bool, Text(description="ask for exactly the output length (ignore_eos, min_tokens)")] = True
    max_input_tokens: Annotated[int, Text(ge=0, description="cut longer recorded prompts, 0 for no bound")] = 0
    seed: Annotated[int, Text(description="of everything random")] = 0
    salt: Annotated[int, Text(ge=0, le=2**63 - 1, description="changes all prompt texts and nothing else")] = 0
    trace_block_tokens: Annotated[int, Text(ge=1, description="block size of a Mooncake trace")] = 512
    tick_s: Annotated[float, Text(ge=-1, description="spread equal timestamps over this; -1: find out")] = -1.0
    session_gap_s: Annotated[float, Text(ge=0, description="mean gap between starts of recorded agents")] = 0.0
    max_think_s: Annotated[float, Text(ge=0, description="cut longer pauses, 0 for no bound")] = 0.0
    slo_ttft_s: Annotated[float, Text(gt=0, description="latency target: first token")] = 5.0
    slo_tpot_s: Annotated[float, Text(gt=0, description="latency target: per further token")] = 0.1
    max_lateness_s: Annotated[float, Text(gt=0, description="p99 lateness above which the run is invalid")] = 0.05
    engine_metrics: Annotated[tuple[str, ...], Text(description="engine URL whose cache counters are read")] = ()
    kv_capacity_tokens: Annotated[int, Text(ge=0, description="KV capacity of the fleet, for the ceiling")] = 0
    block_tokens: Annotated[int, Text(ge=1, le=4096, description="block size of the engines' caches")] = 16
    plant_fault: Annotated[str, Text(description="fault admin URL of an emulator: plant one wrong token there")] = ""
    plant_after: Annotated[int, Text(ge=0, description="requests sent before the fault is planted")] = 20
    strict: Annotated[bool, Text(description="exit 1 on errors, wrong tokens or an invalid run")] = False
    json: Annotated[str, Text(description="write the report as JSON to a file, or - for standard output")] = ""
    plot: Annotated[str, Text(description="write a picture (needs matplotlib)")] = ""
    plain: Annotated[bool, Text(description="plain lines, no colours, no progress bar")] = False


def main(argv: Sequence[str]) -> int:
    """Entry point of ``twofold replay``. 0 done, 1 failed or not clean under --strict, 2 wrong usage, 130
    interrupted.
    """
    options = settings.load(
        ReplaySettings,
        argv,
        prog="twofold replay",
        description="Send a workload to an OpenAI-compatible URL. OPENAI_API_KEY is sent when set.",
    )
    try:
        if options.plot:
            report.require_matplotlib()
        for url in options.url:
            parse_url(url)
        open_workload(workload_options(options))
    except (report.ReportError, WorkloadError, ValueError) as error:
        return fail(str(error), 2)
    raise_file_limit()
    try:
        return run_loop(_replay(options))
    except (WorkloadError, ProbeError, engines.EngineError, report.ReportError) as error:
        return fail(str(error), 1)


def fail(message: str, code: int, *, prog: str = "twofold replay") -> int:
    """One line on standard error."""
    sys.stderr.write(f"{prog}: error: {message}\n")
    return code


def run_loop(main_task: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main_task)


def raise_file_limit() -> None:
    """Allow as many connections as the system does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def workload_options(options: ReplaySettings) -> WorkloadOptions:
    """The part of the settings that describes the workload."""
    return WorkloadOptions(
        format=options.format,
        path=options.trace,
        parameters=options.generate,
        seed=options.seed,
        block_tokens=options.trace_block_tokens,
        tick_s=None if options.tick_s < 0 else options.tick_s,
        session_gap_s=options.session_gap_s,
        max_think_s=options.max_think_s or math.inf,
    )


def run_options(options: ReplaySettings, model: str, *, verify: bool) -> RunOptions:
    """The part of the settings that describes how it is sent."""
    endpoint = options.endpoint
    if endpoint == "auto":
        endpoint = "chat" if options.format == "generate" else "completions"
    return RunOptions(
        urls=options.url,
        model=model,
        endpoint=endpoint,
        speed=options.speed,
        limit=options.limit,
        duration_s=options.duration_s,
        concurrency_limit=options.concurrency_limit,
        sessions_limit=options.sessions_limit,
        timeout_s=options.timeout_s,
        stream=options.stream,
        verify=verify,
        force_length=options.force_length,
        max_input_tokens=options.max_input_tokens,
        block_tokens=options.block_tokens,
        salt=options.salt,
        name=f"replay-{os.getpid():x}-{options.seed}",
        api_key=api_key(),
    )


def api_key() -> str:
    """The key in the environment; never a flag, which others could see."""
    return os.environ.get("OPENAI_API_KEY", "")


@contextlib.contextmanager
def interruptible(stop: Callable[[], None]) -> Any:
    """Ctrl-C and SIGTERM call ``stop`` while the context is open."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _replay(options: ReplaySettings) -> int:
    # With --json - standard output is for JSON and the RESULT line alone.
    console = Console(
        stderr=options.json == "-", no_color=options.plain or None, force_terminal=False if options.plain else None
    )
    model = options.model or await find_model(options.url[0], api_key())
    verify = options.verify == "on" or (
        options.verify == "auto" and await follows_chain(options.url[0], model, api_key())
    )
    notes = [] if verify else ["tokens are not verified: these are not emulated engines, or --verify off"]
    generator = LoadGenerator(run_options(options, model, verify=verify), time.monotonic)
    before = await engines.read_counters(options.engine_metrics)
    plant = faults.Plant((options.plant_fault,), options.plant_after) if options.plant_fault else None
    name = options.trace or f"generated traffic ({options.generate or 'defaults'})"
    total = options.limit or None
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(interruptible(generator.interrupt))
        await stack.enter_async_context(progress.shown(console, generator, title="replay", total=total))
        if plant:
            await stack.enter_async_context(plant.planted(generator))
        await generator.run(open_workload(workload_options(options)))
    after = await engines.read_counters(options.engine_metrics)
    verdict = await plant.verdict(generator.records) if plant else faults.Verdict()
    slo = Slo(ttft_s=options.slo_ttft_s, tpot_s=options.slo_tpot_s)
    result = report.build_report(
        generator,
        summarise(verdict.others(generator.records), generator.gaps, slo),
        workload=name,
        seed=options.seed,
        slo=slo,
        lateness_limit_s=options.max_lateness_s,
        kv_capacity_tokens=options.kv_capacity_tokens or after.kv_capacity_tokens,
        engine_hit_ratio=after.hit_ratio_since(before),
        verdict=verdict,
        notes=notes,
    )
    report.print_report(console, result)
    if options.json:
        report.write_json(options.json, result, generator.records)
    if options.plot:
        report.write_plot(options.plot, {options.format: generator.records})
    sys.stdout.write(report.result_line(result.result()) + "\n")
    sys.stdout.flush()
    if result.interrupted:
        return 130
    return 1 if options.strict and not (result.clean and result.valid) else 0
