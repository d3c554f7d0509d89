"""The whole thing in real processes: it serves, agrees, survives the death of each part, and leaves nothing behind."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from support.load import Load

from twofold.cli.fleet_runner import Fleet
from twofold.v1 import admin_pb2, router_pb2

MODEL = "llama-3.1-8b"


@asynccontextmanager
async def running(load: Load, streams: int) -> AsyncIterator[None]:
    """Keep a load running around the block; its requests are ended and awaited."""
    task = asyncio.create_task(load.run(streams))
    try:
        yield
    finally:
        load.stop()
        await task


async def epoch(fleet: Fleet) -> int | None:
    """Epoch of the control plane that answers now, if one does."""
    try:
        return (await fleet.snapshot()).epoch
    except grpc.aio.AioRpcError:
        return None


async def debug_state(url: str) -> dict[str, Any]:
    """What an agent says of its replica; empty while it is away."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/debug/state") as reply:
            state: dict[str, Any] = await reply.json()
            return state
    except aiohttp.ClientError:
        return {}


def published_epoch(state: dict[str, Any]) -> int:
    """Epoch of the snapshot that the replica's relays route by; 0 while there is none."""
    return int((state.get("snapshot") or {}).get("epoch", 0))


async def until(condition, timeout_s: float = 40.0) -> None:  # type: ignore[no-untyped-def]
    """Wait until the awaitable ``condition()`` is true."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.05)


def children(pid: int) -> dict[str, int]:
    """Module run by each child of a process, as ``{"router.agent": pid, ...}``; several relays get an index."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            argv = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            module = argv[argv.index(b"-m") + 1].decode() if b"-m" in argv else argv[0].decode()
            found[module if module not in found else f"{module}.{len(found)}"] = int(child)
    return found


async def test_serves_verified_streams_and_leaves_nothing_behind(start_fleet) -> None:  # type: ignore[no-untyped-def]
    fleet: Fleet = await start_fleet(replicas=2, relays=2, engines=4)
    load = Load(fleet.router_urls, MODEL)
    async with running(load, 8):
        await load.until(lambda: len(load.outcomes) >= 60)
    assert load.errors() == []
    assert len({outcome.worker for outcome in load.outcomes}) == 4
    engine_pids = [int(p.read_text().split('"pid":')[1].split(",")[0].strip(" }")) for p in engine_states(fleet)]
    await fleet.stop()
    assert all(not Path(f"/proc/{pid}").exists() for pid in engine_pids)
    routers = fleet.file.routers
    for port in (routers.port, routers.port + 1, routers.admin_port, int(fleet.admin_address.split(":")[1])):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def engine_states(fleet: Fleet) -> list[Path]:
    """State files of the fleet's engine processes."""
    return sorted((fleet.run_dir / "engines").glob("*.json"))


async def test_all_relays_agree_on_the_homes_of_every_key(start_fleet) -> None:  # type: ignore[no-untyped-def]
    fleet: Fleet = await start_fleet(replicas=2, relays=2, engines=6)
    keys = [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in range(1, 2001)]
    answers = []
    async with aiohttp.ClientSession() as session:
        for url in fleet.router_admin_urls:
            async with session.post(f"{url}/homes", json={"pool": "llama-8b", "keys": keys}) as reply:
                assert reply.status == 200
                answers += list((await reply.json())["relays"].values())
    assert len(answers) == 4
    assert all(answer == answers[0] for answer in answers)
    homes = answers[0]["homes"]
    assert len(homes) == len(keys)
    assert all(len(set(four)) == 4 for four in homes)
    body = b'{"model": "%s", "prompt": "%s"}' % (MODEL.encode(), b"a prompt of some length " * 200)
    request = admin_pb2.ExplainRequest(
        subject=router_pb2.ExplainCommand(request=router_pb2.HypotheticalRequest(path="/v1/completions", body=body))
    )
    reply = await fleet.admin().Explain(request, timeout=5, metadata=fleet.metadata())
    decision = reply.decisions[0]
    examined = [target.target_id for target in decision.examined if target.role.startswith("home")]
    asked = {"pool": "llama-8b", "keys": [decision.ring_key]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{fleet.router_admin_urls[1]}/homes", json=asked) as told,
    ):
        assert (await told.json())["relays"]["0"]["homes"] == [examined]


async def test_control_plane_killed_under_load(start_fleet) -> None:  # type: ignore[no-untyped-def]
    fleet: Fleet = await start_fleet(replicas=2, engines=4)
    before = await epoch(fleet)
    load = Load(fleet.router_urls, MODEL)
    async with running(load, 6):
        await load.until(lambda: len(load.outcomes) >= 20)
        assert fleet.control_plane is not None
        assert fleet.control_plane.pid is not None
        os.kill(fleet.control_plane.pid, signal.SIGKILL)

        async def resumed() -> bool:
            now = await epoch(fleet)
            states = [await debug_state(url) for url in fleet.router_admin_urls]
            return now not in (None, before) and all(published_epoch(state) == now for state in states)

        await until(resumed)
        done = len(load.outcomes)
        await load.until(lambda: len(load.outcomes) >= done + 20)
    assert load.errors() == []
    snapshot = await fleet.wait_ready(30)
    assert len(snapshot.targets) == 4


async def test_agent_killed_under_load(start_fleet) -> None:  # type: ignore[no-untyped-def]
    fleet: Fleet = await start_fleet(replicas=1, relays=2, engines=3)
    launcher = fleet.routers[0].pid
    assert launcher is not None
    load = Load(fleet.router_urls, MODEL)
    async with running(load, 6):
        await load.until(lambda: len(load.outcomes) >= 12)
        agent = children(launcher)["router.agent"]
        relays = {name: pid for name, pid in children(launcher).items() if name.startswith("router.relay")}
        os.kill(agent, signal.SIGKILL)
        done = len(load.outcomes)
        await load.until(lambda: len(load.outcomes) >= done + 20)

        async def agent_is_back() -> bool:
            return bool(published_epoch(await debug_state(fleet.router_admin_urls[0])))

        await until(agent_is_back)
    assert load.errors() == []
    assert children(launcher)["router.agent"] != agent
    assert {pid for name, pid in children(launcher).items() if name.startswith("router.relay")} == set(relays.values())


async def test_engine_killed_under_load_touches_only_what_ran_on_it(start_fleet) -> None:  # type: ignore[no-untyped-def]
    fleet: Fleet = await start_fleet(replicas=2, engines=4)
    load = Load(fleet.router_urls, MODEL, max_tokens=60)
    async with running(load, 12):
        await load.until(lambda: len(load.outcomes) >= 24)
        state = engine_states(fleet)[0]
        pid = int(state.read_text().split('"pid":')[1].split(",")[0].strip(" }"))
        os.killpg(pid, signal.SIGKILL)
        done = len(load.outcomes)
        await load.until(lambda: len(load.outcomes) >= done + 60)

        async def replaced() -> bool:
            return all(target.takes_work for target in (await fleet.snapshot()).targets)

        await until(replaced)
    workers = {outcome.worker for outcome in load.errors()}
    assert len(workers) <= 1
    assert all(outcome.status == 200 for outcome in load.errors()), "only streams that had begun may break"
    assert len(load.errors()) <= 12
