"""``twofold profile``: measure a running engine and write an engine profile for fleets and the emulator."""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from twofold import settings
from twofold.calibration import limits, plan, profile_file, report
from twofold.calibration.engine import Engine, EngineError, Unreachable
from twofold.calibration.fit import Fit, FitError, fit
from twofold.calibration.measure import Measurer
from twofold.calibration.measure import Progress as Done
from twofold.calibration.values import EngineFacts
from twofold.cli.replay import fail, interruptible, run_loop
from twofold.model.profile import EngineProfile
from twofold.profiles import ProfileError
from twofold.replay.client import parse_url
from twofold.replay.report import result_line

PROG = "twofold profile"
Text = msgspec.Meta
HOST_SAMPLE_S = 0.5
UNKNOWN_GPU = "unknown"
_LOCAL = ("127.0.0.1", "::1", "localhost")


class ProfileSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``twofold profile``."""

    url: Annotated[str, Text(description="base URL of the engine itself, not of a router (also without --url)")] = ""
    model: Annotated[str, Text(description="model to ask for; default: the first that the URL lists")] = ""
    name: Annotated[str, Text(description="name of the profile; default: gpu-model-tpN")] = ""
    gpu: Annotated[str, Text(description="GPU type, as fleets call it")] = UNKNOWN_GPU
    tensor_parallel: Annotated[int, Text(ge=1, description="GPUs that share each layer")] = 1
    price: Annotated[float | None, Text(description="US dollars per hour of the whole engine")] = None
    out: Annotated[
        str, Text(description="file to write, .yaml or .json; - for standard output; default: NAME.yaml")
    ] = ""
    quick: Annotated[bool, Text(description="fewer points, two rounds: about a quarter of the time")] = False
    max_seconds: Annotated[float, Text(gt=0, le=3600, description="measure for at most about this long")] = 150.0
    force: Annotated[bool, Text(description="measure although the engine serves others")] = False
    kv_capacity_tokens: Annotated[int | None, Text(description="where the engine does not tell it")] = None
    block_size_tokens: Annotated[int | None, Text(description="where the engine does not tell it")] = None
    max_num_batched_tokens: Annotated[int | None, Text(description="the engine's flag; default: observed")] = None
    max_num_seqs: Annotated[int | None, Text(description="the engine's flag; default: observed")] = None
    max_model_len_tokens: Annotated[int | None, Text(description="where the engine does not tell it")] = None
    api_key: Annotated[str, Text(description="better in OPENAI_API_KEY: others can read flags")] = ""
    seed: Annotated[int, Text(ge=0, description="of prompts and order; 0: another one each time")] = 0
    plain: Annotated[bool, Text(description="plain lines, no colours, no progress bar, no plot")] = False


def main(argv: Sequence[str]) -> int:
    """Entry point of ``twofold profile``. 0 done, 1 failed, 2 wrong usage or nothing to measure, 130 interrupted."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--url", *arguments]
    options = settings.load(
        ProfileSettings,
        arguments,
        prog=PROG,
        description="Measure a running engine and write its profile. OPENAI_API_KEY is sent when set.",
    )
    try:
        if not options.url:
            raise ValueError("give the URL of an engine")
        parse_url(options.url)
        _check_numbers(options)
        _check_out(options.out)
    except ValueError as error:
        return fail(str(error), 2, prog=PROG)
    try:
        return run_loop(_profile(options))
    except Unreachable as error:
        return fail(str(error), 2, prog=PROG)
    except (EngineError, FitError, ProfileError) as error:
        return fail(str(error), 1, prog=PROG)
    except asyncio.CancelledError:
        return 130


def _check_numbers(options: ProfileSettings) -> None:
    for field in (*limits.FIELDS, "price"):
        value = getattr(options, field)
        if value is not None and value < (0 if field == "price" else 1):
            raise ValueError(f"--{field.replace('_', '-')} must be above 0, not {value:g}")


def _check_out(path: str) -> None:
    """Find out before measuring for minutes that the result has no place."""
    folder = Path(path).parent if path not in ("", "-") else Path()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {folder}: no such folder, or not ours to write")


async def _profile(options: ProfileSettings) -> int:
    console = Console(
        stderr=options.out == "-", no_color=options.plain or None, force_terminal=False if options.plain else None
    )
    begun_s = time.monotonic()
    key = options.api_key or os.environ.get("OPENAI_API_KEY", "")
    seed = options.seed or int.from_bytes(os.urandom(4))
    engine = Engine(options.url, api_key=key, clock=time.monotonic, seed=seed)
    task = asyncio.current_task()

    def stop() -> None:
        if task is not None:
            task.cancel()

    try:
        with interruptible(stop):
            return await _measure_and_write(options, engine, console, begun_s, seed)
    finally:
        await engine.close()


async def _measure_and_write(
    options: ProfileSettings, engine: Engine, console: Console, begun_s: float, seed: int
) -> int:
    facts = _with_flags(await engine.facts(options.model), options)
    measurer = Measurer(
        engine,
        facts,
        clock=time.monotonic,
        deadline_s=begun_s + options.max_seconds,
        force=options.force,
        seed=seed,
    )
    await measurer.check_idle()
    host_cpu = await _host_cpu(options.url)
    given = {field: getattr(options, field) for field in limits.FIELDS}
    unknown = frozenset(field for field in limits.FIELDS if not getattr(facts, field))
    seen = {} if options.quick else await limits.observe(engine, facts, unknown)
    found = limits.resolve(facts, given, seen)
    facts = msgspec.structs.replace(facts, **{field: getattr(found, field) for field in limits.FIELDS})
    points = plan.make_plan(facts, quick=options.quick)
    console.print(f"measuring {facts.model} at {options.url}: {len(points.points)} points, {points.rounds} rounds")
    with _shown(console) as on_progress:
        measurements = await measurer.run(points, on_progress)
    fitted = fit(measurements, max_num_batched_tokens=found.max_num_batched_tokens, seed=seed)
    profile = _build(options, facts, found, fitted)
    warnings = report.warnings_of(
        fitted,
        found,
        rounds=measurer.rounds,
        planned_rounds=points.rounds,
        host_cpu=host_cpu,
        foreign_requests=measurer.foreign_requests,
        merged_answers=measurer.merged_answers,
        cold_hits=measurer.cold_hits,
    )
    report.print_report(console, profile, fitted, found, warnings, plot=not options.plain)
    comment = "\n".join((profile.source, *(f"warning: {line}" for line in warnings)))
    path = options.out or f"{profile.name}.yaml"
    if path == "-":
        sys.stdout.write(profile_file.render(profile, comment=comment))
    else:
        profile_file.write(path, profile, comment=comment)
        console.print(f"wrote {path}: use it as --profile-file of the emulator, or under profiles: of a fleet file")
    seconds = time.monotonic() - begun_s
    value = report.result(profile, fitted, found, seconds=seconds, path=path, warnings=len(warnings))
    sys.stdout.write(result_line(value) + "\n")
    sys.stdout.flush()
    return 0


def _with_flags(facts: EngineFacts, options: ProfileSettings) -> EngineFacts:
    given = {field: value for field in limits.FIELDS if (value := getattr(options, field))}
    return msgspec.structs.replace(facts, **given)


def _build(options: ProfileSettings, facts: EngineFacts, found: profile_file.Limits, fitted: Fit) -> EngineProfile:
    model_class = facts.model.rsplit("/", 1)[-1]
    labels = profile_file.Labels(
        name=options.name or _name(options.gpu, model_class, options.tensor_parallel),
        gpu=options.gpu,
        model_class=model_class,
        tensor_parallel=options.tensor_parallel,
        data_parallel=facts.engines,
        usd_per_hour=options.price,
    )
    return profile_file.build(fitted, found, labels, profile_file.source_text(facts, fitted, time.strftime("%Y-%m-%d")))


def _name(gpu: str, model: str, tensor_parallel: int) -> str:
    parts = (gpu if gpu != UNKNOWN_GPU else "", model, f"tp{tensor_parallel}")
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(filter(None, parts)).lower()).strip("-")


async def _host_cpu(url: str) -> float | None:
    """Share of this host's CPU in use while the engine is idle; None where the engine is on another host."""
    if parse_url(url).host not in _LOCAL:
        return None
    psutil.cpu_percent()
    await asyncio.sleep(HOST_SAMPLE_S)
    return float(psutil.cpu_percent()) / 100


@contextlib.contextmanager
def _shown(console: Console) -> Iterator[Callable[[Done], None]]:
    """A bar on a terminal, a line every tenth of the way elsewhere."""
    if not console.is_terminal:
        last = 0

        def line(done: Done) -> None:
            nonlocal last
            tenth = 10 * done.done // max(1, done.total)
            if tenth > last:
                last = tenth
                console.print(f"{tenth}0 %: {done.what}", soft_wrap=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("measuring", what="warm-up")
        yield lambda done: bar.update(task, completed=done.done, total=done.total, what=done.what)
