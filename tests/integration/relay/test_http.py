"""The client-facing server: own endpoints, limits, timeouts, hostile framing, fuzzed bytes."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from support.relays import FakeWorker, TestRelay, WorkerRequest, chunk, relay, until

WHOLE = b'{"model":"m","prompt":"hello"}'


async def test_own_endpoints(router: TestRelay) -> None:
    client = await router.client()
    assert (await client.get("/health")).status == 200
    assert msgspec.json.decode((await client.get("/version")).body) == {"version": "test"}
    not_ready = await client.get("/ready")
    assert (not_ready.status, not_ready.headers["x-twofold-reason"]) == (503, "rejected-no-endpoints")
    assert msgspec.json.decode((await client.get("/v1/models")).body) == {"object": "list", "data": []}
    async with FakeWorker() as worker:
        router.install(worker)
        assert (await client.get("/ready")).status == 200
        models = msgspec.json.decode((await client.get("/v1/models")).body)["data"]
        assert [model["id"] for model in models] == ["m", "alias", "lora"]
        assert [model["parent"] for model in models] == [None, None, "m"]
        assert msgspec.json.decode((await client.get("/v1/models/alias")).body)["id"] == "alias"
        missing = await client.get("/v1/models/nope")
        assert (missing.status, missing.headers["x-twofold-reason"]) == (404, "model-not-found")
        head = await client.get("/v1/models", "HEAD")
        assert head.status == 200
        assert int(head.headers["content-length"]) > 50
        options = await client.get("/v1/chat/completions", "OPTIONS")
        assert (options.status, options.headers["allow"]) == (204, "POST, OPTIONS")
        assert not worker.requests
    assert len(router.http.connections) == 1


async def test_unknown_paths_and_methods(router: TestRelay) -> None:
    client = await router.client()
    for path, method, status, reason in (
        ("/nope", "GET", 404, "not-found"),
        ("/v1/completions/x", "POST", 404, "not-found"),
        ("/v1/completions", "GET", 405, "method-not-allowed"),
        ("/v1/models", "POST", 405, "method-not-allowed"),
        ("/health", "DELETE", 405, "method-not-allowed"),
    ):
        response = await client.get(path, method)
        assert (response.status, response.headers["x-twofold-reason"]) == (status, reason)
        assert response.error["code"] == status
    # An answer before the body: the body is skipped, the connection goes on.
    await client.post("/nope", WHOLE)
    assert (await client.response()).status == 404
    assert (await client.get("/health")).status == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model":5}', b'{"model":"m"', b"\xff\xfe", b'{"a":' * 5000]
)
async def test_bad_bodies_are_400(router: TestRelay, body: bytes) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = await router.call(path, body)
            assert (response.status, response.headers["x-twofold-reason"]) == (400, "bad-request")
            assert isinstance(response.error["message"], str)
            assert "Traceback" not in response.error["message"]
        anthropic = await router.call("/v1/messages", body)
        assert msgspec.json.decode(anthropic.body)["type"] == "error"
        assert not worker.requests


async def test_body_limit_by_length_and_by_chunks(tmp_path: Path) -> None:
    async with relay(tmp_path, max_body_bytes=1000) as router, FakeWorker() as worker:
        router.install(worker)
        response = await router.call("/v1/completions", b"x" * 1001)
        assert (response.status, response.headers["x-twofold-reason"]) == (413, "body-too-large")
        client = await router.client()
        await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            await client.send(chunk(b"x" * 500))
        assert (await client.response()).status == 413
        assert await client.closed()
        waiting = await router.client()
        await waiting.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5000\r\n\r\n"
        )
        assert (await waiting.response()).status == 413
        assert not worker.requests
        assert router.context.budget.held_bytes == 0


async def test_head_limits(tmp_path: Path) -> None:
    async with relay(tmp_path, max_head_bytes=2000, max_headers=10) as router:
        for data in (
            b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 3000 + b"\r\n\r\n",
            b"GET /" + b"a" * 5000,
            b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(20)) + b"\r\n",
        ):
            client = await router.client()
            await client.send(data)
            response = await client.response()
            assert (response.status, response.headers["x-twofold-reason"]) == (431, "head-too-large")
            assert await client.closed()


async def test_smuggling_attempts_are_refused_and_close_the_connection(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        for lines in (
            b"content-length: 4\r\ntransfer-encoding: chunked\r\n",
            b"content-length: 4\r\ncontent-length: 5\r\n",
            b"content-length: 4\r\n content-length: 5\r\n",
            b"content-length: 4\nx: y\r\n",
            b"transfer-encoding: chunked, identity\r\n",
        ):
            client = await router.client()
            smuggled = b"0\r\n\r\nPOST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
            await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n" + smuggled)
            response = await client.response()
            assert (response.status, response.headers["x-twofold-reason"]) == (400, "bad-head")
            assert await client.closed()
        assert not worker.requests


async def test_slow_heads_and_bodies_run_out_of_time(tmp_path: Path) -> None:
    async with relay(tmp_path, head_timeout_s=0.2, body_timeout_s=0.2, keep_alive_s=0.2) as router:
        silent = await router.client()
        assert await silent.closed()
        for data in (b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"):
            slow = await router.client()
            await slow.send(data)
            response = await slow.response()
            assert (response.status, response.headers["x-twofold-reason"]) == (408, "client-timeout")
            assert await slow.closed()
        idle = await router.client()
        assert (await idle.get("/health")).status == 200
        assert await idle.closed()
        await until(lambda: not router.http.connections)
        assert router.context.budget.held_bytes == 0


async def test_too_many_connections_and_held_bytes(tmp_path: Path) -> None:
    async with relay(tmp_path, max_connections=3, max_buffered_bytes=10_000) as router:
        kept = [await router.client() for _ in range(3)]
        await until(lambda: len(router.http.connections) == 3)
        extra = await router.client()
        response = await extra.response()
        assert (response.status, response.headers["x-twofold-reason"]) == (503, "rejected-saturated")
        extra.close()
        for client in kept:
            await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\n" + b"x" * 6000)
        statuses = [(await client.response()).status for client in kept[1:]]
        assert statuses == [429, 429]
        assert router.context.budget.held_bytes <= 10_000


async def test_pipelined_flood_is_bounded(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def gated(request: WorkerRequest) -> None:
        await gate.wait()
        await request.reply(200, b"{}")

    async with relay(tmp_path, max_pipelined_bytes=2000) as router, FakeWorker(gated) as worker:
        router.install(worker)
        client = await router.client()
        await client.post("/v1/completions", WHOLE)
        await until(lambda: len(worker.requests) == 1)
        for _ in range(50):
            await client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 50)
        gate.set()
        response = await client.response()
        assert response.status == 200
        assert await client.closed()


async def test_half_closed_client_counts_as_gone(router: TestRelay) -> None:
    async def silent(request: WorkerRequest) -> None:
        await request.reader.read()

    async with FakeWorker(silent) as worker:
        router.install(worker)
        client = await router.client()
        await client.post("/v1/completions", WHOLE)
        await until(lambda: len(worker.requests) == 1)
        client.writer.write_eof()
        await until(lambda: worker.gone == 1)
        await until(lambda: not router.context.exchanges)


async def test_defect_of_the_router_is_500_without_a_traceback(
    router: TestRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeWorker() as worker:
        router.install(worker)

        def broken(*_: object) -> None:
            raise RuntimeError("secret detail")

        with monkeypatch.context() as patch:
            patch.setattr(router.live, "account", broken)
            response = await router.call("/v1/completions", WHOLE)
        assert (response.status, response.headers["x-twofold-reason"]) == (500, "internal")
        assert b"secret" not in response.body
        assert not router.context.exchanges
        assert router.slab.cells[router.context.metrics.inflight.cell("pool")] == 0
        assert (await router.call("/v1/completions", WHOLE)).status == 200


async def test_connection_close_is_honoured(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        client = await router.client()
        await client.post("/v1/completions", WHOLE, "connection: close\r\n")
        response = await client.response()
        assert response.headers["connection"] == "close"
        assert await client.closed()
