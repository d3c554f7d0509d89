"""Every way in which workers and clients fail: what the client sees, what is retried, what is counted."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from support.relays import FakeWorker, Response, Script, TestRelay, WorkerRequest, answer, chunk, relay, token, until

from twofold.model.fleet import FleetSnapshot, Health, RoutingPolicy

STREAM = b'{"model":"m","prompt":"hello","stream":true}'
WHOLE = b'{"model":"m","prompt":"hello"}'
OVERLOADED = b'{"error":{"message":"max_num_queued_reqs reached: queue is full","type":"X","param":null,"code":503}}'
SCALING = b'{"error": "The model is currently scaling. Please try again later."}'
LATE = b'{"error":{"message":"cannot schedule new futures after shutdown","type":"InternalServerError","code":500}}'


async def close_at_once(request: WorkerRequest) -> None:
    request.reset()


async def close_inside_head(request: WorkerRequest) -> None:
    await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: te")
    request.writer.close()


async def head_then_close(request: WorkerRequest) -> None:
    await request.start_stream()
    request.writer.close()


async def half_a_body(request: WorkerRequest) -> None:
    await request.send(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"choices":')
    request.writer.close()


async def not_http(request: WorkerRequest) -> None:
    await request.send(b"220 smtp ready\r\n\r\n")


async def only_done(request: WorkerRequest) -> None:
    """A completion stream of a vLLM in its shutdown window."""
    await request.start_stream()
    await request.event(b"[DONE]")
    await request.send(b"0\r\n\r\n")


async def error_event_first(request: WorkerRequest) -> None:
    await request.start_stream()
    await request.event(
        b'{"error":{"message":"EngineCore encountered an issue","type":"InternalServerError","code":500}}'
    )
    await request.event(b"[DONE]")
    await request.send(b"0\r\n\r\n")


async def empty_stream(request: WorkerRequest) -> None:
    await request.start_stream()
    await request.send(b"0\r\n\r\n")


async def abort_first(request: WorkerRequest) -> None:
    await request.start_stream()
    await request.event(token("", "abort"))
    await request.event(b"[DONE]")
    await request.send(b"0\r\n\r\n")


def status(code: int, body: bytes) -> Script:
    async def reply(request: WorkerRequest) -> None:
        await request.reply(code, body)

    return reply


BEFORE_FIRST_BYTE: dict[str, tuple[Script, str]] = {
    "reset": (close_at_once, "no-response"),
    "eof-in-head": (close_inside_head, "bad-response"),
    "eof-after-head": (head_then_close, "truncated"),
    "half-a-body": (half_a_body, "truncated"),
    "not-http": (not_http, "bad-response"),
    "only-done": (only_done, "done-without-finish"),
    "error-event": (error_event_first, "engine-error"),
    "empty-stream": (empty_stream, "truncated"),
    "abort": (abort_first, "aborted"),
    "502": (status(502, b"bad"), "unavailable"),
    "503-scaling": (status(503, SCALING), "unavailable"),
    "503-admission": (status(503, OVERLOADED), "refused"),
    "429": (status(429, b"{}"), "refused"),
    "500-shutdown": (status(500, LATE), "unavailable"),
}


@pytest.mark.parametrize("name", BEFORE_FIRST_BYTE)
async def test_failure_before_the_first_byte_is_retried_unseen(router: TestRelay, name: str) -> None:
    script, kind = BEFORE_FIRST_BYTE[name]
    async with FakeWorker(script) as bad, FakeWorker() as good:
        router.install(bad, good)
        for body in (STREAM, STREAM, WHOLE, WHOLE):
            response = await router.call("/v1/completions", body)
            assert response.status == 200
            assert response.complete
            assert b"error" not in response.body
        assert 1 <= len(bad.requests) <= 4
        assert router.count("retries", kind) == len(bad.requests)
        assert all(request.body in (STREAM, WHOLE) for request in bad.requests)
        await until(lambda: router.loads() == [(0, 0), (0, 0)])


async def test_refused_connection_is_retried_and_opens_the_circuit(router: TestRelay) -> None:
    async with FakeWorker() as bad, FakeWorker() as good:
        router.install(bad, good)
        await bad.refuse()
        for _ in range(12):
            assert (await router.call("/v1/completions", STREAM)).status == 200
        tried = router.count("failures", "connect-failed")
        # Round robin would have sent it six; the circuit opened after a few.
        assert 1 <= tried <= 5
        assert router.count("retries", "connect-failed") == tried


async def test_kept_connection_that_died_is_no_failure(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        router.install(worker)
        assert (await router.call("/v1/completions", WHOLE)).status == 200

        async def die_on_reuse(request: WorkerRequest) -> None:
            request.reset()

        worker.scripts = [die_on_reuse, answer]
        assert (await router.call("/v1/completions", WHOLE)).status == 200
        assert worker.connections == 2
        assert router.count("failures", "no-response") == 0
        assert router.count("retries", "no-response") == 0


async def test_all_workers_dead_is_502_with_a_reason(router: TestRelay) -> None:
    async with FakeWorker(close_at_once) as one, FakeWorker(close_at_once) as two:
        router.install(one, two)
        response = await router.call("/v1/completions", STREAM)
        assert response.status == 502
        assert response.headers["x-twofold-reason"] == "upstream-failed"
        assert response.error["code"] == 502
        assert len(one.requests) + len(two.requests) == 2
        assert router.count("rejects", "upstream-failed", "502") == 1
        await until(lambda: router.loads() == [(0, 0), (0, 0)])


async def test_second_refusal_is_the_engines_own_answer(router: TestRelay) -> None:
    async with FakeWorker(status(429, b'{"error":{"message":"busy"}}')) as worker:
        router.install(worker, worker, worker)
        response = await router.call("/v1/completions", WHOLE)
        assert (response.status, response.body) == (429, b'{"error":{"message":"busy"}}')
        assert len(worker.requests) == 2


async def test_retry_budget_bounds_retries(tmp_path: Path) -> None:
    async with (
        relay(tmp_path, retry_burst=2.0) as router,
        FakeWorker(status(502, b"x")) as worker,
    ):
        router.install(worker, worker, worker, policy=RoutingPolicy(name="round_robin", retry_budget_ratio=0.0))
        for _ in range(10):
            assert (await router.call("/v1/completions", WHOLE)).status in (502, 503)
        assert router.count("retries", "unavailable") == 2


MIDWAY: dict[str, tuple[bytes, str]] = {
    "reset": (b"", "upstream-failed"),
    "framing-end": (b"0\r\n\r\n", "upstream-failed"),
    "done-without-finish": (chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n", "upstream-failed"),
    "engine-error": (
        chunk(b'data: {"error":{"message":"EngineCore encountered an issue","code":500}}\n\n')
        + chunk(b"data: [DONE]\n\n")
        + b"0\r\n\r\n",
        "upstream-failed",
    ),
    "abort": (
        chunk(b"data: " + token("", "abort") + b"\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
        "upstream-failed",
    ),
    "inside-a-chunk": (b"ff\r\ndata: {", "upstream-failed"),
    "garbage-framing": (b"zz\r\nxx", "upstream-failed"),
    "hang": (b"HANG", "upstream-stalled"),
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", MIDWAY)
async def test_failure_midway_is_an_error_event_and_never_looks_finished(
    tmp_path: Path, name: str, together: bool
) -> None:
    tail, reason = MIDWAY[name]

    async def script(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.event(token("one"))
        # The relay has passed the first event on: from here no other worker can take over unseen.
        await until(lambda: len(router.context.exchanges) == 1 and router.loads()[0][1] + router.loads()[1][1] == 1)
        second = chunk(b"data: " + token("two") + b"\n\n")
        if tail == b"HANG":
            await request.send(second)
            await asyncio.sleep(60)
        elif together:
            await request.send(second + tail)
        else:
            await request.send(second)
            await asyncio.sleep(0.02)
            await request.send(tail)
        request.writer.close()

    async with relay(tmp_path, stall_timeout_s=0.3) as router, FakeWorker(script) as worker, FakeWorker() as other:
        router.install(worker, other)
        responses: list[Response] = [await router.call("/v1/completions", STREAM) for _ in range(2)]
        broken = [response for response in responses if b'"one"' in response.body]
        assert len(broken) == 1
        body = broken[0].body
        assert not broken[0].complete
        assert b"[DONE]" not in body
        *events, error, nothing = body.split(b"\n\n")
        good = [b"data: " + token("one"), b"data: " + token("two")]
        # Of a read that ends in garbage nothing is believed.
        assert events == (good[:1] if together and name == "garbage-framing" else good)
        assert msgspec.json.decode(error.removeprefix(b"data: "))["error"]["reason"] == reason
        assert nothing == b""
        assert len(other.requests) == 1
        await until(lambda: router.loads() == [(0, 0), (0, 0)])
        assert not router.context.exchanges


async def test_error_event_that_blames_the_request_is_final(router: TestRelay) -> None:
    refusal = b'{"error":{"message":"bad grammar","type":"BadRequestError","param":null,"code":400}}'

    async def refuse(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.event(refusal)
        await request.event(b"[DONE]")
        await request.send(b"0\r\n\r\n")

    async with FakeWorker(refuse) as worker:
        router.install(worker, worker)
        for _ in range(8):
            response = await router.call("/v1/completions", STREAM)
            assert response.body == b"data: " + refusal + b"\n\ndata: [DONE]\n\n"
            assert response.complete
        assert len(worker.requests) == 8
        assert router.count("failures", "engine-error") == 0


async def test_messages_streams_fail_in_anthropics_shape(router: TestRelay) -> None:
    async def script(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.send(chunk(b'event: message_start\ndata: {"type":"message_start"}\n\n'))
        request.writer.close()

    async with FakeWorker(script) as worker:
        router.install(worker)
        response = await router.call("/v1/messages", b'{"model":"m","messages":[],"stream":true}')
        last = response.body.split(b"\n\n")[-2]
        assert last.startswith(b'event: error\ndata: {"type":"error","error":{"type":"api_error"')


async def test_messages_and_responses_streams_complete(router: TestRelay) -> None:
    async def messages(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.send(chunk(b'event: message_start\ndata: {"type":"message_start"}\n\n'))
        await request.send(chunk(b'event: message_delta\ndata: {"delta":{"stop_reason":"end_turn"}}\n\n'))
        await request.send(chunk(b'event: message_stop\ndata: {"type":"message_stop"}\n\n') + b"0\r\n\r\n")

    async def responses(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.send(chunk(b'event: response.created\ndata: {"text":"event: response.completed"}\n\n'))
        await request.send(chunk(b"event: response.completed\ndata: {}\n\n"))
        await request.send(b"0\r\n\r\n")

    for path, script in (("/v1/messages", messages), ("/v1/responses", responses)):
        async with FakeWorker(script) as worker:
            router.install(worker)
            response = await router.call(path, b'{"model":"m","messages":[],"stream":true}')
            assert response.complete
            assert b"error" not in response.body


async def test_first_byte_timeout_is_504(tmp_path: Path) -> None:
    async def hang(request: WorkerRequest) -> None:
        await request.reader.read()

    async def head_and_hang(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.reader.read()

    async with relay(tmp_path, first_byte_timeout_s=0.2, response_timeout_s=0.2) as router:
        for script in (hang, head_and_hang):
            async with FakeWorker(script) as worker:
                router.install(worker)
                response = await router.call("/v1/completions", STREAM)
                assert (response.status, response.headers["x-twofold-reason"]) == (504, "upstream-timeout")
                assert response.error["type"] == "GatewayTimeoutError"
                # The engine's request is aborted, not left running.
                await until(lambda: worker.gone == 1)
        async with FakeWorker(hang) as worker:
            router.install(worker)
            assert (await router.call("/v1/completions", WHOLE)).status == 504


async def test_connect_timeout(tmp_path: Path) -> None:
    async with relay(tmp_path, connect_timeout_s=0.2) as router, FakeWorker() as good:
        # A listener whose backlog is full answers no SYN; an address of the documentation range may answer at once.
        import socket

        full = socket.socket()
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        await asyncio.sleep(0.05)
        router.install(f"http://127.0.0.1:{full.getsockname()[1]}", good)
        for _ in range(2):
            assert (await router.call("/v1/completions", WHOLE)).status == 200
        assert router.count("retries", "connect-failed") == 1
        for sock in (*fillers, full):
            sock.close()


async def test_a_connection_with_an_answer_half_read_carries_no_other_request(router: TestRelay) -> None:
    """The rest of the answer would be taken for the next one's."""

    async def head_first(request: WorkerRequest) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n")
        await request.reader.read()

    async with FakeWorker(head_first, answer) as worker:
        router.install(worker)
        client = await router.client()
        await client.post("/v1/completions", WHOLE)
        await until(lambda: any(exchange.answered for exchange in router.context.exchanges))
        client.close()
        await until(lambda: not router.context.exchanges)
        assert router.context.upstream.sizes() == (0, 0)
        await until(lambda: worker.gone == 1)
        assert (await router.call("/v1/completions", WHOLE)).status == 200
        assert worker.connections == 2


async def test_client_disconnect_aborts_the_engine_at_once(router: TestRelay) -> None:
    async def endless(request: WorkerRequest) -> None:
        await request.start_stream()
        while True:
            await request.event(token("x"))
            await asyncio.sleep(0.01)

    async def silent(request: WorkerRequest) -> None:
        await asyncio.sleep(60)

    for script, body in ((endless, STREAM), (silent, WHOLE), (silent, STREAM)):
        async with FakeWorker(script) as worker:
            router.install(worker)
            client = await router.client()
            await client.post("/v1/completions", body)
            await until(lambda: len(worker.requests) == 1)
            if script is endless:
                await client.head()
            gone = asyncio.ensure_future(worker.requests[0].reader.read())
            client.close()
            await asyncio.wait([gone], timeout=1.0)
            assert gone.done()
            gone.exception() if not gone.cancelled() else None
            await until(lambda: router.loads() == [(0, 0)])
    assert router.slab.cells[router.context.metrics.disconnects] == 3
    assert router.count("requests", "pool", "499") == 3
    assert router.slab.cells[router.context.metrics.inflight.cell("pool")] == 0


async def test_client_that_stops_reading_is_cut(tmp_path: Path) -> None:
    async def flood(request: WorkerRequest) -> None:
        await request.start_stream()
        while True:
            await request.event(token("y" * 20_000))

    async with relay(tmp_path, client_stall_s=0.3) as router, FakeWorker(flood) as worker:
        router.install(worker)
        client = await router.client()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.post("/v1/completions", STREAM)
        await until(lambda: len(router.context.exchanges) == 1)
        await until(lambda: not router.context.exchanges and not router.http.connections, 20.0)
        assert router.loads() == [(0, 0)]


async def test_worker_that_leaves_the_fleet_finishes_its_stream(router: TestRelay) -> None:
    gate = asyncio.Event()

    async def gated(request: WorkerRequest) -> None:
        await request.start_stream()
        await request.event(token("a"))
        await gate.wait()
        await request.event(token("b", "stop"))
        await request.event(b"[DONE]")
        await request.send(b"0\r\n\r\n")

    async with FakeWorker(gated) as worker, FakeWorker() as other:
        router.install(worker)
        client = await router.client()
        await client.post("/v1/completions", STREAM)
        await until(lambda: len(worker.requests) == 1)
        router.install(other)
        gate.set()
        assert (await client.response()).complete
        await until(lambda: worker.gone == 1)


async def test_no_worker_is_503_with_retry_after_and_unknown_model_404(router: TestRelay) -> None:
    async with FakeWorker() as worker:
        response = await router.call("/v1/completions", WHOLE)
        assert (response.status, response.headers["x-twofold-reason"]) == (503, "rejected-no-endpoints")
        assert "retry-after" in response.headers
        router.install(worker)
        snapshot: FleetSnapshot = router.live.snapshot
        sick = tuple(msgspec.structs.replace(target, health=Health.SUSPECT) for target in snapshot.targets)
        router.install_snapshot(msgspec.structs.replace(snapshot, version=2, targets=sick))
        response = await router.call("/v1/completions", WHOLE)
        assert (response.status, response.headers["x-twofold-reason"]) == (503, "rejected-no-endpoints")
        assert int(response.headers["retry-after"]) >= 1
        response = await router.call("/v1/chat/completions", b'{"model":"nope","messages":[]}')
        assert (response.status, response.headers["x-twofold-reason"]) == (404, "model-not-found")
        assert response.error["type"] == "NotFoundError"
        response = await router.call("/v1/messages", b'{"model":"nope","messages":[]}')
        assert msgspec.json.decode(response.body)["type"] == "error"
        assert response.error["type"] == "not_found_error"
        assert not worker.requests


async def test_too_many_requests_in_progress_is_429(tmp_path: Path) -> None:
    async def silent(request: WorkerRequest) -> None:
        await asyncio.sleep(60)

    async with relay(tmp_path, max_requests=2) as router, FakeWorker(silent) as worker:
        router.install(worker)
        for _ in range(2):
            await (await router.client()).post("/v1/completions", WHOLE)
        await until(lambda: len(worker.requests) == 2)
        response = await router.call("/v1/completions", WHOLE)
        assert (response.status, response.headers["x-twofold-reason"]) == (429, "rejected-saturated")
        assert response.headers["retry-after"] == "1"
