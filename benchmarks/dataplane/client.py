"""The load generator: raw connections that send the next request when an answer is complete, and check every byte."""

import asyncio
import time
import zlib
from collections.abc import Iterator

from dataplane.loads import ANSWER_TOKENS, Load
from dataplane.wire import stream_payload, whole_payload


class Burst:
    """What the connections of one burst share, and what came of it."""

    def __init__(self, load: Load, requests: Iterator[bytes]) -> None:
        payload = stream_payload(load.events) if load.events else whole_payload(ANSWER_TOKENS)
        self.expected = (len(payload), zlib.crc32(payload))
        self.requests = requests
        self.streamed = bool(load.events)
        self.right = 0
        self.payload_bytes = 0
        self.errors: list[str] = []
        self.first_event_s: list[float] = []
        self.busy = 0
        self.over = asyncio.get_running_loop().create_future()

    def ended(self) -> None:
        """A connection has no more requests."""
        self.busy -= 1
        if not self.busy and not self.over.done():
            self.over.set_result(None)


class Connection(asyncio.Protocol):
    """One keep-alive connection of a burst."""

    def __init__(self, burst: Burst) -> None:
        self._burst = burst
        self._transport: asyncio.Transport
        self._head = b""
        self._rest = b""
        self._in_body = False
        self._chunked = False
        self._left = 0
        self._size = 0
        self._crc = 0
        self._sent_s = 0.0
        self._active = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        if self._active:
            self._fail(f"connection ended: {error}")

    def next(self) -> None:
        """Send a request, or end."""
        request = next(self._burst.requests, None)
        if request is None:
            self._active = False
            self._burst.ended()
            return
        self._head = self._rest = b""
        self._in_body = False
        self._size = self._crc = 0
        self._sent_s = time.monotonic()
        self._active = True
        self._transport.write(request)

    def close(self) -> None:
        """Drop the connection."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._active:
            return
        if not self._in_body:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            head = data[:end].lower()
            data = data[end + 4 :]
            if head[8:13] != b" 200 ":
                self._fail((head[:40] + b" " + data[:200]).decode("utf-8", "replace"))
                return
            self._in_body = True
            self._chunked = b"\r\ntransfer-encoding: chunked" in head
            if not self._chunked:
                self._left = int(head.partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0])
        if self._chunked:
            self._chunks(self._rest + data if self._rest else data)
        elif data:
            self._take(data)
            self._left -= len(data)
            if self._left <= 0:
                self._complete()

    def _chunks(self, data: bytes) -> None:
        position = 0
        while True:
            line = data.find(b"\r\n", position)
            if line < 0:
                break
            size = int(data[position:line], 16)
            end = line + 2 + size
            if end + 2 > len(data):
                break
            if not size:
                self._complete()
                return
            self._take(data[line + 2 : end])
            position = end + 2
        self._rest = data[position:]

    def _take(self, payload: bytes) -> None:
        if not self._size and self._burst.streamed:
            self._burst.first_event_s.append(time.monotonic() - self._sent_s)
        self._size += len(payload)
        self._crc = zlib.crc32(payload, self._crc)

    def _complete(self) -> None:
        burst = self._burst
        burst.payload_bytes += self._size
        if (self._size, self._crc) == burst.expected:
            burst.right += 1
        else:
            burst.errors.append(f"answer differs: {self._size} bytes of {burst.expected[0]}")
        self.next()

    def _fail(self, message: str) -> None:
        self._active = False
        self._burst.errors.append(message)
        self._burst.ended()


async def connect(burst: Burst, ports: list[int], count: int) -> list[Connection]:
    """``count`` open connections, spread over ``ports``."""
    loop = asyncio.get_running_loop()
    made = []
    for number in range(count):
        port = ports[number % len(ports)]
        _, connection = await loop.create_connection(lambda: Connection(burst), "127.0.0.1", port)
        made.append(connection)
    return made


async def run(burst: Burst, connections: list[Connection], ramp_s: float, timeout_s: float) -> None:
    """Set all connections going, evenly over ``ramp_s``, and wait for the last answer."""
    burst.busy = len(connections)
    loop = asyncio.get_running_loop()
    for number, connection in enumerate(connections):
        if ramp_s:
            loop.call_later(ramp_s * number / len(connections), connection.next)
        else:
            connection.next()
    try:
        async with asyncio.timeout(timeout_s):
            await burst.over
    except TimeoutError:
        burst.errors.append(f"{burst.busy} connections without an answer after {timeout_s:.0f} s")
