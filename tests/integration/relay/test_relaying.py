"""Requests through a relay to well-behaved workers: what is forwarded, what comes back."""

import asyncio
from pathlib import Path

import msgspec
import pytest
import uvloop
from support.relays import Client, FakeWorker, TestRelay, WorkerRequest, chunk, complete_stream, relay, token, until

from twofold.model.fleet import Pool

STREAM = b'{"model":"m","prompt":"hello","stream":true,"x_unknown":[1, 2]}'
WHOLE = b'{"model":"m","prompt":"hello"}'


async def test_runs_on_uvloop(router: TestRelay) -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


async def test_stream_is_forwarded_verbatim(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        response = await router.call("/v1/completions", STREAM)
        assert response.status == 200
        assert response.complete
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        expected = b"".join(
            chunk(b"data: " + event + b"\n\n")
            for event in (token(" t0"), token(" t1"), token(" t2", "length"), b"[DONE]")
        )
        assert response.raw_body == expected + b"0\r\n\r\n"
        assert worker.requests[0].body == STREAM
        await until(lambda: router.loads() == [(0, 0)])
        assert router.count("requests", "pool", "200") == 1
        assert router.slab.cells[router.context.metrics.output_events.cell("pool")] == 4


async def test_whole_response(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        response = await router.call("/v1/completions", WHOLE)
        assert response.status == 200
        assert msgspec.json.decode(response.body)["choices"][0]["text"] == "hi"
        assert response.headers["content-length"] == str(len(response.body))
        assert len(response.headers["x-twofold-worker"]) == 12
        assert "w0" not in response.headers["x-twofold-worker"]
        assert "x-twofold-worker-name" not in response.headers
        assert worker.requests[0].body == WHOLE
        await until(lambda: router.loads() == [(0, 0)])


async def test_headers_towards_the_worker(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        response = await router.call(
            "/v1/completions?x=1",
            WHOLE,
            "Authorization: Bearer secret\r\nx-api-key: secret\r\nX-Custom: kept\r\ntraceparent: 00-ab-cd-01\r\n"
            "Connection: keep-alive, x-dropped\r\nX-Dropped: 1\r\nTE: trailers\r\nCookie: secret\r\n"
            "Accept-Encoding: gzip\r\nX-Request-Id: my-id.1\r\nUser-Agent: sdk\r\n",
        )
        got = worker.requests[0]
        assert got.line == "POST /v1/completions?x=1 HTTP/1.1"
        assert got.fields["host"] == f"127.0.0.1:{worker.port}"
        assert got.fields["x-custom"] == "kept"
        assert got.fields["traceparent"] == "00-ab-cd-01"
        assert got.fields["x-request-id"] == "my-id.1"
        assert got.fields["user-agent"] == "sdk"
        assert got.fields["content-length"] == str(len(WHOLE))
        for name in ("authorization", "x-api-key", "cookie", "te", "connection", "x-dropped", "accept-encoding"):
            assert name not in got.fields
        assert response.headers["x-request-id"] == "my-id.1"


async def test_request_id_is_made_when_absent_or_unsafe(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        first = await router.call("/v1/completions", WHOLE, "x-request-id: bad id with spaces\r\n")
        second = await router.call("/v1/completions", WHOLE, f"x-request-id: {'a' * 500}\r\n")
        ids = [first.headers["x-request-id"], second.headers["x-request-id"]]
        assert len(set(ids)) == 2
        assert [request.fields["x-request-id"] for request in worker.requests] == ids
        assert all(len(one) == 24 for one in ids)


async def test_alias_is_spliced_and_nothing_else(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        body = b'{ "tools":[{"model":"alias"}], "model" : "alias","prompt":"say \\"model\\": \\"alias\\"" , "z":1.50}'
        response = await router.call("/v1/completions", body)
        assert response.status == 200
        assert worker.requests[0].body == body.replace(b'"model" : "alias"', b'"model" : "m"')


async def test_adapter_name_reaches_the_worker(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        body = b'{"model":"lora","prompt":"x"}'
        assert (await router.call("/v1/completions", body)).status == 200
        assert worker.requests[0].body == body


async def test_upstream_model_of_the_pool(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker, pool=Pool(name="pool", models=("public",), upstream_model="/models/x"))
        assert (await router.call("/v1/completions", b'{"model":"public","prompt":"x"}')).status == 200
        assert worker.requests[0].body == b'{"model":"/models/x","prompt":"x"}'


async def test_passed_through_endpoints(router: TestRelay) -> None:
    async def echo(request: WorkerRequest) -> None:
        await request.reply(200, b'{"path":"%b"}' % request.line.split(" ")[1].encode())

    async with FakeWorker(echo) as worker:
        router.install(worker)
        for path in (
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/embeddings",
            "/rerank",
            "/v1/rerank",
            "/v2/rerank",
            "/v1/score",
            "/tokenize",
            "/detokenize",
        ):
            response = await router.call(path, b'{"model":"m","input":"x","messages":[]}')
            assert (response.status, response.body) == (200, b'{"path":"%b"}' % path.encode())


async def test_connections_are_kept_on_both_sides(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        client = await router.client()
        for _ in range(5):
            await client.post("/v1/completions", STREAM)
            assert (await client.response()).complete
            await client.post("/v1/completions", WHOLE)
            assert (await client.response()).status == 200
        assert worker.connections == 1
        assert len(router.http.connections) == 1


async def test_pipelined_requests_are_answered_in_order(router: TestRelay) -> None:
    async def numbered(request: WorkerRequest) -> None:
        await request.reply(200, request.body)

    async with FakeWorker(numbered) as worker:
        router.install(worker)
        client = await router.client()
        bodies = [b'{"model":"m","prompt":"%d"}' % i for i in range(6)]
        await client.send(
            b"".join(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                for body in bodies
            )
            + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        assert [(await client.response()).body for _ in bodies] == bodies
        assert (await client.response()).status == 200
        # One at a time: the engine never saw two requests of this connection at once.
        assert worker.connections == 1


async def test_body_in_many_pieces_chunked_and_expect_continue(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        client = await router.client()
        await client.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        assert (await client.head())[0] == 100
        for i in range(0, len(WHOLE), 7):
            await client.send(chunk(WHOLE[i : i + 7]))
        await client.send(b"0\r\nx-trailer: 1\r\n\r\n")
        assert (await client.response()).status == 200
        assert worker.requests[0].body == WHOLE
        assert "expect" not in worker.requests[0].fields
        assert "transfer-encoding" not in worker.requests[0].fields


async def test_http10_client_gets_a_stream_without_chunks(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        client = await router.client()
        await client.post("/v1/completions", STREAM, version="1.0")
        response = await client.response()
        assert "transfer-encoding" not in response.headers
        assert response.headers["connection"] == "close"
        assert response.body.endswith(b"data: [DONE]\n\n")
        assert response.body.count(b"data: ") == 4


async def test_events_cut_anywhere_by_the_network_arrive_whole(router: TestRelay) -> None:
    payloads = [b"data: " + token(f" t{i}", "stop" if i == 4 else None) + b"\n\n" for i in range(5)]
    payloads.append(b"data: [DONE]\n\n")
    wire = b"".join(chunk(payload) for payload in payloads) + b"0\r\n\r\n"

    for step in (1, 3, 50, 111, 1000):

        async def pieces(request: WorkerRequest, step: int = step) -> None:
            await request.start_stream()
            for i in range(0, len(wire), step):
                await request.send(wire[i : i + step])
                await asyncio.sleep(0)

        async with FakeWorker(pieces) as worker:
            router.install(worker)
            response = await router.call("/v1/completions", STREAM)
            assert response.complete
            assert response.body == b"".join(payloads)


async def test_events_split_over_chunks_and_large_events(router: TestRelay) -> None:
    big = b"data: " + token("x" * 300_000) + b"\n\n"
    end = b"data: " + token("e", "stop") + b"\n\ndata: [DONE]\n\n"

    async def split(request: WorkerRequest) -> None:
        await request.start_stream()
        payload = big + end
        for i in range(0, len(payload), 70_001):
            await request.send(chunk(payload[i : i + 70_001]))
        await request.send(b"0\r\n\r\n")

    async with FakeWorker(split) as worker:
        router.install(worker)
        response = await router.call("/v1/completions", STREAM)
        assert response.body == big + end
        assert response.complete
        await until(lambda: router.context.budget.held_bytes == 0)


async def test_large_unstreamed_response_passes_through(tmp_path: Path) -> None:
    body = b'{"embedding":"' + b"1" * 3_000_000 + b'"}'

    async def large(request: WorkerRequest) -> None:
        await request.reply(200, body)

    async def large_chunked(request: WorkerRequest) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        for i in range(0, len(body), 100_000):
            await request.send(chunk(body[i : i + 100_000]))
        await request.send(b"0\r\n\r\n")

    async with relay(tmp_path, hold_response_bytes=10_000) as router, FakeWorker(large, large_chunked) as worker:
        router.install(worker)
        for _ in range(2):
            response = await router.call("/v1/embeddings", WHOLE)
            assert response.complete
            assert response.body == body
        await until(lambda: router.context.budget.held_bytes == 0)


async def test_engine_errors_of_the_client_pass_unchanged(router: TestRelay) -> None:
    error = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'

    async def refuse(request: WorkerRequest) -> None:
        await request.reply(400, error)

    async with FakeWorker(refuse) as worker:
        router.install(worker, worker)
        response = await router.call("/v1/completions", STREAM)
        assert (response.status, response.body) == (400, error)
        assert "x-twofold-reason" not in response.headers
        assert len(worker.requests) == 1


async def test_data_parallel_rank_is_pinned(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        snapshot = router.live.snapshot
        ranked = tuple(
            msgspec.structs.replace(target, data_parallel_rank=3, incarnation=2) for target in snapshot.targets
        )
        router.install_snapshot(msgspec.structs.replace(snapshot, version=2, targets=ranked))
        await router.call("/v1/completions", WHOLE)
        assert worker.requests[0].fields["x-data-parallel-rank"] == "3"


async def test_slow_client_does_not_grow_memory(router: TestRelay) -> None:
    sent = 0

    async def flood(request: WorkerRequest) -> None:
        nonlocal sent
        await request.start_stream()
        for _ in range(4000):
            await request.event(token("y" * 10_000))
            sent += 1
        await complete_tail(request)

    async def complete_tail(request: WorkerRequest) -> None:
        await request.event(token("", "stop"))
        await request.event(b"[DONE]")
        await request.send(b"0\r\n\r\n")

    async with FakeWorker(flood) as worker:
        router.install(worker)
        client = await router.client()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.post("/v1/completions", STREAM)
        # The worker blocks long before its 40 MB are out: everything in between is kernel buffers.
        stable = -1
        while stable != sent:
            stable = sent
            await asyncio.sleep(0.2)
        assert sent < 3500
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        events, tail = 0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await client.reader.read(1 << 20)
            assert data
            events += data.count(b"}\n\n")
            tail = (tail + data)[-8:]
        assert events == pytest.approx(4001, abs=1)


async def test_accounts_hold_running_streams(router: TestRelay) -> None:
    gate = asyncio.Event()

    async def gated(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.event(token("a"))
        await gate.wait()
        await request.event(token("b", "stop"))
        await request.event(b"[DONE]")
        await request.send(b"0\r\n\r\n")

    async with FakeWorker(gated) as worker:
        router.install(worker)
        clients: list[Client] = [await router.client() for _ in range(8)]
        for client in clients:
            await client.post("/v1/completions", STREAM)
        await until(lambda: len(worker.requests) == 8)
        await until(lambda: router.loads() == [(8, 8)])
        gate.set()
        for client in clients:
            assert (await client.response()).complete
        await until(lambda: router.loads() == [(0, 0)])


async def test_complete_stream_helper_is_what_vllm_sends(router: TestRelay) -> None:
    async with FakeWorker(complete_stream) as worker:
        router.install(worker)
        response = await router.call("/v1/chat/completions", b'{"model":"m","messages":[],"stream":true}')
        assert response.body.endswith(b"data: [DONE]\n\n")
