"""Real launcher, agent and relays: what survives which death, and what is left after a stop."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from .fakes import FakeControlPlane, FakeWorker, Replica, fleet, target, until

BODY = {"model": "m", "prompt": "hello", "stream": True, "max_tokens": 2}


async def complete(replica: Replica, session: aiohttp.ClientSession) -> str:
    """One streamed completion; its text, or an assertion about its status."""
    async with session.post(f"{replica.url}/v1/completions", json=BODY) as reply:
        text = await reply.text()
        assert reply.status == 200, text
        return text


async def test_killing_the_agent_touches_no_request_and_a_new_one_takes_over(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0", worker.url), target("t-1", worker.url)))
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 2)
        before = await replica.state(session)
        running = asyncio.create_task(complete(replica, session))
        await until(lambda: worker.requests == 1, "the request reaches the worker")
        children = replica.children()
        os.kill(children["agent"].pid, signal.SIGKILL)
        during = asyncio.create_task(complete(replica, session))
        await until(lambda: worker.requests == 2, "a request after the agent's death reaches the worker")
        await until(
            lambda: replica.children().get("agent", children["agent"]).pid != children["agent"].pid, "a new agent"
        )
        worker.release.set()
        assert "[DONE]" in await running
        assert "[DONE]" in await during
        await replica.usable(session, 2)
        after = await replica.state(session)
        assert after["pid"] != before["pid"]
        assert after["relays"]["relay-0"]["pid"] == before["relays"]["relay-0"]["pid"]
        assert after["board_version"] == before["board_version"], "an unchanged fleet was published again"
        await until(lambda: len(control_plane.watches) == 2, "the new agent watches")
        assert control_plane.watches[1] == (1, 1), "the new agent did not resume"


async def test_a_killed_relay_comes_back_on_its_socket_and_its_work_leaves_the_accounts(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address, relays=2) as replica:
        await replica.usable(session, 1)
        tasks: list[asyncio.Task[str]] = []

        async def busy() -> dict[str, Any] | None:
            """Requests until both relays hold some."""
            state = await replica.state(session)
            if all(relay["inflight"] for relay in state["relays"].values()):
                return state
            if len(tasks) < 60:
                tasks.append(asyncio.create_task(complete(replica, session)))
            return None

        state = await until(busy, "both relays hold requests")
        held = {name: relay["inflight"] for name, relay in state["relays"].items()}
        await until(lambda: control_plane.loads["r0"][0]["inflight"] == len(tasks), "all load reported")
        children = replica.children()
        os.kill(children["relay-1"].pid, signal.SIGKILL)
        await until(lambda: control_plane.loads["r0"][0]["inflight"] < len(tasks), "the dead relay's load is gone")

        async def restarted() -> bool:
            relay = (await replica.state(session))["relays"]["relay-1"]
            return relay["pid"] not in (0, children["relay-1"].pid) and relay["state"] == "serving"

        await until(restarted, "a new relay-1")
        now = replica.children()
        assert now["relay-0"].pid == children["relay-0"].pid
        assert now["agent"].pid == children["agent"].pid
        worker.release.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        done = [result for result in results if isinstance(result, str) and "[DONE]" in result]
        assert len(done) >= held["relay-0"], "requests of the other relay were touched"
        await asyncio.gather(*(complete(replica, session) for _ in range(20)))
        await until(lambda: control_plane.loads["r0"][0]["inflight"] == 0, "accounts return to zero")
        assert 'twofold_requests_total{pool="pool",code="200"}' in await replica.metrics(session)


async def test_stop_leaves_no_process_no_port_and_no_shared_memory(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address, relays=2) as replica:
        await replica.usable(session, 1)
        running = asyncio.create_task(complete(replica, session))
        await until(lambda: worker.requests == 1, "the request reaches the worker")
        directories = replica.shared_directories()
        assert len(directories) == 1
        pids = [child.pid for child in replica.children().values()]
        assert len(pids) == 3
        assert replica.process is not None
        replica.process.send_signal(signal.SIGTERM)
        port = int(replica.url.rsplit(":", 1)[1])

        def refused() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) != 0

        await until(refused, "new connections are refused")
        worker.release.set()
        assert "[DONE]" in await running, "a running request was cut by a graceful stop"
        assert await asyncio.wait_for(replica.process.wait(), 15) == 0
        assert not directories[0].exists()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        with socket.socket() as sock:
            # Ended connections may still be in TIME_WAIT; a listener would refuse this all the same.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))


async def test_streams_that_outlast_the_grace_period_are_ended(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address, grace_s="0.5") as replica:
        await replica.usable(session, 1)
        running = asyncio.create_task(complete(replica, session))
        await until(lambda: worker.requests == 1, "the request reaches the worker")
        assert replica.process is not None
        replica.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(replica.process.wait(), 15) == 0
        with contextlib.suppress(aiohttp.ClientError, AssertionError):
            assert "[DONE]" not in await running


async def test_the_share_of_a_relay_that_keeps_dying_goes_to_its_siblings(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    worker.release.set()
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address, relays=2) as replica:
        await replica.usable(session, 1)
        killed: set[int] = set()

        def is_given_up_for_a_while() -> bool:
            relay = replica.children().get("relay-1")
            if relay is not None and relay.pid not in killed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    relay.kill()
                killed.add(relay.pid)
            return '"restart_in_s": 3.' in (tmp_path / "log").read_text()

        await until(is_given_up_for_a_while, "relay-1 is in a crash loop", timeout_s=40)
        # While no process reads that socket, a connection to it would hang until the restart.
        answers = await asyncio.wait_for(asyncio.gather(*(complete(replica, session) for _ in range(30))), 2.5)
        assert all("[DONE]" in answer for answer in answers)
        assert "relay-1" not in replica.children()

        async def restarted() -> bool:
            relay = (await replica.state(session))["relays"]["relay-1"]
            return relay["pid"] not in killed and relay["state"] == "serving"

        await until(restarted, "relay-1 is started again")
        await until(lambda: served_by_both(replica, session), "both relays serve")


async def served_by_both(replica: Replica, session: aiohttp.ClientSession) -> bool:
    """Whether a burst of requests reached both relays, by their CPU time (their counters are only known in sum)."""
    relays = [child for name, child in replica.children().items() if name.startswith("relay")]
    before = [sum(relay.cpu_times()[:2]) for relay in relays]
    await asyncio.gather(*(complete(replica, session) for _ in range(60)))
    return len(relays) == 2 and all(
        sum(relay.cpu_times()[:2]) > then for relay, then in zip(relays, before, strict=True)
    )


@pytest.mark.parametrize("name", ["relay-0", "agent"])
async def test_a_child_that_hangs_is_killed_and_replaced(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession, name: str
) -> None:
    await control_plane.set(fleet(target("t-0")))
    async with Replica(tmp_path, control_plane.address, hang_timeout_s="2") as replica:
        await replica.usable(session, 1)
        hung = replica.children()[name]
        os.kill(hung.pid, signal.SIGSTOP)
        await until(lambda: replica.children().get(name, hung).pid != hung.pid, "a new process")
        await replica.usable(session, 1)
        assert "child hangs, killing it" in (tmp_path / "log").read_text()


async def test_without_a_memory_backed_directory_the_run_directory_serves(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    worker.release.set()
    await control_plane.set(fleet(target("t-0", worker.url)))
    run_dir = Path(tempfile.mkdtemp(prefix="twofold-"))  # short: a Unix socket lies in it
    try:
        async with Replica(run_dir, control_plane.address, shm_dir="/nonexistent") as replica:
            await replica.usable(session, 1)
            assert (run_dir / "routers" / "r0" / "shm" / "agent.sock").exists()
            assert "[DONE]" in await complete(replica, session)
        assert not (run_dir / "routers" / "r0" / "shm").exists()
    finally:
        shutil.rmtree(run_dir)


async def test_children_end_with_a_launcher_that_is_killed_and_the_next_one_cleans_up(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0")))
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 1)
        children, directories = replica.children(), replica.shared_directories()
        assert replica.process is not None
        replica.process.kill()
        await replica.process.wait()
        await until(lambda: not any(child.is_running() for child in children.values()), "children end")
        assert directories[0].exists()
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 1)
        assert replica.shared_directories() == directories
    assert not directories[0].exists()


async def test_a_port_or_replica_in_use_is_one_line_and_exit_1(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession
) -> None:
    async with Replica(tmp_path, control_plane.address) as replica:
        port = replica.url.rsplit(":", 1)[1]
        for run_dir, flags, message in (
            (tmp_path / "other", {"port": port}, f"cannot listen on 127.0.0.1:{port}: address already in use"),
            (tmp_path, {}, "replica r0 already runs"),
        ):
            run_dir.mkdir(exist_ok=True)
            second = Replica(run_dir, control_plane.address, **flags)
            process = await asyncio.create_subprocess_exec(
                *second._argv, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
            )
            _, stderr = await asyncio.wait_for(process.communicate(), 30)
            assert process.returncode == 1
            assert message in stderr.decode()
            assert len(stderr.decode().splitlines()) == 1
        assert (await replica.state(session))["replica_id"] == "r0"


@pytest.mark.parametrize("flags", [{"token_file": "/nonexistent"}, {"relay_config": "/nonexistent"}])
async def test_settings_that_a_child_refuses_end_the_replica_with_exit_2(tmp_path: Path, flags: dict[str, str]) -> None:
    replica = Replica(tmp_path, "127.0.0.1:1", **flags)
    process = await asyncio.create_subprocess_exec(
        *replica._argv, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert "/nonexistent" in stderr.decode()
