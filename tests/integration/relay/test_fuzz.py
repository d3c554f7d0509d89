"""Arbitrary bytes from clients and from workers: nothing crashes, nothing hangs, nothing leaks, no traceback shows."""

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.relays import FakeWorker, WorkerRequest, chunk, relay, token, until

STREAM = b'{"model":"m","prompt":"hello","stream":true}'
_LIMITS: dict[str, object] = {
    "head_timeout_s": 0.3,
    "body_timeout_s": 0.3,
    "keep_alive_s": 0.3,
    "linger_s": 0.05,
    "stall_timeout_s": 0.3,
    "first_byte_timeout_s": 0.3,
    "response_timeout_s": 0.3,
    "max_attempts": 2,
}

_REQUEST_PARTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"POST /v1/completions HTTP/1.1\r\n",
            b"GET /health HTTP/1.1\r\n",
            b"host: x\r\n",
            b"content-length: 44\r\n",
            b"content-length: 0\r\n",
            b"transfer-encoding: chunked\r\n",
            b"expect: 100-continue\r\n",
            b"connection: close\r\n",
            b"\r\n",
            b"\r\n\r\n",
            b"2c\r\n",
            b"0\r\n\r\n",
            STREAM,
            b"{",
        ]
    ),
)
_EVENT = b"data: " + token("x") + b"\n\n"
_RESPONSE_PARTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 503 X\r\ncontent-length: 3\r\n\r\n",
            b"content-length: 10\r\n",
            chunk(_EVENT),
            _EVENT,
            chunk(b"data: " + token("", "stop") + b"\n\n"),
            chunk(b"data: [DONE]\n\n"),
            chunk(b'data: {"error":{"message":"x"}}\n\n'),
            b"0\r\n\r\n",
            b"ffffffff\r\n",
            b"\r\n",
            b"\n\n",
        ]
    ),
)
_FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _run(work: Coroutine[Any, Any, None]) -> None:
    failures: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        await work

    uvloop.run(watched())
    assert not failures


@_FUZZ
@given(parts=st.lists(_REQUEST_PARTS, max_size=14), cut=st.integers(1, 60))
def test_clients_bytes(parts: list[bytes], cut: int, caplog: pytest.LogCaptureFixture) -> None:
    data = b"".join(parts)
    caplog.clear()

    async def work() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with relay(Path(directory), **_LIMITS) as router, FakeWorker() as worker:
                router.install(worker)
                client = await router.client()
                answer = b""
                try:
                    for at in range(0, len(data), cut):
                        await client.send(data[at : at + cut])
                    client.writer.write_eof()
                    answer = await asyncio.wait_for(client.reader.read(), 10.0)
                except ConnectionError:
                    pass
                assert b"Traceback" not in answer
                assert b"internal" not in answer
                await until(lambda: not router.http.connections)
                assert not router.context.exchanges
                assert router.context.budget.held_bytes == 0
                assert router.loads() == [(0, 0)]

    _run(work())
    assert not [record for record in caplog.records if record.exc_info]


@_FUZZ
@given(parts=st.lists(_RESPONSE_PARTS, max_size=14), cut=st.integers(1, 200), stream=st.booleans(), close=st.booleans())
def test_workers_bytes(
    parts: list[bytes], cut: int, stream: bool, close: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = b"".join(parts)
    caplog.clear()

    async def script(request: WorkerRequest) -> None:
        for at in range(0, len(data), cut):
            await request.send(data[at : at + cut])
        if close:
            request.writer.close()
        await request.reader.read()

    async def work() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with relay(Path(directory), **_LIMITS) as router, FakeWorker(script) as worker:
                router.install(worker)
                client = await router.client()
                await client.post("/v1/completions", STREAM if stream else STREAM.replace(b"true", b"false"))
                response = await asyncio.wait_for(client.response(), 10.0)
                assert b"Traceback" not in response.body
                if response.complete and response.status == 200 and b"data: [DONE]\n" in response.body:
                    assert b'"finish_reason":"' in response.body
                client.close()
                await until(lambda: not router.http.connections)
                assert not router.context.exchanges
                assert router.context.budget.held_bytes == 0
                assert router.loads() == [(0, 0)]

    _run(work())
    assert not [record for record in caplog.records if record.exc_info]
