"""Running a plan of ``twofold demo``: a fresh fleet per policy, one workload, measures, and what is said at the end."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from controlplane.discovery.fleet_file import FleetFile
from twofold.cli import demo_fleet
from twofold.cli.fleet_runner import Fleet
from twofold.cli.replay import interruptible
from twofold.cli.up import curl_line
from twofold.replay import compare, engines, faults, homes, progress, report
from twofold.replay.formats import open_workload
from twofold.replay.formats.open import WorkloadOptions
from twofold.replay.measures import summarise
from twofold.replay.runner import LoadGenerator, RunOptions

READY_TIMEOUT_S = {"emulated": 60.0, "vllm": 600.0}
REQUEST_TIMEOUT_S = 300.0
HOMES_SAMPLE = 600
MAX_LATENESS_S = 0.05
PLOT_WIDTH = 100
FAULT_AFTER_REQUESTS = 20
TRY_TIMEOUT_S = 10


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A workload, the fleet it is made for and what to do with both."""

    title: str
    file: FleetFile
    engine: str
    workload: WorkloadOptions
    endpoint: str
    policies: tuple[str, ...]
    speed: float = 1.0
    limit: int = 0
    verify: bool = True
    check_homes: bool = False
    plant_fault: bool = False
    try_line: bool = False
    """Run the line that people may try, before the last fleet stops."""


class PlanRunner:
    """Runs a plan. ``interrupted`` is set when the user ended it early."""

    def __init__(self, plan: Plan, run_dir: Path, console: Console) -> None:
        self.interrupted = False
        self.agreement: homes.Agreement | None = None
        self.tried = ""
        self._plan = plan
        self._run_dir = run_dir
        self._console = console

    async def run(self) -> list[compare.Outcome]:
        """One outcome per policy, in the plan's order."""
        outcomes: dict[str, compare.Outcome] = {}
        # Twofold runs last, so that the line to try at the end is answered by its fleet.
        order = sorted(self._plan.policies, key=lambda name: name == "twofold")
        for policy in order:
            outcomes[policy] = await self._policy(policy, last=policy == order[-1])
            if self.interrupted:
                break
        return [outcomes[policy] for policy in self._plan.policies if policy in outcomes]

    async def _policy(self, policy: str, *, last: bool) -> compare.Outcome:
        started_s = time.monotonic()
        file = self._plan.file
        file = msgspec.structs.replace(file, policy=msgspec.structs.replace(file.policy, name=policy))
        fleet = Fleet(file, self._run_dir / policy)
        try:
            await fleet.start()
            await self._ready(fleet, policy)
            outcome = await self._measure(fleet, policy)
            if last and self._plan.try_line and not self.interrupted:
                await self._try(fleet)
        finally:
            await fleet.stop()
        return msgspec.structs.replace(outcome, wall_s=time.monotonic() - started_s)

    async def _ready(self, fleet: Fleet, policy: str) -> None:
        console = self._console
        status = console.status(f"{policy}: a fresh fleet, cold caches") if console.is_terminal else None
        with status or contextlib.nullcontext():
            await fleet.wait_ready(READY_TIMEOUT_S[self._plan.engine])

    async def _measure(self, fleet: Fleet, policy: str) -> compare.Outcome:
        plan = self._plan
        generator = LoadGenerator(self._run_options(fleet, policy), time.monotonic)
        admin_urls = demo_fleet.engine_admin_urls(fleet.file)
        plant = faults.Plant(admin_urls, FAULT_AFTER_REQUESTS) if plan.plant_fault else None
        before = await engines.read_counters(demo_fleet.engine_urls(fleet.file))
        meter = compare.CpuMeter()
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(interruptible(generator.interrupt))
            shown = progress.shown(self._console, generator, title=policy, total=plan.limit or None)
            await stack.enter_async_context(shown)
            if plant:
                await stack.enter_async_context(plant.planted(generator))
            await generator.run(open_workload(plan.workload))
        host_cpu, own_cpu = meter.busy(), meter.own()
        self.interrupted = generator.interrupted
        after = await engines.read_counters(demo_fleet.engine_urls(fleet.file))
        lateness = compare.worst_lateness(await asyncio.gather(*map(engines.engine_stats, admin_urls)))
        verdict = await plant.verdict(generator.records) if plant else faults.Verdict()
        if plan.check_homes and policy == "twofold":
            stride = max(1, len(generator.records) // HOMES_SAMPLE)
            sample = [record.request_id for record in generator.records[::stride]]
            self.agreement = await homes.check_homes(fleet.router_admin_urls, sample)
        slo = fleet.file.pools[0].slo
        result = report.build_report(
            generator,
            summarise(verdict.others(generator.records), generator.gaps, slo),
            workload=plan.title,
            seed=plan.workload.seed,
            slo=slo,
            lateness_limit_s=MAX_LATENESS_S,
            kv_capacity_tokens=after.kv_capacity_tokens,
            engine_hit_ratio=after.hit_ratio_since(before),
            engines_on_time=lateness is None or lateness <= compare.MAX_LATENESS_RATIO,
            verdict=verdict,
        )
        return compare.Outcome(
            policy=policy,
            report=result,
            records=generator.records,
            host_cpu=host_cpu,
            own_cpu=own_cpu,
            engine_lateness_ratio=lateness,
        )

    def _run_options(self, fleet: Fleet, policy: str) -> RunOptions:
        plan = self._plan
        return RunOptions(
            urls=tuple(fleet.router_urls),
            model=fleet.file.pools[0].models[0],
            endpoint=plan.endpoint,
            speed=plan.speed,
            limit=plan.limit,
            verify=plan.verify,
            timeout_s=REQUEST_TIMEOUT_S,
            name=f"{policy}-{plan.workload.seed}",
        )

    async def _try(self, fleet: Fleet) -> None:
        line = curl_line(fleet.router_urls[0], fleet.file.pools[0].models[0])
        # On a thread, because uvloop forks and gRPC has threads that complain of it.
        done = await asyncio.to_thread(
            subprocess.run, f"{line} --silent --max-time {TRY_TIMEOUT_S}", shell=True, capture_output=True, check=False
        )
        answered = done.returncode == 0 and b"[DONE]" in done.stdout
        self.tried = "just answered by the demo's fleet" if answered else "not tried here: curl failed"


def fleet_text(file: FleetFile) -> str:
    """A fleet in one line."""
    routers = file.routers
    groups = [f"{group.replicas} x {group.profile}" for pool in file.pools for group in pool.workers]
    return f"{routers.replicas} router replicas x {routers.relays} relays before {' and '.join(groups)}"


def show(console: Console, plan: Plan, outcomes: Sequence[compare.Outcome], runner: PlanRunner) -> None:
    """Plot, table, proofs and what to try next."""
    width = min(console.width, PLOT_WIDTH) if console.is_terminal else PLOT_WIDTH
    sys.stdout.write(compare.ttft_plot(outcomes, width=width, colour=console.is_terminal) + "\n")
    compare.print_comparison(console, outcomes)
    for outcome in outcomes:
        console.print(_proof(plan, outcome), soft_wrap=True, markup=False)
    if runner.agreement is not None:
        agreed = runner.agreement
        console.print(
            f"homes: {agreed.relays} relays decided on {agreed.keys} ring keys, {agreed.keys_shared} met by several "
            f"relays, {agreed.disagreements} disagreements",
            soft_wrap=True,
        )
    if runner.tried:
        command = "make up ENGINE=vllm" if plan.engine == "vllm" else "make up"
        console.print(f"keep a fleet running with `{command}`, then ({runner.tried}):", soft_wrap=True)
        console.print(curl_line("http://127.0.0.1:8000", plan.file.pools[0].models[0]), soft_wrap=True, markup=False)


def _proof(plan: Plan, outcome: compare.Outcome) -> str:
    figures, result = outcome.report.figures, outcome.report
    text = f"{outcome.policy}: {figures.requests} requests"
    if plan.verify:
        text += (
            f", {figures.tokens_verified} of {figures.tokens_delivered} tokens verified, "
            f"{figures.chain_violations} chain violations"
        )
    if plan.plant_fault:
        text += f", planted faults {result.planted_faults}, caught {result.caught}"
    if result.ceiling is not None:
        ceiling = report.percent(result.ceiling.hit_ratio)
        text += f"; one cache of all {result.kv_capacity_tokens} KV tokens would hit {ceiling}"
    return text + f"; {outcome.wall_s:.0f} s with start and stop"


def result_of(plan: Plan, outcomes: Sequence[compare.Outcome], runner: PlanRunner) -> dict[str, object]:
    """The value of the RESULT line."""
    value: dict[str, object] = dict(compare.comparison_result(outcomes))
    if plan.plant_fault:
        value["planted_faults"] = sum(outcome.report.planted_faults for outcome in outcomes)
        value["caught"] = sum(outcome.report.caught for outcome in outcomes)
    if runner.agreement is not None:
        value["homes"] = {**msgspec.to_builtins(runner.agreement), "agreed": runner.agreement.agreed}
    return value


def exit_code(plan: Plan, outcomes: Sequence[compare.Outcome], runner: PlanRunner, *, strict: bool) -> int:
    """0 when every answer was right and each planned fault caught (and, if ``strict``, the host kept up), 1 when not,
    130 when interrupted."""
    if runner.interrupted:
        return 130
    clean = all(outcome.report.clean and outcome.report.planted_faults == plan.plant_fault for outcome in outcomes)
    agreed = runner.agreement is None or runner.agreement.agreed
    on_time = all(outcome.lateness_ok for outcome in outcomes)
    return 0 if clean and agreed and (on_time or not strict) else 1
