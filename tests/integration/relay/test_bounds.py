"""What reaches a bound of a relay is counted under that bound's name; what fills up is shown."""

import asyncio
import socket
from pathlib import Path

import pytest
from support.relays import FakeWorker, Script, TestRelay, WorkerRequest, answer, chunk, relay, token, until

from router.relay.usage import RelayUsage
from router.shm.exposition import SlabReader

WHOLE = b'{"model":"m","prompt":"hello"}'
STREAM = b'{"model":"m","prompt":"hello","stream":true}'
PATH = "/v1/completions"
SEVERAL_READS = 1 << 20
"""Bytes that no event loop takes in at once."""


def values(router: TestRelay, name: str) -> dict[tuple[str, ...], float]:
    """Cells of a metric by its label values."""
    reader = SlabReader(router.slab.path)
    found = {item.values: item.cells[0] for item in reader.read() if item.family.name == name}
    reader.close()
    return found


def hits(router: TestRelay) -> dict[str, float]:
    """Bounds that were reached, and how often."""
    return {labels[0]: count for labels, count in values(router, "twofold_limit_hits_total").items() if count}


async def close_at_once(request: WorkerRequest) -> None:
    request.reset()


async def large_event(request: WorkerRequest) -> None:
    await request.start_stream()
    await request.send(chunk(b"data: " + token("x" * SEVERAL_READS, "length") + b"\n\n"))
    await request.event(b"[DONE]")
    await request.send(b"0\r\n\r\n")


async def large_body(request: WorkerRequest) -> None:
    await request.reply(200, b'{"choices":[],"pad":"' + b"x" * SEVERAL_READS + b'"}')


@pytest.mark.parametrize(
    ("settings", "body", "headers", "status", "limit"),
    [
        ({"max_body_bytes": 10}, WHOLE, "", 413, "body_bytes"),
        ({"max_headers": 3}, WHOLE, "a: 1\r\nb: 2\r\n", 431, "headers"),
        ({"max_head_bytes": 200}, WHOLE, "a: " + "x" * 400 + "\r\n", 431, "head_bytes"),
        ({"max_connections": 0}, WHOLE, "", 503, "connections"),
        ({"max_requests": 0}, WHOLE, "", 429, "requests"),
    ],
)
async def test_refused_requests(
    tmp_path: Path, settings: dict[str, int], body: bytes, headers: str, status: int, limit: str
) -> None:
    async with FakeWorker(answer) as worker, relay(tmp_path, **settings) as router:
        router.install(worker)
        client = await router.client()
        await client.post(PATH, body, headers)
        assert (await client.response()).status == status
        assert hits(router) == {limit: 1.0}
        rejects = values(router, "twofold_rejects_total")
        assert [labels[1] for labels in rejects] == [str(status)]


@pytest.mark.parametrize(
    ("settings", "script", "body", "limit"),
    [
        ({"max_attempts": 1}, close_at_once, WHOLE, "attempts"),
        ({"max_event_bytes": 500}, large_event, STREAM, "event_bytes"),
        ({"hold_response_bytes": 500}, large_body, WHOLE, "hold_response_bytes"),
    ],
)
async def test_what_workers_do(
    tmp_path: Path, settings: dict[str, int], script: Script, body: bytes, limit: str
) -> None:
    async with FakeWorker(script) as worker, relay(tmp_path, **settings) as router:
        router.install(worker, worker)
        await router.call(PATH, body)
        assert hits(router) == {limit: 1.0}


async def test_a_retry_budget_runs_out(tmp_path: Path) -> None:
    async with FakeWorker(close_at_once) as worker, relay(tmp_path, retry_burst=1.0, max_attempts=9) as router:
        router.install(worker, worker, worker)
        await router.call(PATH, WHOLE)
        assert hits(router) == {"retry_budget": 1.0}


async def test_times_of_requests(tmp_path: Path) -> None:
    async with relay(tmp_path, head_timeout_s=0.1, body_timeout_s=0.1) as router:
        client = await router.client()
        await client.send(b"POST ")
        assert (await client.response()).status == 408
        client = await router.client()
        await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        assert (await client.response()).status == 408
        assert hits(router) == {"head_timeout": 1.0, "body_timeout": 1.0}


async def test_pipelined_bytes(tmp_path: Path) -> None:
    async with FakeWorker(answer) as worker, relay(tmp_path, max_pipelined_bytes=100) as router:
        router.install(worker)
        client = await router.client()
        request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(WHOLE), WHOLE)
        await client.send(request * 10)
        assert (await client.response()).status == 200
        assert await client.closed()
        assert hits(router) == {"pipelined_bytes": 1.0}


async def test_usage_follows_what_is_held(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def waits(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.event(token(" a"))
        await release.wait()
        await request.event(token(" b", "length"))
        await request.event(b"[DONE]")
        await request.send(b"0\r\n\r\n")

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(5)
    waiting = socket.create_connection(listener.getsockname())
    async with FakeWorker(waits) as worker, relay(tmp_path, decisions_kept=1, max_connections=77) as router:
        router.install(worker)
        usage = RelayUsage(router.slab, router.context, listener)
        calls = [asyncio.create_task(router.call(PATH, STREAM)) for _ in range(3)]
        await until(lambda: len(worker.requests) == 3)
        usage.flush()
        assert values(router, "twofold_accept_queue") == {(): 1.0}
        assert values(router, "twofold_bound")[("accept_queue",)] == 5.0
        assert values(router, "twofold_bound")[("connections",)] == 77.0
        assert values(router, "twofold_buffered_bytes") == {(): 3.0 * len(STREAM)}
        assert values(router, "twofold_decisions_kept") == {(): 1.0}
        assert values(router, "twofold_decisions_forgotten_total") == {(): 2.0}
        assert values(router, "twofold_upstream_connects_total") == {(): 3.0}
        release.set()
        assert all(response.complete for response in await asyncio.gather(*calls))
        await until(lambda: not router.context.exchanges)
        usage.flush()
        assert values(router, "twofold_buffered_bytes") == {(): 0.0}
        assert values(router, "twofold_upstream_connections")[("idle",)] == 3.0
    waiting.close()
    listener.close()
