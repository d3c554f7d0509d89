"""A relay inside the test's event loop, scripted workers behind real sockets, and a raw HTTP client in front."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec

from router.http.server import HttpServer
from router.relay.context import RelayContext
from router.relay.fleet import RelayFleet
from router.relay.service import RelayService
from router.relay.settings import RelaySettings
from router.routing.accounts import AccountsReader
from router.routing.buffers import in_memory
from router.routing.live import LiveFleet
from router.routing.ring_build import build_table
from router.routing.table import encode
from router.shm.counters import CounterSlab
from router.telemetry.metrics import RelayMetrics
from twofold.model.fleet import FleetSnapshot, Health, Pool, RoutingPolicy, Target
from twofold.model.profile import EngineProfile, StepLaw

PROFILE = EngineProfile(
    name="p",
    gpu="g",
    model_class="8b",
    law=StepLaw(
        base_s=0.005,
        decode_per_seq_s=1e-5,
        decode_per_kv_token_s=1e-9,
        prefill_per_token_s=1e-4,
        prefill_per_token_context_s=1e-10,
    ),
    kv_capacity_tokens=100_000,
)
JSON_HEADERS = "content-type: application/json\r\n"


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until ``condition`` holds; fail after ``seconds``."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "condition not met in time"
        await asyncio.sleep(0.002)


class WorkerRequest:
    """One request as a worker got it."""

    def __init__(self, head: bytes, body: bytes, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.line = lines[0]
        self.headers = [(line.split(": ", 1)[0], line.split(": ", 1)[1]) for line in lines[1:] if line]
        self.fields = dict(self.headers)
        self.body = body
        self.writer = writer
        self.reader = reader

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def start_stream(self, extra: bytes = b"") -> None:
        await self.send(
            b"HTTP/1.1 200 OK\r\ndate: x\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            + extra
            + b"transfer-encoding: chunked\r\n\r\n"
        )

    async def event(self, data: bytes) -> None:
        await self.send(chunk(b"data: " + data + b"\n\n"))

    async def reply(self, status: int, body: bytes, extra: bytes = b"") -> None:
        await self.send(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b"
            % (status, extra, len(body), body)
        )

    def reset(self) -> None:
        """End the connection at once, with RST where bytes are unread."""
        self.writer.transport.abort()


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def token(text: str, finish: str | None = None) -> bytes:
    """A completion event as vLLM writes it."""
    reason = b"null" if finish is None else b'"%b"' % finish.encode()
    return (
        b'{"id":"cmpl-1","object":"text_completion","model":"m","choices":[{"index":0,"text":%b,"finish_reason":%b}]}'
        % (
            msgspec.json.encode(text),
            reason,
        )
    )


Script = Callable[[WorkerRequest], Awaitable[None]]


async def complete_stream(request: WorkerRequest, tokens: int = 3) -> None:
    """A well-behaved stream."""
    await request.start_stream()
    for i in range(tokens):
        await request.event(token(f" t{i}", "length" if i == tokens - 1 else None))
    await request.event(b"[DONE]")
    await request.send(b"0\r\n\r\n")


async def answer(request: WorkerRequest) -> None:
    """A stream or a whole response, as the request asks."""
    if b'"stream":true' in request.body.replace(b" ", b""):
        await complete_stream(request)
    else:
        await request.reply(
            200, b'{"choices":[{"text":"hi","finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
        )


class FakeWorker:
    """A worker that does what its script says; scripts are used up one a request, the last one stays."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts: list[Script] = list(scripts) or [answer]
        self.requests: list[WorkerRequest] = []
        self.connections = 0
        self.gone = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "FakeWorker":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await until(lambda: not self._tasks)
        await asyncio.sleep(0)

    async def refuse(self) -> None:
        """Close the listener and every connection."""
        await self.__aexit__()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body = await reader.readexactly(length)
                request = WorkerRequest(head[:-4], body, writer, reader)
                self.requests.append(request)
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                await script(request)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            self.gone += 1
            self._tasks.discard(task)
            writer.transport.abort()


class Response:
    """A response as it came over the wire."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes, raw_body: bytes, complete: bool) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.raw_body = raw_body
        self.complete = complete

    @property
    def error(self) -> dict[str, object]:
        value = msgspec.json.decode(self.body)
        assert isinstance(value, dict)
        return dict(value["error"])


class Client:
    """One raw connection to the relay."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, path: str, body: bytes, headers: str = "", version: str = "1.1") -> None:
        await self.send(
            f"POST {path} HTTP/{version}\r\nhost: x\r\n{JSON_HEADERS}{headers}"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def get(self, path: str, method: str = "GET") -> "Response":
        await self.send(f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        return await self.response(head_only=method == "HEAD")

    async def head(self) -> tuple[int, dict[str, str]]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.split("\r\n")
        fields = {}
        for line in lines[1:]:
            if line:
                name, value = line.split(": ", 1)
                fields[name] = value
        return int(lines[0].split(" ")[1]), fields

    async def response(self, head_only: bool = False) -> Response:
        status, fields = await self.head()
        body, raw, complete = b"", b"", True
        try:
            if head_only or status == 204:
                pass
            elif fields.get("transfer-encoding") == "chunked":
                while True:
                    line = await self.reader.readuntil(b"\r\n")
                    size = int(line, 16)
                    data = await self.reader.readexactly(size + 2)
                    raw += line + data
                    if size == 0:
                        break
                    body += data[:-2]
            elif "content-length" in fields:
                body = await self.reader.readexactly(int(fields["content-length"]))
            else:
                body = await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            complete = False
        return Response(status, fields, body, raw, complete)

    async def closed(self) -> bool:
        """Whether the relay closes the connection without sending more."""
        try:
            return await asyncio.wait_for(self.reader.read(), 5.0) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.transport.abort()


class TestRelay:
    """A relay with a listener of its own."""

    __test__ = False

    def __init__(self, directory: Path, settings: RelaySettings) -> None:
        self.settings = settings
        self.slab = CounterSlab.open(directory / "counters.relay-0")
        buffers = in_memory(64)[0]
        self.live = LiveFleet(buffers)
        self._accounts = AccountsReader((buffers.own.accounts,))
        fleet = RelayFleet(self.live, worker_id_key="key")
        self.context = RelayContext(
            settings, fleet, RelayMetrics(self.slab), clock=time.monotonic, wall_clock=time.time
        )
        self.service = RelayService(self.context, version="test")
        self.http = HttpServer(self.service, settings.http_limits(), self.context.budget)
        self.port = 0
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._clients: list[Client] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self.http, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tick()

    def _tick(self) -> None:
        now_s = time.monotonic()
        for exchange in list(self.context.exchanges):
            exchange.check(now_s)
        self.http.sweep(now_s)
        self.context.upstream.sweep(now_s)
        self._timer = asyncio.get_running_loop().call_later(0.01, self._tick)

    async def stop(self) -> None:
        assert self._server is not None
        assert self._timer is not None
        self._timer.cancel()
        self._server.close()
        for client in self._clients:
            client.close()
        for connection in list(self.http.connections):
            connection.abort()
        self.context.upstream.close()
        await until(lambda: not self.http.connections and not self.context.exchanges)
        for _ in range(3):
            await asyncio.sleep(0)
        self.slab.close()

    def install(
        self, *workers: FakeWorker | str, pool: Pool | None = None, policy: RoutingPolicy | None = None
    ) -> None:
        """Publish a snapshot with these workers, in one pool."""
        the_pool = pool or Pool(name="pool", models=("m", "alias"), adapters=("lora",), reference_profile="p")
        targets = tuple(
            Target(
                target_id=f"w{i}",
                worker_id=f"w{i}",
                pool=the_pool.name,
                url=worker if isinstance(worker, str) else f"http://127.0.0.1:{worker.port}",
                profile="p",
                ordinal=i,
                weight_tokens_s=1000.0,
                health=Health.HEALTHY,
                incarnation=1,
            )
            for i, worker in enumerate(workers)
        )
        self.install_snapshot(
            FleetSnapshot(
                epoch=1,
                version=1,
                pools=(the_pool,),
                profiles=(PROFILE,),
                targets=targets,
                policy=policy or RoutingPolicy(name="round_robin", retry_budget_ratio=1.0),
            )
        )

    def install_snapshot(self, snapshot: FleetSnapshot) -> None:
        slots = {target.target_id: i for i, target in enumerate(snapshot.targets)}
        table, rings = build_table(snapshot, slots)
        self.context.fleet.install(encode(table), memoryview(rings))
        self.context.upstream.keep_only(self.context.fleet.addresses())

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        client = Client(reader, writer)
        self._clients.append(client)
        return client

    async def call(self, path: str, body: bytes, headers: str = "") -> Response:
        """One request on a connection of its own."""
        client = await self.client()
        await client.post(path, body, headers)
        response = await asyncio.wait_for(client.response(), 20.0)
        client.close()
        return response

    def count(self, name: str, *labels: str) -> float:
        """Value of a counter."""
        family = getattr(self.context.metrics, name)
        cell = family if isinstance(family, int) else family.cell(*labels)
        return float(self.slab.cells[cell])

    def loads(self) -> list[tuple[int, int]]:
        """(in flight, decodes) of the slots in use: zero when all accounts are settled."""
        rows = [self._accounts.row(state.slot) for state in self.live.targets()]
        return [(row.inflight, row.decodes) for row in rows]


@contextlib.asynccontextmanager
async def relay(directory: Path, **changes: object) -> AsyncIterator[TestRelay]:
    """A running relay; ``changes`` are settings."""
    made = TestRelay(directory, msgspec.structs.replace(RelaySettings(), **changes))
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
