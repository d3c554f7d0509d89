"""A small HTTP/1.1 server on asyncio Protocols and httptools.

An emulated engine writes one HTTP chunk per token; an ASGI stack costs several times the work of the write itself, and
it can neither fall silent nor break off the way the recordings of a killed engine do.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_PIPELINED = 16
JSON_TYPE = b"application/json"
TEXT_TYPE = b"text/plain; charset=utf-8"
SSE_TYPE = b"text/event-stream; charset=utf-8"
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_LAST_CHUNK = b"0\r\n\r\n"
_METHODS = (b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT", b"QUERY")
_PREFLIGHT = (
    b"vary: Origin, Access-Control-Request-Method, Access-Control-Request-Headers, "
    b"Access-Control-Request-Private-Network\r\n"
    b"access-control-allow-methods: %s\r\naccess-control-max-age: 600\r\n" % b", ".join(_METHODS)
)

_date_cache: tuple[int, bytes] = (0, b"")


def _date() -> bytes:
    global _date_cache
    second = int(time.time())
    if _date_cache[0] != second:
        _date_cache = (second, formatdate(second, usegmt=True).encode())
    return _date_cache[1]


class Exchange:
    """One request and its response."""

    __slots__ = (
        "body",
        "chunked",
        "connection",
        "finished",
        "headers",
        "keep_alive",
        "method",
        "on_disconnect",
        "on_end",
        "path",
        "query",
        "received_s",
        "response_bytes",
        "started",
        "status",
    )

    def __init__(self, connection: "HttpConnection", method: str, target: bytes, headers: dict[bytes, bytes]) -> None:
        path, _, query = target.partition(b"?")
        self.connection = connection
        self.method = method
        self.path = path.decode("latin-1")
        self.query = query.decode("latin-1")
        self.headers = headers
        self.body = b""
        self.received_s = 0.0
        """When the last byte of the request came, on the monotonic clock; 0 if unknown."""
        self.keep_alive = True
        self.chunked = True
        self.started = False
        self.finished = False
        self.status = 0
        self.response_bytes = 0
        """The content length of the response; 0 for a stream."""
        self.on_disconnect: Callable[[], None] | None = None
        self.on_end: Callable[[Exchange], None] | None = None
        """Called once, when the response has been written or its client has gone."""

    @property
    def paused(self) -> bool:
        """Whether the client reads slower than we write."""
        return self.connection.paused

    def header(self, name: bytes) -> str | None:
        """A header's value by its lower-case name."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def respond(
        self,
        status: int,
        body: bytes = b"",
        content_type: bytes | None = JSON_TYPE,
        *,
        allow: bytes | None = None,
        vary: bool = True,
    ) -> None:
        """Send a whole response."""
        if self.finished:
            return
        head = self._head(status, allow)
        head += b"content-length: %d\r\n" % len(body)
        if content_type is not None:
            head += b"content-type: %s\r\n" % content_type
        if vary:
            head += b"vary: Origin\r\n"
        self.response_bytes = len(body)
        self._finish(head + self._connection_line() + b"\r\n" + body)

    def start_stream(self) -> None:
        """Send the head of an event stream."""
        if self.finished:
            return
        self.started = True
        head = self._head(200, None) + b"content-type: %s\r\nvary: Origin\r\n" % SSE_TYPE + self._connection_line()
        if self.chunked:
            head += b"transfer-encoding: chunked\r\n"
        self.connection.write(head + b"\r\n")

    def frame(self, data: bytes) -> bytes:
        """``data`` as one HTTP chunk."""
        return b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data

    def write(self, frame: bytes) -> None:
        """Send a frame (see ``frame``) of a started stream."""
        if not self.finished:
            self.connection.write(frame)

    def end_stream(self, last_frames: bytes = b"") -> None:
        """Send the last frames and end the response."""
        if not self.finished:
            self._finish(last_frames + _LAST_CHUNK if self.chunked else last_frames)

    def disconnected(self) -> None:
        """The connection is gone; called by it."""
        if self.finished:
            return
        self.finished = True
        if self.on_disconnect is not None:
            self.on_disconnect()
        self._ended()

    def _head(self, status: int, allow: bytes | None) -> bytes:
        self.status = status
        reason = _REASONS.get(status, b"")
        head = b"HTTP/1.1 %d %s\r\ndate: %s\r\nserver: uvicorn\r\n" % (status, reason, _date())
        return head + (b"allow: %s\r\n" % allow if allow else b"")

    def preflight(self) -> bool:
        """Refuse a browser that asks whether it may send a request from elsewhere. False if that is not the question.

        vLLM 0.32 allows no other origin unless told to.
        """
        headers = self.headers
        if self.method != "OPTIONS" or b"origin" not in headers or b"access-control-request-method" not in headers:
            return False
        head = self._head(400, None) + _PREFLIGHT
        wanted = headers.get(b"access-control-request-headers")
        if wanted is not None:
            head += b"access-control-allow-headers: %s\r\n" % wanted
        known = headers[b"access-control-request-method"] in _METHODS
        body = b"Disallowed CORS origin" if known else b"Disallowed CORS origin, method"
        head += b"content-length: %d\r\ncontent-type: %s\r\n" % (len(body), TEXT_TYPE)
        self._finish(head + self._connection_line() + b"\r\n" + body)
        return True

    def _connection_line(self) -> bytes:
        return b"" if self.keep_alive else b"connection: close\r\n"

    def _finish(self, data: bytes) -> None:
        self.finished = True
        self.on_disconnect = None
        self.connection.write(data)
        self._ended()
        self.connection.exchange_done(self)

    def _ended(self) -> None:
        if self.on_end is not None:
            self.on_end(self)
            self.on_end = None


class Listener(Protocol):
    """What a connection needs of the server that accepted it."""

    connections: "set[HttpConnection]"
    black_hole: bool
    closing: bool

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, now or later."""

    def connection_closed(self) -> None:
        """A connection has gone."""


class HttpConnection(asyncio.Protocol):
    """One client connection: requests one at a time, keep-alive, a bounded number of pipelined ones."""

    def __init__(self, listener: Listener) -> None:
        self.paused = False
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._current: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._parsed: Exchange | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self._current is None

    def close(self) -> None:
        """Close after what was written has been sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Break the connection off."""
        if self._transport is not None:
            self._transport.abort()

    def write(self, data: bytes) -> None:
        """Send bytes."""
        if self._transport is not None:
            self._transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._parser = httptools.HttpRequestParser(self)
        self._listener.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or we closed."""
        self._transport = None
        self._parser = None
        self._listener.connections.discard(self)
        current, self._current = self._current, None
        self._queue.clear()
        if current is not None:
            current.disconnected()
        self._listener.connection_closed()

    def pause_writing(self) -> None:
        """The send buffer is full."""
        self.paused = True

    def resume_writing(self) -> None:
        """The send buffer has room again."""
        self.paused = False

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        if self._listener.black_hole or self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._reject(400, b"Invalid HTTP request received.")
        except httptools.HttpParserError:
            self._reject(400, b"Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._target, self._headers, self._body = b"", {}, []
        self._head_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self._target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._headers[name.lower()] = value
        self._count_head(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        exchange = Exchange(self, self._parser.get_method().decode(), self._target, self._headers)
        http_1_1 = self._parser.get_http_version() == "1.1"
        exchange.keep_alive = http_1_1 and bool(self._parser.should_keep_alive())
        exchange.chunked = http_1_1
        self._parsed = exchange
        if self._headers.get(b"expect", b"").lower() == b"100-continue" and self._current is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._reject(413, b"Request body too large.")
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        exchange, self._parsed = self._parsed, None
        if exchange is None or self._transport is None or self._transport.is_closing():
            return
        exchange.body = b"".join(self._body)
        exchange.received_s = time.monotonic()
        self._body = []
        if self._current is None:
            self._current = exchange
            self._listener.handle(exchange)
        elif len(self._queue) < MAX_PIPELINED:
            self._queue.append(exchange)
        else:
            self.abort()

    def exchange_done(self, exchange: Exchange) -> None:
        """The response has been written: serve the next pipelined request, or close."""
        self._current = None
        if not exchange.keep_alive or self._listener.closing:
            self.close()
        elif self._queue:
            self._current = self._queue.popleft()
            self._listener.handle(self._current)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._reject(431, b"Request header fields too large.")

    def _reject(self, status: int, text: bytes) -> None:
        self._parser = None
        if self._transport is None or self._transport.is_closing():
            return
        if self._current is None:
            exchange = Exchange(self, "", b"", {})
            exchange.keep_alive = False
            exchange.respond(status, text, TEXT_TYPE, vary=False)
        else:
            self.abort()
