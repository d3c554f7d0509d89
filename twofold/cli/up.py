"""``twofold up [fleet.yaml]``: a whole fleet on this machine, with a live view, until Ctrl-C."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import grpc
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from controlplane.discovery.fleet_file import FleetFileError, load_fleet_file
from twofold import log as logs
from twofold import settings
from twofold.cli.defaults import default_fleet
from twofold.cli.fleet_runner import CALL_TIMEOUT_S, Fleet, FleetStartError
from twofold.model.fleet import FleetSnapshot
from twofold.v1 import admin_pb2

log = logging.getLogger(__name__)

READY_TIMEOUT_S = {"emulated": 60.0, "vllm": 600.0}
REFRESH_S = 1.0
PLAIN_REFRESH_S = 10.0


class UpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``twofold up``."""

    engine: Annotated[
        str, msgspec.Meta(pattern="^(emulated|vllm)$", description="engines of the built-in fleet: emulated or vllm")
    ] = "emulated"
    run_dir: Annotated[str, msgspec.Meta(description="directory for state and logs; default .run/<fleet name>")] = ""
    vllm_python: Annotated[str, msgspec.Meta(description="python of an environment that holds vLLM")] = ""
    vllm_model: Annotated[str, msgspec.Meta(description="model directory or name for --engine vllm")] = ""
    plain: Annotated[bool, msgspec.Meta(description="plain lines instead of the live view")] = False
    log_level: Annotated[str, msgspec.Meta(description="debug, info, warning or error")] = "info"


def main(argv: Sequence[str]) -> int:
    """Entry point of ``twofold up``."""
    path, rest = _split_path(list(argv))
    options = settings.load(
        UpSettings,
        rest,
        prog="twofold up",
        description="Run control plane, router replicas and engines. usage: twofold up [fleet.yaml] [options]",
    )
    try:
        file = load_fleet_file(path) if path else default_fleet(options.engine, options.vllm_python, options.vllm_model)
    except FleetFileError as error:
        sys.stderr.write(f"twofold up: error: {error}\n")
        return 2
    run_dir = Path(options.run_dir or f".run/{file.name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        logs.configure("up", level=options.log_level, file=str(run_dir.absolute() / "twofold.log"))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"twofold up: error: {error}\n")
        return 2
    return asyncio.run(_run(Fleet(file, run_dir, log_level=options.log_level), options))


async def _run(fleet: Fleet, options: UpSettings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    console = Console()
    try:
        async with fleet:
            ready = asyncio.create_task(_wait_ready(fleet))
            stopped = asyncio.create_task(stop.wait())
            with console.status("starting ...") if console.is_terminal else contextlib.nullcontext():
                await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ready.cancel()
            else:
                await ready
                _greet(console, fleet)
                await _watch(console, fleet, stop, plain=options.plain or not console.is_terminal)
            stopped.cancel()
            console.print("stopping ...")
    except FleetStartError as error:
        sys.stderr.write(f"twofold up: error: {error}\n")
        return 1
    console.print("stopped; all ports are free again")
    return 0


async def _wait_ready(fleet: Fleet) -> FleetSnapshot:
    engines = {group.engine for pool in fleet.file.pools for group in pool.workers}
    return await fleet.wait_ready(READY_TIMEOUT_S["vllm" if "vllm" in engines else "emulated"])


def _greet(console: Console, fleet: Fleet) -> None:
    model = fleet.file.pools[0].models[0] if fleet.file.pools and fleet.file.pools[0].models else "MODEL"
    console.print(f"fleet {fleet.file.name!r} is ready; log: {fleet.log_file}")
    console.print("try:  " + curl_line(fleet.router_urls[0], model), soft_wrap=True)
    console.print(
        f"      routerctl --control-plane {fleet.admin_address} --token-file {_short(fleet.token_file)} top",
        soft_wrap=True,
    )
    console.print("Ctrl-C stops everything.")


def curl_line(url: str, model: str) -> str:
    """A command that streams a chat completion from a router."""
    return (
        f"curl -N {url}/v1/chat/completions -H 'content-type: application/json' "
        f'-d \'{{"model": "{model}", "stream": true, "max_tokens": 16, '
        f'"messages": [{{"role": "user", "content": "hello"}}]}}\''
    )


async def _watch(console: Console, fleet: Fleet, stop: asyncio.Event, *, plain: bool) -> None:
    if plain:
        while not stop.is_set():
            console.print(await _status_line(fleet), soft_wrap=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), PLAIN_REFRESH_S)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not stop.is_set():
            live.update(await _status_view(fleet), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), REFRESH_S)


async def _top(fleet: Fleet) -> admin_pb2.TopResponse | None:
    try:
        reply: admin_pb2.TopResponse = await fleet.admin().Top(
            admin_pb2.TopRequest(), timeout=CALL_TIMEOUT_S, metadata=fleet.metadata()
        )
    except grpc.aio.AioRpcError:
        return None
    return reply


async def _status_line(fleet: Fleet) -> str:
    stamp = time.strftime("%H:%M:%S")
    top = await _top(fleet)
    if top is None:
        return f"{stamp} control plane unreachable (routers go on with their last snapshot)"
    healthy = sum(target.health == 2 and not target.cordoned for target in top.targets)
    inflight = sum(load.inflight for load in top.loads)
    rate = sum(entry.top.requests_per_s for entry in top.routers)
    tokens = sum(entry.top.output_tokens_per_s for entry in top.routers)
    return (
        f"{stamp} workers {healthy}/{len(top.targets)} routers {len(top.routers)} inflight {inflight} "
        f"requests/s {rate:.1f} tokens/s {tokens:.0f}"
    )


async def _status_view(fleet: Fleet) -> Group:
    header = Text(await _status_line(fleet), style="bold")
    top = await _top(fleet)
    if top is None:
        return Group(header)
    loads: dict[str, list[float]] = {}
    for load in top.loads:
        sums = loads.setdefault(load.target_id, [0, 0, 0.0])
        sums[0] += load.inflight
        sums[1] += load.decodes
        sums[2] += load.queued_prefill_tokens
    table = Table(box=None, pad_edge=False)
    for column in ("WORKER", "POOL", "PROFILE", "STATE"):
        table.add_column(column)
    for column in ("INFLIGHT", "DECODING", "QUEUED TOKENS", "KV USE"):
        table.add_column(column, justify="right")
    for target in top.targets:
        inflight, decodes, queued = loads.get(target.target_id, [0, 0, 0.0])
        state = admin_state(target.health, target.cordoned, target.draining)
        kv = f"{target.load.kv_usage:.0%}"
        table.add_row(
            target.target_id, target.pool, target.profile, state, f"{inflight}", f"{decodes}", f"{queued:.0f}", kv
        )
    return Group(header, table)


def admin_state(health: int, cordoned: bool, draining: bool) -> str:
    """One word for the state of a target."""
    if draining:
        return "draining"
    if cordoned:
        return "cordoned"
    return {1: "starting", 2: "healthy", 3: "suspect", 4: "gone", 5: "reconfiguring"}.get(health, "unknown")


def _split_path(argv: list[str]) -> tuple[str | None, list[str]]:
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    return None, argv


def _short(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
