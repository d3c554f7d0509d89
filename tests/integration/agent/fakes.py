"""A control plane, a worker and a replica's processes, as small as the agent's tests need them."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import psutil

from twofold import wire
from twofold.model.fleet import FleetSnapshot, Health, Pool, Target
from twofold.model.profile import EngineProfile, StepLaw
from twofold.v1 import fleet_pb2, fleet_pb2_grpc, router_pb2, router_pb2_grpc

PROFILE = EngineProfile(
    name="p",
    gpu="g",
    model_class="8b",
    law=StepLaw(
        base_s=0.005,
        decode_per_seq_s=1e-5,
        decode_per_kv_token_s=1e-8,
        prefill_per_token_s=1e-4,
        prefill_per_token_context_s=1e-9,
    ),
    kv_capacity_tokens=100_000,
    max_num_batched_tokens=2048,
    max_num_seqs=256,
    max_model_len_tokens=8192,
    source="test",
)


def target(name: str, url: str = "http://127.0.0.1:9", **changes: Any) -> Target:
    """A healthy target."""
    values: dict[str, Any] = {
        "target_id": name,
        "worker_id": name,
        "pool": "pool",
        "url": url,
        "profile": "p",
        "ordinal": int(name.rsplit("-", 1)[-1]),
        "weight_tokens_s": 1000.0,
        "health": Health.HEALTHY,
        **changes,
    }
    return Target(**values)


def fleet(*targets: Target, epoch: int = 1, version: int = 1) -> FleetSnapshot:
    """A snapshot with one pool that serves the model "m"."""
    return FleetSnapshot(
        epoch=epoch,
        version=version,
        pools=(Pool(name="pool", models=("m",), reference_profile="p", max_model_len_tokens=8192),),
        profiles=(PROFILE,),
        targets=tuple(sorted(targets, key=lambda t: t.target_id)),
    )


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Wait for ``condition`` (plain or async) to be true and return its value."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
        except (aiohttp.ClientError, OSError, TimeoutError):
            value = None
        if value:
            return value
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        await asyncio.sleep(0.02)


class FakeControlPlane(fleet_pb2_grpc.FleetServiceServicer, router_pb2_grpc.RouterServiceServicer):
    """Streams what ``set`` was given; keeps what routers report and passes it on to the others."""

    def __init__(self, token: str = "") -> None:
        self._token = token
        self._server: grpc.aio.Server | None = None
        self._changed = asyncio.Condition()
        self._commands: dict[str, asyncio.Queue[router_pb2.ReportResponse]] = {}
        self.snapshot: FleetSnapshot | None = None
        self.port = 0
        self.watches: list[tuple[int, int]] = []
        self.hellos: dict[str, router_pb2.RouterHello] = {}
        self.loads: dict[str, dict[int, dict[str, float]]] = {}
        self.ticks: list[tuple[str, router_pb2.LoadTick]] = []
        self._standing: dict[str, router_pb2.PeerLoad] = {}
        self.prefixes: list[tuple[str, int, list[int]]] = []
        self.demand: list[router_pb2.DemandTick] = []
        self.results: dict[str, router_pb2.CommandResult] = {}
        self.send_deltas = True

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> "FakeControlPlane":
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self, self._server)
        router_pb2_grpc.add_RouterServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def set(self, snapshot: FleetSnapshot) -> None:
        async with self._changed:
            self.snapshot = snapshot
            self._changed.notify_all()

    def command(self, replica_id: str, command: router_pb2.RouterCommand) -> None:
        self._commands[replica_id].put_nowait(router_pb2.ReportResponse(command=command))

    def tell(self, replica_id: str, response: router_pb2.ReportResponse) -> None:
        self._commands[replica_id].put_nowait(response)

    async def _check(self, context: Any) -> None:
        given = dict(context.invocation_metadata()).get("authorization", "")
        if self._token and given != f"Bearer {self._token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[fleet_pb2.WatchResponse]:
        await self._check(context)
        self.watches.append((request.epoch, request.version))
        sent: FleetSnapshot | None = None
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda seen=sent: self.snapshot is not None and self.snapshot is not seen)
                now = self.snapshot
            assert now is not None
            if sent is None or sent.epoch != now.epoch or not self.send_deltas:
                yield fleet_pb2.WatchResponse(snapshot=wire.snapshot_to_proto(now))
            else:
                yield fleet_pb2.WatchResponse(delta=wire.diff(sent, now))
            sent = now

    async def Report(self, requests: Any, context: Any) -> AsyncIterator[router_pb2.ReportResponse]:
        await self._check(context)
        hello = (await anext(aiter(requests))).hello
        out: asyncio.Queue[router_pb2.ReportResponse] = asyncio.Queue()
        known = [peer for name, peer in self._standing.items() if name != hello.replica_id]
        out.put_nowait(router_pb2.ReportResponse(peers=known))
        self._standing[hello.replica_id] = router_pb2.PeerLoad(replica_id=hello.replica_id, full=True)
        self._commands[hello.replica_id] = out
        self.hellos[hello.replica_id] = hello
        reader = asyncio.create_task(self._read(hello.replica_id, requests))
        try:
            while True:
                yield await out.get()
        finally:
            reader.cancel()

    async def _read(self, replica_id: str, requests: Any) -> None:
        async for message in requests:
            kind = message.WhichOneof("message")
            if kind == "load":
                self._note_load(replica_id, message.load)
            elif kind == "demand":
                self.demand.append(message.demand)
            elif kind == "result":
                self.results[message.result.command_id] = message.result

    def _note_load(self, replica_id: str, load: router_pb2.LoadTick) -> None:
        self.ticks.append((replica_id, load))
        rows = self.loads.setdefault(replica_id, {})
        for index, ordinal in enumerate(load.ordinals):
            rows[ordinal] = {"inflight": load.inflight[index], "stored": load.stored_tokens[index]}
        standing = self._standing[replica_id].load
        # Later rows of an ordinal count, so that all ticks one after the other are the state.
        standing.MergeFrom(load)
        standing.epoch = load.epoch
        self.prefixes += [(replica_id, prefix.ordinal, list(prefix.hashes)) for prefix in load.prefixes]
        for other, queue in self._commands.items():
            if other != replica_id:
                peer = router_pb2.PeerLoad(replica_id=replica_id, load=load)
                queue.put_nowait(router_pb2.ReportResponse(peers=[peer]))


class FakeWorker:
    """An engine that streams one event, then waits for ``release`` before it goes on."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self.release = asyncio.Event()
        self.requests = 0
        self.aborted = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> "FakeWorker":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                await reader.readexactly(length)
                self.requests += 1
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                self._event(writer, {"choices": [{"index": 0, "text": "a", "finish_reason": None}]})
                gone = asyncio.create_task(reader.read(1))
                released = asyncio.create_task(self.release.wait())
                await asyncio.wait({gone, released}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    self.aborted += 1
                    released.cancel()
                    break
                gone.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await gone
                self._event(writer, {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]})
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
                await writer.drain()
        writer.close()

    @staticmethod
    def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
        event = b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))


class Replica:
    """``python -m router`` with its children; ends what it started."""

    def __init__(self, run_dir: Path, control_plane: str, *, name: str = "r0", relays: int = 1, **flags: str) -> None:
        self.name = name
        self.run_dir = run_dir
        self._argv = [
            *(sys.executable, "-m", "router", "--replica-id", name, "--port", "0", "--admin-port", "0"),
            *("--relays", str(relays), "--run-dir", str(run_dir), "--control-plane", control_plane),
            *("--slots", "64", "--grace-s", "5", "--log-file", str(run_dir / "log")),
            *(part for key, value in flags.items() for part in ("--" + key.replace("_", "-"), value)),
        ]
        self.process: asyncio.subprocess.Process | None = None
        self.url = ""
        self.admin = ""
        self._seen: set[int] = set()

    async def __aenter__(self) -> "Replica":
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.process = await asyncio.create_subprocess_exec(
            *self._argv,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self.process.stdout is not None
        line = (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode()
        _, self.url, _, self.admin = (part.strip().split(" ")[-1] for part in _cut(line))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.children()
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), 15)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        for pid in self._seen:
            with contextlib.suppress(ProcessLookupError):
                if psutil.pid_exists(pid) and "router" in " ".join(psutil.Process(pid).cmdline()):
                    os.kill(pid, signal.SIGKILL)

    def children(self) -> dict[str, psutil.Process]:
        """Running children by name: "agent", "relay-0", …"""
        assert self.process is not None
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                argv = child.cmdline()
                if "router.agent" in argv:
                    found["agent"] = child
                elif "router.relay" in argv:
                    found[f"relay-{argv[argv.index('--index') + 1]}"] = child
                self._seen.add(child.pid)
        return found

    async def state(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get(f"{self.admin}/debug/state") as reply:
            state: dict[str, Any] = await reply.json()
            return state

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        async with session.get(f"{self.admin}/metrics") as reply:
            return await reply.text()

    async def usable(self, session: aiohttp.ClientSession, count: int) -> None:
        """Wait until every relay has installed a table with ``count`` usable targets."""

        async def check() -> bool:
            return (await self.state(session))["usable_targets"] == count

        await until(check, f"{count} usable targets")

    def shared_directories(self) -> list[Path]:
        """Directories under /dev/shm that relays and agent of this replica have mapped."""
        found = set()
        for child in self.children().values():
            for mapping in child.memory_maps(grouped=False):
                if mapping.path.startswith("/dev/shm/twofold-"):
                    found.add(Path(mapping.path).parent)
        return sorted(path for path in found if path.name != "board")


def _cut(line: str) -> tuple[str, str, str, str]:
    # "router NAME: listening on URL, admin on URL"
    head, _, rest = line.partition(": ")
    serving, _, admin = rest.partition(", ")
    return head, serving, "", admin
