"""Profiles of the processes of a running replica, through its admin port."""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from .fakes import FakeControlPlane, FakeWorker, Replica, fleet, target, until

pytestmark = pytest.mark.usefixtures("worker")


async def ask(replica: Replica, session: aiohttp.ClientSession, **query: str) -> tuple[int, str]:
    async with session.get(f"{replica.admin}/debug/profile", params=query) as reply:
        return reply.status, await reply.text()


async def met(replica: Replica, session: aiohttp.ClientSession, relays: int) -> None:
    """Wait until all relays are connected to their agent."""

    async def check() -> bool:
        return len((await replica.state(session))["control_channel"]) == relays

    await until(check, "all relays have met the agent")


async def test_profiles_of_each_process(
    tmp_path: Path,
    control_plane: FakeControlPlane,
    worker: FakeWorker,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TWOFOLD_DEBUG_PROFILE", "true")
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address, relays=2) as replica:
        await replica.usable(session, 1)
        await met(replica, session, 2)
        for process in ("relay-0", "relay-1", "agent"):
            for clock in ("wall", "cpu"):
                status, text = await ask(
                    replica, session, process=process, seconds="0.3", clock=clock, format="collapsed"
                )
                assert status == 200, text
                assert all(line.startswith(f"{process};") for line in text.splitlines())
                assert text or clock == "cpu"
        status, text = await ask(replica, session, process="relay-0", seconds="0.2")
        assert status == 200
        assert text.startswith("relay-0: 0.2 s of wall time")
        assert (await ask(replica, session, process="relay-2"))[0] == 404

        relay = replica.children()["relay-1"]
        threads = relay.num_threads()
        asked = asyncio.create_task(ask(replica, session, process="relay-1", seconds="30"))
        await until(lambda: relay.num_threads() > threads, "the relay is profiled")
        assert (await ask(replica, session, process="relay-0", seconds="0.1"))[0] == 409
        relay.kill()
        status, text = await asked
        assert status == 503, text
        await met(replica, session, 2)
        assert (await ask(replica, session, process="relay-1", seconds="0.1"))[0] == 200


async def test_off_unless_switched_on(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession
) -> None:
    async with Replica(tmp_path, control_plane.address) as replica:
        status, text = await ask(replica, session, process="agent", seconds="0.1")
        assert status == 403
        assert "--debug-profile" in text
        async with session.get(f"{replica.admin}/metrics") as reply:
            assert reply.status == 200
