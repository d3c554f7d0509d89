"""A small HTTP/1.1 client for streamed answers: pooled connections, one callback per read, no task switch per event.

An HTTP library costs several times more per event than parsing and checking it; the load generator shares the host with
the fleet under test, so that cost would show in the results.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

MAX_HEAD_BYTES = 64 << 10
MAX_IDLE = 512
CONNECT_TIMEOUT_S = 10.0


class ExchangeError(Exception):
    """A request that got no complete answer. ``kind`` is one of "connect", "timeout", "reset", "protocol"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where an OpenAI-compatible service listens; ``prefix`` is the path before /v1."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @property
    def authority(self) -> str:
        """host[:port] for the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def parse_url(url: str) -> Endpoint:
    """Endpoint of a base URL, with or without a final /v1. Raises ValueError with one line."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an http(s) URL")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r}: a base URL has no query or fragment")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from None
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Endpoint(host=parts.hostname, port=port or (443 if tls else 80), tls=tls, prefix=prefix)


class Receiver:
    """What takes an answer. Override the callbacks; they run on the event loop and must not raise."""

    __slots__ = ("done", "headers", "status")

    def __init__(self) -> None:
        self.done: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    def on_body(self, data: bytes, now_s: float) -> None:
        """A piece of the body."""

    def on_complete(self, now_s: float) -> None:
        """The body has ended as it should."""


class Client:
    """Connections to one endpoint. ``clock`` gives the time passed to receivers."""

    def __init__(
        self, endpoint: Endpoint, clock: Callable[[], float], *, headers: Mapping[str, str] | None = None
    ) -> None:
        self.endpoint = endpoint
        self._clock = clock
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._tls = ssl.create_default_context() if endpoint.tls else None

    async def send(
        self,
        receiver: Receiver,
        path: str,
        body: bytes,
        *,
        timeout_s: float,
        headers: str = "",
        method: str = "POST",
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Send a request and wait until ``receiver`` has the whole answer.

        ``headers`` are complete extra lines. ``on_sent`` runs when the bytes are handed to the kernel. A kept-alive
        connection that turns out to be closed is replaced once. Raises ExchangeError.
        """
        head = (
            f"{method} {self.endpoint.prefix}{path} HTTP/1.1\r\nhost: {self.endpoint.authority}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{self._headers}{headers}\r\n"
        ).encode()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    connection, fresh = await self._connection()
                    receiver.done = asyncio.get_running_loop().create_future()
                    connection.begin(receiver, head + body)
                    if on_sent is not None:
                        on_sent()
                    try:
                        await receiver.done
                    except ExchangeError as error:
                        if fresh or error.kind != "reset" or receiver.status:
                            raise
                        continue
                    finally:
                        self._release(connection)
                    return
        except TimeoutError:
            raise ExchangeError("timeout", f"no complete answer within {timeout_s:g} s") from None

    async def close(self) -> None:
        """Close all connections."""
        for connection in list(self._all):
            connection.abort()
        await asyncio.sleep(0)

    async def _connection(self) -> tuple["_Connection", bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection, False
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._clock, self._all),
                    self.endpoint.host,
                    self.endpoint.port,
                    ssl=self._tls,
                )
        except TimeoutError:
            raise ExchangeError("connect", f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise ExchangeError("connect", f"cannot connect to {self.endpoint.authority}: {error}") from None
        return connection, True

    def _release(self, connection: "_Connection") -> None:
        if connection.usable and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.abort()


class _Connection(asyncio.Protocol):
    """One connection; at most one exchange at a time."""

    def __init__(self, clock: Callable[[], float], registry: set["_Connection"]) -> None:
        self._clock = clock
        self._registry = registry
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._receiver: Receiver | None = None
        self._keep = True
        self._head_bytes = 0
        self._now_s = 0.0
        self._until_close = False

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on it."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and self._keep and self._receiver is None

    def begin(self, receiver: Receiver, data: bytes) -> None:
        """Send ``data`` and let ``receiver`` take the answer."""
        assert self._transport is not None
        receiver.status = 0
        receiver.headers = {}
        self._receiver = receiver
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._until_close = False
        self._transport.write(data)

    def abort(self) -> None:
        """Close at once; the exchange that is running ends with an error."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        self._registry.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._registry.discard(self)
        self._transport = None
        receiver = self._receiver
        if receiver is not None and self._until_close and receiver.status and error is None:
            self._now_s = self._clock()
            self.on_message_complete()
        else:
            self._fail("reset", f"connection closed before the answer was complete{f': {error}' if error else ''}")

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._receiver is None:
            self._keep = False
            self.abort()
            return
        self._now_s = self._clock()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._keep = False
            self._fail("protocol", f"not HTTP/1.1: {error}")
            self.abort()

    def on_status(self, _status: bytes) -> None:
        """httptools: the status line has been read."""

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools: one header field."""
        self._head_bytes += len(name) + len(value)
        if self._receiver is not None and self._head_bytes <= MAX_HEAD_BYTES:
            self._receiver.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """httptools: the head has ended."""
        if self._receiver is None:
            return
        self._receiver.status = self._parser.get_status_code()
        self._keep = self._parser.should_keep_alive()
        headers = self._receiver.headers
        self._until_close = "content-length" not in headers and "chunked" not in headers.get("transfer-encoding", "")

    def on_body(self, data: bytes) -> None:
        """httptools: a piece of the body."""
        if self._receiver is not None:
            self._receiver.on_body(data, self._now_s)

    def on_message_complete(self) -> None:
        """httptools: the answer has ended."""
        receiver, self._receiver = self._receiver, None
        if receiver is None or receiver.status < 200:
            self._receiver = receiver
            return
        receiver.on_complete(self._now_s)
        if receiver.done is not None and not receiver.done.done():
            receiver.done.set_result(None)

    def _fail(self, kind: str, message: str) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None and receiver.done is not None and not receiver.done.done():
            receiver.done.set_exception(ExchangeError(kind, message))
