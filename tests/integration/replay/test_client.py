"""The HTTP client against servers that behave badly, byte by byte."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from twofold.replay.client import Client, ExchangeError, Receiver, parse_url

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Body(Receiver):
    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.complete = False

    def on_body(self, data: bytes, now_s: float) -> None:
        self.data += data

    def on_complete(self, now_s: float) -> None:
        self.complete = True


@contextlib.asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Client]:
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await script(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    client = Client(parse_url(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), time.monotonic)
    try:
        yield client
    finally:
        await client.close()
        server.close()
        await asyncio.wait_for(asyncio.gather(*handlers), 5)


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def send(client: Client, timeout_s: float = 5.0) -> Body:
    body = Body()
    await client.send(body, "/x", b"{}", timeout_s=timeout_s)
    return body


async def test_connections_are_used_again() -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with serving(script) as client:
        for _ in range(5):
            assert (await send(client)).data == b"ok"
    assert connections == 1


async def test_a_kept_connection_that_was_closed_is_replaced_unseen() -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        if connections == 1:
            await reader.readuntil(b"\r\n\r\n")

    async with serving(script) as client:
        assert (await send(client)).data == b"ok"
        assert (await send(client)).data == b"ok"
    assert connections == 2


async def test_an_answer_cut_off_is_an_error_and_not_sent_again() -> None:
    seen = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await request(reader)
        seen += 1
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n")

    async with serving(script) as client:
        body = Body()
        with pytest.raises(ExchangeError) as caught:
            await client.send(body, "/x", b"{}", timeout_s=5)
    assert (caught.value.kind, body.data, body.complete, seen) == ("reset", b"abcd", False, 1)


async def test_an_answer_without_length_ends_with_its_connection() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")

    async with serving(script) as client:
        body = await send(client)
    assert (body.data, body.complete) == (b"all of it", True)


@pytest.mark.parametrize("answer", [b"\x00\x01\x02garbage\r\n\r\n", b"HTTP/9.9 abc\r\n\r\n"])
async def test_garbage_is_a_protocol_error(answer: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)
        await writer.drain()
        await reader.read()

    async with serving(script) as client:
        with pytest.raises(ExchangeError) as caught:
            await send(client)
    assert caught.value.kind == "protocol"


async def test_silence_is_a_timeout_and_closes_the_connection() -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        closed.set()

    async with serving(script) as client:
        with pytest.raises(ExchangeError) as caught:
            await send(client, timeout_s=0.2)
        await asyncio.wait_for(closed.wait(), 5)
    assert caught.value.kind == "timeout"


async def test_an_informational_answer_is_passed_over() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with serving(script) as client:
        body = await send(client)
    assert (body.status, body.data) == (200, b"ok")


async def test_connection_close_is_honoured() -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()

    async with serving(script) as client:
        for _ in range(3):
            assert (await send(client)).data == b"ok"
    assert connections == 3
