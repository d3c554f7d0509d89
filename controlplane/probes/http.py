"""A small HTTP/1.1 client for probes: one kept connection per worker, bounded answers, little CPU.

A general client library spends five times the CPU of the rest of a probe, and a fleet of a thousand workers is probed
hundreds of times a second. What it leaves out is what probes do not need: redirects, cookies, compression, proxies,
pipelining.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

MAX_HEAD_BYTES = 64 << 10
IDLE_S = 30.0
ADDRESS_TTL_S = 30.0
MAX_ADDRESSES = 10_000


class HttpError(Exception):
    """An exchange that failed below HTTP, or an answer that is no HTTP; the message says how."""


class TooLarge(HttpError):
    """An answer above its bound."""


class Reply(NamedTuple):
    """An answer."""

    status: int
    body: bytes


class _Closed(HttpError):
    """The connection ended before the first byte of an answer."""


class _Origin(NamedTuple):
    """Where requests for a base URL go: scheme https or not, host, port, path prefix, Host header."""

    tls: bool
    host: str
    port: int
    prefix: str
    authority: str


@lru_cache(maxsize=16_384)
def _origin(base_url: str) -> _Origin:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HttpError("the URL is neither http nor https")
    tls = parts.scheme == "https"
    return _Origin(tls, parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"), parts.netloc)


class _Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self, began: "Callable[[_Connection], None]", ended: "Callable[[_Connection], None]") -> None:
        self._began = began
        self._ended = ended
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Reply] | None = None
        self._chunks: list[bytes] = []
        self._size = self._limit = self._head_bytes = 0
        self._in_body = self._until_end = False
        self._idle: asyncio.TimerHandle | None = None
        self.reusable = True

    async def exchange(self, request: bytes, limit: int) -> Reply:
        """Send a request and wait for the answer. Raises HttpError."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._chunks, self._size, self._limit, self._head_bytes = [], 0, limit, 0
        self._in_body = self._until_end = False
        waiter: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        self._transport.write(request)
        try:
            return await waiter
        finally:
            if self._waiter is not None:
                # Given up in the middle of an answer: what comes now belongs to no request.
                self._waiter = None
                self.close()

    def rest(self) -> None:
        """Keep the connection for a later exchange, for a while."""
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.close)

    def close(self) -> None:
        """Close at once."""
        self.reusable = False
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._transport.abort()

    def _finish(self, outcome: Reply | HttpError) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            if isinstance(outcome, HttpError):
                waiter.set_exception(outcome)
            else:
                waiter.set_result(outcome)
        if isinstance(outcome, HttpError):
            self.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast(asyncio.Transport, transport)
        self._began(self)

    def data_received(self, data: bytes) -> None:
        """Part of an answer."""
        if self._waiter is None:
            self.close()
            return
        self._head_bytes += 0 if self._in_body else len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(HttpError(f"an answer that is no HTTP: {error}"[:200]))
        else:
            if self._head_bytes > MAX_HEAD_BYTES and not self._in_body:
                self._finish(TooLarge("the head of an answer is too long"))

    def connection_lost(self, error: Exception | None) -> None:
        """The other side closed, or the line broke."""
        self.reusable = False
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._until_end and error is None:
            self._finish(Reply(self._parser.get_status_code(), b"".join(self._chunks)))
        elif self._head_bytes or self._in_body:
            self._finish(HttpError("the connection ended in the middle of an answer"))
        else:
            self._finish(_Closed("the connection was closed without an answer"))
        self._ended(self)

    # httptools

    def on_headers_complete(self) -> None:
        """Status and headers are known."""
        self._in_body = self._parser.get_status_code() >= 200

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; without a length or chunks the body ends with the connection."""
        lower = name.lower()
        if lower == b"content-length" or (lower == b"transfer-encoding" and b"chunked" in value.lower()):
            self._until_end = False

    def on_message_begin(self) -> None:
        """The first byte."""
        self._until_end = True

    def on_body(self, chunk: bytes) -> None:
        """Part of the body."""
        self._size += len(chunk)
        if self._size > self._limit:
            self._finish(TooLarge(f"more than {self._limit} bytes"))
        else:
            self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        """The answer is complete; an interim one (1xx) is none."""
        if not self._in_body:
            return
        self._until_end = False
        self.reusable = self.reusable and self._waiter is not None and self._parser.should_keep_alive()
        self._finish(Reply(self._parser.get_status_code(), b"".join(self._chunks)))


class HttpClient:
    """Requests to many origins. Close with ``close``."""

    def __init__(self, *, connect_timeout_s: float, request_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._request_timeout_s = request_timeout_s
        self._resting: dict[_Origin, _Connection] = {}
        self._open: set[_Connection] = set()
        self._addresses: dict[_Origin, tuple[float, str]] = {}
        self._tls: ssl.SSLContext | None = None
        self.connects = 0

    async def close(self) -> None:
        """Close all connections."""
        for connection in list(self._open):
            connection.close()
        self._resting.clear()

    async def get(self, base_url: str, path: str, limit: int) -> Reply:
        """GET. Raises HttpError, TimeoutError, OSError."""
        return await self._request(base_url, "GET", path, b"", limit)

    async def post_json(self, base_url: str, path: str, body: bytes, limit: int) -> Reply:
        """POST of JSON. Raises HttpError, TimeoutError, OSError."""
        return await self._request(base_url, "POST", path, body, limit)

    async def _request(self, base_url: str, method: str, path: str, body: bytes, limit: int) -> Reply:
        origin = _origin(base_url)
        head = (
            f"{method} {origin.prefix}{path} HTTP/1.1\r\nhost: {origin.authority}\r\n"
            "user-agent: twofold-controlplane\r\naccept: */*\r\naccept-encoding: identity\r\n"
        )
        if body:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        request = head.encode("latin-1") + b"\r\n" + body
        async with asyncio.timeout(self._request_timeout_s):
            connection = self._resting.pop(origin, None)
            if connection is not None and connection.reusable:
                try:
                    return await self._exchange(origin, connection, request, limit)
                except _Closed:
                    pass  # the other side closed it just as it was to be used again
            return await self._exchange(origin, await self._connect(origin), request, limit)

    async def _exchange(self, origin: _Origin, connection: _Connection, request: bytes, limit: int) -> Reply:
        reply = await connection.exchange(request, limit)
        if connection.reusable and origin not in self._resting:
            connection.rest()
            self._resting[origin] = connection
        else:
            connection.close()
        return reply

    async def _connect(self, origin: _Origin) -> _Connection:
        loop = asyncio.get_running_loop()
        self.connects += 1

        def forget(connection: _Connection) -> None:
            self._open.discard(connection)
            if self._resting.get(origin) is connection:
                del self._resting[origin]

        async with asyncio.timeout(self._connect_timeout_s):
            address = await self._address(origin)
            if origin.tls and self._tls is None:
                self._tls = ssl.create_default_context()
            _, connection = await loop.create_connection(
                lambda: _Connection(self._open.add, forget),
                address,
                origin.port,
                ssl=self._tls if origin.tls else None,
                server_hostname=origin.host if origin.tls else None,
            )
        return connection

    async def _address(self, origin: _Origin) -> str:
        """The host's address, looked up now and then. Raises OSError."""
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(origin.host))
        loop = asyncio.get_running_loop()
        known = self._addresses.get(origin)
        if known is not None and loop.time() - known[0] < ADDRESS_TTL_S:
            return known[1]
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        if len(self._addresses) >= MAX_ADDRESSES:
            self._addresses.clear()
        self._addresses[origin] = (loop.time(), str(found[0][4][0]))
        return str(found[0][4][0])
