"""``twofold demo``: the same workload under several routing policies on fresh fleets, side by side."""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from rich.console import Console

from controlplane.discovery.fleet_file import FleetFileError
from router.routing.policies import POLICIES as ROUTING_POLICIES
from twofold import log as logs
from twofold import settings
from twofold.cli import demo_fleet, demo_run
from twofold.cli.fleet_runner import FleetStartError
from twofold.cli.replay import fail, raise_file_limit, run_loop
from twofold.replay import engines, report
from twofold.replay.formats import open_workload
from twofold.replay.formats.open import WorkloadOptions
from twofold.replay.workload import WorkloadError

PROG = "twofold demo"
POLICIES = ("twofold", "least_requests", "round_robin")
MOONCAKE_POLICIES = ("twofold", "round_robin")
MOONCAKE_REQUESTS = 2000
MOONCAKE_SPEED = 4.8
TABLE_WIDTH = 110
EMULATED_TRAFFIC = (
    "sessions=52,rate=7,agents=0.5,prompts=10,zipf=0.7,system_tokens=1500,turns=2,max_turns=3,user_tokens=350,"
    "output_tokens=50,think_s=0.6,toolsets=4,functions=8,tool_tokens=1200,steps=3.5,max_steps=4,task_tokens=700,"
    "result_tokens=800,call_tokens=32,tool_s=0.3,max_tokens=2000,sigma=0.4"
)
"""Loads the demo's fleet near its limit under round robin, which leaves two thirds of two CPU cores idle."""
VLLM_TRAFFIC = (
    "sessions=24,rate=2,agents=0,prompts=4,zipf=0.5,system_tokens=150,turns=2.5,max_turns=4,user_tokens=30,"
    "output_tokens=16,think_s=0.5,max_tokens=60,sigma=0.4"
)
"""Fits a context of 2,048 tokens, in which a word of the built-in vocabulary may take several tokens."""


def _doc(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class DemoSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``twofold demo``."""

    engine: Annotated[str, msgspec.Meta(pattern="^(emulated|vllm)$", description="emulated or vllm engines")] = (
        "emulated"
    )
    workload: Annotated[
        str, msgspec.Meta(pattern="^(generate|mooncake)$", description="generated traffic, or a Mooncake trace")
    ] = "generate"
    trace: Annotated[str, _doc("file of the Mooncake trace")] = ""
    generate: Annotated[str, _doc("key=value,... parameters of the generated workload")] = ""
    policy: Annotated[tuple[str, ...], _doc("policy to run; default: twofold and its baselines")] = ()
    speed: Annotated[float, msgspec.Meta(ge=0, description="divides arrivals and pauses; 0: what suits")] = 0.0
    limit: Annotated[int, msgspec.Meta(ge=0, description="requests per policy; 0: what suits")] = 0
    seed: Annotated[int, _doc("of everything random")] = 0
    vllm_python: Annotated[str, _doc("python of an environment that holds vLLM")] = ""
    vllm_model: Annotated[str, _doc("model directory or name for --engine vllm")] = ""
    run_dir: Annotated[str, _doc("directory for logs, kept; default: a temporary one")] = ""
    json: Annotated[str, _doc("write the outcomes as JSON to a file")] = ""
    plot: Annotated[str, _doc("write a picture (needs matplotlib)")] = ""
    strict: Annotated[bool, _doc("exit 1 when the host was too slow for the figures to count")] = False
    plain: Annotated[bool, _doc("plain lines, no colours, no progress bar")] = False


def main(argv: Sequence[str]) -> int:
    """Entry point of ``twofold demo``. 0 done, 1 errors or wrong tokens, 2 wrong usage, 130 interrupted."""
    options = settings.load(
        DemoSettings, argv, prog=PROG, description="Run one workload under several routing policies, side by side."
    )
    try:
        if options.plot:
            report.require_matplotlib()
        plan = make_plan(options)
        open_workload(plan.workload)
    except (report.ReportError, WorkloadError, FleetFileError, demo_fleet.PortError) as error:
        return fail(str(error), 2, prog=PROG)
    raise_file_limit()
    run_dir = Path(options.run_dir or tempfile.mkdtemp(prefix="twofold-demo-")).absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        logs.configure("demo", file=str(run_dir / "demo.log"))
        code = run_loop(_demo(options, plan, run_dir))
    except (FleetStartError, WorkloadError, engines.EngineError, report.ReportError, OSError) as error:
        return fail(f"{error} (logs: {run_dir})", 1, prog=PROG)
    if not options.run_dir and code == 0:
        shutil.rmtree(run_dir, ignore_errors=True)
    return code


def make_plan(options: DemoSettings) -> demo_run.Plan:
    """What to run. Raises WorkloadError, FleetFileError or PortError when that is not possible."""
    unknown = [policy for policy in options.policy if policy not in ROUTING_POLICIES]
    if unknown:
        raise WorkloadError(f"unknown policy {unknown[0]!r}; known: {', '.join(ROUTING_POLICIES)}")
    if options.workload == "mooncake":
        return _mooncake_plan(options)
    real = options.engine == "vllm"
    parameters = options.generate or (VLLM_TRAFFIC if real else EMULATED_TRAFFIC)
    return demo_run.Plan(
        title="generated traffic: chats and agents over shared prompts",
        file=demo_fleet.demo_fleet(options.engine, options.vllm_python, options.vllm_model),
        engine=options.engine,
        workload=WorkloadOptions(format="generate", parameters=parameters, seed=options.seed),
        endpoint="chat",
        policies=options.policy or POLICIES,
        speed=options.speed or 1.0,
        limit=options.limit,
        verify=not real,
        try_line=True,
    )


def _mooncake_plan(options: DemoSettings) -> demo_run.Plan:
    if options.engine != "emulated":
        raise WorkloadError("the Mooncake trace is for emulated engines: its prompts are too long for small models")
    return demo_run.Plan(
        title=f"Mooncake trace {options.trace}",
        file=demo_fleet.mooncake_fleet(),
        engine=options.engine,
        workload=WorkloadOptions(format="mooncake", path=options.trace, seed=options.seed),
        endpoint="completions",
        policies=options.policy or MOONCAKE_POLICIES,
        speed=options.speed or MOONCAKE_SPEED,
        limit=options.limit or MOONCAKE_REQUESTS,
        check_homes=True,
        plant_fault=True,
    )


async def _demo(options: DemoSettings, plan: demo_run.Plan, run_dir: Path) -> int:
    started_s = time.monotonic()
    console = Console(no_color=options.plain or None, force_terminal=False if options.plain else None)
    if not console.is_terminal:
        console.width = max(console.width, TABLE_WIDTH)
    console.print(f"{plan.title}; {demo_run.fleet_text(plan.file)}", soft_wrap=True, markup=False)
    runner = demo_run.PlanRunner(plan, run_dir, console)
    outcomes = await runner.run()
    demo_run.show(console, plan, outcomes, runner)
    console.print(f"whole demo: {time.monotonic() - started_s:.0f} s")
    result = demo_run.result_of(plan, outcomes, runner)
    if options.json:
        _write_json(options.json, result)
    if options.plot:
        report.write_plot(options.plot, {outcome.policy: outcome.records for outcome in outcomes})
    sys.stdout.write(report.result_line(result) + "\n")
    sys.stdout.flush()
    return demo_run.exit_code(plan, outcomes, runner, strict=options.strict)


def _write_json(path: str, value: dict[str, object]) -> None:
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    except OSError as error:
        raise report.ReportError(f"cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
