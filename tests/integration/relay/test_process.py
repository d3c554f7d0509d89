"""The relay as a process of its own: shared memory, listening socket by inheritance, control channel, graceful stop."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
from support.relays import PROFILE, Client, FakeWorker, WorkerRequest, answer, token, until

from router.routing.ring_build import build_table
from router.routing.table import encode
from router.shm.control import (
    Done,
    Explained,
    ExplainPast,
    ExplainRequest,
    Failed,
    Hello,
    RelayMessage,
    SetLogLevel,
    Stop,
    agent_side,
    encode_frame,
)
from router.shm.heartbeat import ProcessState
from router.shm.layout import region_sizes
from router.shm.replica import SharedReplica, agent_socket
from twofold.model.fleet import FleetSnapshot, Health, Pool, RoutingPolicy, Target

STREAM = b'{"model":"m","prompt":"hello","stream":true}'
WHOLE = b'{"model":"m","prompt":"hello"}'


class Replica:
    """Shared memory, a listening socket and one relay process."""

    def __init__(self, directory: Path) -> None:
        self.shared = SharedReplica.create(directory, relays=1, sizes=region_sizes(64))
        self.directory = directory
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.process: asyncio.subprocess.Process | None = None
        self.clients: list[Client] = []
        self.version = 0

    async def start(self, *flags: str) -> None:
        self.listener.set_inheritable(True)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "router.relay",
            "--replica-dir",
            str(self.directory),
            "--listen-fd",
            str(self.listener.fileno()),
            *flags,
            pass_fds=(self.listener.fileno(),),
        )
        beat = self.shared.heartbeat(0)
        pid = self.process.pid
        await until(lambda: beat.read().pid == pid and beat.read().state is ProcessState.SERVING, 20.0)

    def publish(self, *workers: FakeWorker, version: int = 1) -> None:
        snapshot = FleetSnapshot(
            epoch=7,
            version=version,
            pools=(Pool(name="pool", models=("m",)),),
            profiles=(PROFILE,),
            targets=tuple(
                Target(
                    target_id=f"w{i}",
                    worker_id=f"w{i}",
                    pool="pool",
                    url=f"http://127.0.0.1:{worker.port}",
                    profile="p",
                    ordinal=i,
                    weight_tokens_s=1.0,
                    health=Health.HEALTHY,
                )
                for i, worker in enumerate(workers)
            ),
            policy=RoutingPolicy(),
        )
        table, rings = build_table(snapshot, {f"w{i}": i for i in range(len(workers))})
        published = self.shared.board.publish(encode(table), rings)
        self.version = published

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        return client

    async def taken(self) -> None:
        """Wait until the relay works with the published snapshot."""
        await until(lambda: self.shared.heartbeat(0).read().snapshot_version == self.version)

    async def stop(self) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 15.0)


@contextlib.asynccontextmanager
async def replica(directory: Path, *flags: str) -> AsyncIterator[Replica]:
    made = Replica(directory / "shm")
    try:
        await made.start(*flags)
        yield made
    finally:
        if made.process is not None and made.process.returncode is None:
            made.process.kill()
            await made.process.wait()
        for client in made.clients:
            client.close()
        for _ in range(3):
            await asyncio.sleep(0)
        made.listener.close()
        made.shared.remove()


async def test_serves_before_and_after_the_first_snapshot_without_an_agent(tmp_path: Path) -> None:
    async with replica(tmp_path) as router, FakeWorker() as worker:
        client = await router.client()
        assert (await client.get("/health")).status == 200
        assert (await client.get("/ready")).status == 503
        await client.post("/v1/completions", WHOLE)
        refused = await client.response()
        assert (refused.status, refused.headers["x-twofold-reason"]) == (503, "rejected-no-endpoints")
        router.publish(worker)
        await router.taken()
        assert (await client.get("/ready")).status == 200
        await client.post("/v1/completions", STREAM)
        assert (await client.response()).complete
        client.close()
        assert await router.stop() == 0


async def test_graceful_stop_lets_streams_end_and_closes_idle_connections(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def gated(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.event(token("a"))
        await gate.wait()
        await request.event(token("b", "stop"))
        await request.event(b"[DONE]")
        await request.send(b"0\r\n\r\n")

    async with replica(tmp_path) as router, FakeWorker(gated) as worker:
        router.publish(worker)
        await router.taken()
        idle, busy = await router.client(), await router.client()
        assert (await idle.get("/health")).status == 200
        await busy.post("/v1/completions", STREAM)
        await busy.head()
        assert router.process is not None
        router.process.send_signal(signal.SIGTERM)
        assert await idle.closed()
        await until(lambda: router.shared.heartbeat(0).read().state is ProcessState.DRAINING)
        gate.set()
        rest = await busy.reader.read()
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert await router.stop() == 0
        assert router.shared.heartbeat(0).read().state is ProcessState.STOPPED


async def test_grace_period_is_bounded_and_ends_in_an_error_event(tmp_path: Path) -> None:
    async def endless(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.event(token("a"))
        await request.reader.read()

    async with replica(tmp_path, "--grace-s", "0.3") as router, FakeWorker(endless) as worker:
        router.publish(worker)
        await router.taken()
        client = await router.client()
        await client.post("/v1/completions", STREAM)
        await client.head()
        assert await router.stop() == 0
        rest = await client.reader.read()
        assert b"rejected-shutting-down" in rest
        assert b"[DONE]" not in rest
        await until(lambda: worker.gone == 1)


async def test_memory_and_imports_stay_small(tmp_path: Path) -> None:
    async with replica(tmp_path) as router, FakeWorker() as worker:
        router.publish(worker)
        await router.taken()
        client = await router.client()
        for _ in range(50):
            await client.post("/v1/completions", STREAM)
            assert (await client.response()).complete
        assert router.process is not None
        process = psutil.Process(router.process.pid)
        assert process.memory_info().rss < 64 * 1024 * 1024
        maps = {Path(entry.path).name for entry in process.memory_maps()}
        for heavy in ("grpc", "numpy", "pydantic", "google"):
            assert not any(heavy in name for name in maps)
        client.close()


async def test_snapshot_changes_are_taken_and_damaged_ones_passed_over(tmp_path: Path) -> None:
    async with replica(tmp_path) as router, FakeWorker() as one, FakeWorker() as two:
        router.publish(one)
        await router.taken()
        client = await router.client()
        await client.post("/v1/completions", WHOLE)
        assert (await client.response()).status == 200
        router.version = router.shared.board.publish(b"not a table", b"")
        await router.taken()
        await client.post("/v1/completions", WHOLE)
        assert (await client.response()).status == 200
        assert len(one.requests) == 2
        router.publish(two, version=2)
        await router.taken()
        await client.post("/v1/completions", WHOLE)
        assert (await client.response()).status == 200
        assert len(two.requests) == 1
        client.close()


async def test_restart_on_the_same_socket_clears_its_accounts(tmp_path: Path) -> None:
    async def silent(request: WorkerRequest) -> None:
        await request.reader.read()

    async with replica(tmp_path) as router, FakeWorker(silent, answer) as worker:
        router.publish(worker)
        await router.taken()
        client = await router.client()
        await client.post("/v1/completions", WHOLE)
        await until(lambda: len(worker.requests) == 1)
        assert router.process is not None
        router.process.kill()
        await router.process.wait()
        await router.start()
        fresh = await router.client()
        await fresh.post("/v1/completions", WHOLE)
        assert (await fresh.response()).status == 200
        assert router.shared.heartbeat(0).read().inflight == 0


class FakeAgent:
    """The agent's end of the control channel."""

    def __init__(self) -> None:
        self.relay: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []
        self._decoder = agent_side()
        self._messages: list[RelayMessage] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        await self.relay.put((reader, writer))

    async def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)

    async def receive(self, reader: asyncio.StreamReader) -> RelayMessage:
        while not self._messages:
            data = await asyncio.wait_for(reader.read(65_536), 10.0)
            assert data
            self._messages += self._decoder.feed(data)
        return self._messages.pop(0)


async def test_control_channel(tmp_path: Path) -> None:
    async with replica(tmp_path) as router, FakeWorker() as worker:
        router.publish(worker)
        await router.taken()
        client = await router.client()
        await client.post("/v1/completions", STREAM, "x-request-id: known\r\n")
        assert (await client.response()).complete
        client.close()
        agent = FakeAgent()
        server = await asyncio.start_unix_server(agent.accept, os.fspath(agent_socket(router.directory)))
        reader, writer = await asyncio.wait_for(agent.relay.get(), 10.0)
        assert router.process is not None
        assert await agent.receive(reader) == Hello(relay=0, pid=router.process.pid)

        writer.write(encode_frame(ExplainPast(id=1, request_id="known")))
        past = await agent.receive(reader)
        assert isinstance(past, Explained)
        assert (past.id, past.decisions[0].target_id, past.decisions[0].snapshot_epoch) == (1, "w0", 7)
        assert past.decisions[0].observed_ttft_s > 0
        assert past.decisions[0].examined[0].chosen

        writer.write(encode_frame(ExplainPast(id=2, request_id="unknown")))
        assert await agent.receive(reader) == Explained(id=2)

        hypothetical = ExplainRequest(id=3, path="/v1/completions", headers={"X-Session-Id": "s"}, body=WHOLE)
        writer.write(encode_frame(hypothetical))
        explained = await agent.receive(reader)
        assert isinstance(explained, Explained)
        assert explained.decisions[0].target_id == "w0"
        assert len(worker.requests) == 1

        for wrong in (
            msgspec.structs.replace(hypothetical, id=4, path="/nope"),
            msgspec.structs.replace(hypothetical, id=5, body=b"{"),
            SetLogLevel(id=6, level="nonsense"),
        ):
            writer.write(encode_frame(wrong))
            failed = await agent.receive(reader)
            assert isinstance(failed, Failed)
            assert failed.invalid
        writer.write(encode_frame(SetLogLevel(id=7, level="debug")))
        assert await agent.receive(reader) == Done(id=7)

        # Garbage costs the channel, not the relay; it connects again.
        writer.write(b"\xff" * 100)
        reader, writer = await asyncio.wait_for(agent.relay.get(), 10.0)
        assert isinstance(await agent.receive(reader), Hello)
        writer.write(encode_frame(Stop(id=8, grace_s=1.0)))
        assert await agent.receive(reader) == Done(id=8)
        assert await asyncio.wait_for(router.process.wait(), 10.0) == 0
        server.close()
        await agent.close()


async def test_bad_flags_are_one_line(tmp_path: Path) -> None:
    for flags, code in (([], 2), (["--replica-dir", str(tmp_path), "--listen-fd", "99"], 2)):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router.relay", *flags, stderr=asyncio.subprocess.PIPE
        )
        _, error = await process.communicate()
        assert process.returncode == code
        assert error.count(b"\n") == 1
        assert error.startswith(b"router.relay: error: ")
