"""Connections to workers: kept alive, bounded, one request at a time on each."""

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast
from urllib.parse import urlsplit

import msgspec

from router.http.known_heads import response_heads
from router.http.response_head import BadResponse, ResponseHead

log = logging.getLogger(__name__)

MAX_CONCURRENT_CONNECTS = 256
"""Connection attempts under way to one worker; further ones fail, since a worker that slow is down."""


class Address(msgspec.Struct, frozen=True, cache_hash=True):
    """Where a worker listens. ``prefix`` is a path before every request's own ("" usually)."""

    host: str
    port: int
    tls: bool = False
    prefix: bytes = b""

    @property
    def host_header(self) -> bytes:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode()


def parse_url(url: str) -> Address:
    """Address of a worker's URL. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not an http(s) URL: {url!r}")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").encode("ascii")
    return Address(parts.hostname, parts.port or (443 if tls else 80), tls, prefix)


_HEADS = response_heads()
"""Shared by all workers: what they answer differs in little."""


class ResponseReader(Protocol):
    """What reads the response on a connection."""

    def response_head(self, head: ResponseHead) -> Callable[[bytes], None]:
        """The head arrived (never an interim 1xx one); returns what takes the body's bytes, framing included."""

    def response_eof(self, *, any_bytes: bool) -> None:
        """The connection ended; ``any_bytes``: the worker had begun to answer."""

    def response_bad(self, message: str) -> None:
        """What came is no HTTP response."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to a worker."""

    __slots__ = (
        "_feed",
        "_head_buffer",
        "_max_head_bytes",
        "_pool",
        "_reader",
        "_transport",
        "idle_since_s",
        "used",
    )

    def __init__(self, pool: "WorkerConnections", max_head_bytes: int) -> None:
        self._pool = pool
        self._max_head_bytes = max_head_bytes
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._feed: Callable[[bytes], None] | None = None
        self._head_buffer = b""
        self.idle_since_s = 0.0
        self.used = False
        """Whether a request was answered on it before the present one."""

    @property
    def alive(self) -> bool:
        """Whether it is still open on this side."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        # uvloop's transports fit the interface without deriving from it.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        """It ended, for whatever cause."""
        self._transport = None
        self._pool.forget(self)
        reader, self._reader = self._reader, None
        feed, self._feed = self._feed, None
        if reader is not None:
            reader.response_eof(any_bytes=feed is not None or bool(self._head_buffer))

    def eof_received(self) -> bool:
        """The worker sends no more: close this side too."""
        return False

    def data_received(self, data: bytes) -> None:
        """Bytes of the response."""
        feed = self._feed
        if feed is not None:
            feed(data)
        elif self._reader is not None:
            self._read_head(self._reader, self._head_buffer + data if self._head_buffer else data)
        else:
            # Nobody asked: a worker that talks out of turn cannot be trusted with another request.
            self.discard()

    def send(self, reader: ResponseReader, request: bytes, body: bytes) -> None:
        """Send a request; its response goes to ``reader``."""
        transport = self._transport
        assert transport is not None
        self._reader = reader
        if len(body) < 16_384:
            transport.write(request + body)
        else:
            transport.write(request)
            transport.write(body)

    def pause_reading(self) -> None:
        """Stop taking bytes from the worker."""
        if self.alive:
            assert self._transport is not None
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take bytes again."""
        if self.alive:
            assert self._transport is not None
            self._transport.resume_reading()

    def release(self) -> None:
        """The response is complete: keep the connection for another request."""
        self._reader = self._feed = None
        self._head_buffer = b""
        self.used = True
        self._pool.keep(self)

    def discard(self) -> None:
        """Close at once; a request still running on the engine is aborted by it. Idempotent."""
        self._reader = self._feed = None
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self, reader: ResponseReader, buffer: bytes) -> None:
        while True:
            found = _HEADS.recall(buffer)
            if found is None:
                end = buffer.find(b"\r\n\r\n", 0, self._max_head_bytes)
                if end < 0:
                    self._head_buffer = buffer
                    if len(buffer) >= self._max_head_bytes:
                        reader.response_bad("response head too large")
                    return
                try:
                    found = _HEADS.read(buffer[: end + 4]), end + 4
                except BadResponse as error:
                    reader.response_bad(str(error))
                    return
            head = found[0]
            buffer = buffer[found[1] :]
            if head.status == 101 or head.status < 100:
                reader.response_bad("unexpected status")
                return
            if head.status >= 200:
                break
        self._head_buffer = b""
        feed = reader.response_head(head)
        if self._reader is reader:
            # Else the response is over, and the connection may carry another request already.
            self._feed = feed
            if buffer:
                feed(buffer)


class UpstreamCounts:
    """What happened to connections, over all workers."""

    __slots__ = ("opened", "refused", "surplus")

    def __init__(self) -> None:
        self.opened = 0
        self.refused = 0
        """Attempts not made because MAX_CONCURRENT_CONNECTS were under way."""
        self.surplus = 0
        """Connections closed because enough idle ones were kept."""


class WorkerConnections:
    """All connections to one worker."""

    def __init__(
        self,
        address: Address,
        *,
        max_idle: int,
        max_head_bytes: int,
        clock: Callable[[], float],
        counts: UpstreamCounts,
    ) -> None:
        self.address = address
        self._max_idle = max_idle
        self._max_head_bytes = max_head_bytes
        self._clock = clock
        self._idle: deque[UpstreamConnection] = deque()
        self._connecting = 0
        self._counts = counts
        self._retired = False

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    @property
    def connecting(self) -> int:
        """Connections that are being made."""
        return self._connecting

    def take_idle(self) -> UpstreamConnection | None:
        """The connection used last, if any is free: the others then become old and go."""
        while self._idle:
            connection = self._idle.pop()
            if connection.alive:
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises OSError."""
        if self._connecting >= MAX_CONCURRENT_CONNECTS:
            self._counts.refused += 1
            raise ConnectionRefusedError("too many connection attempts under way")
        self._connecting += 1
        self._counts.opened += 1
        try:
            loop = asyncio.get_running_loop()
            transport, connection = await loop.create_connection(
                lambda: UpstreamConnection(self, self._max_head_bytes),
                self.address.host,
                self.address.port,
                ssl=True if self.address.tls else None,
            )
            raw = transport.get_extra_info("socket")
            if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return connection
        finally:
            self._connecting -= 1

    def keep(self, connection: UpstreamConnection) -> None:
        """Take a connection back."""
        if self._retired or not connection.alive or len(self._idle) >= self._max_idle:
            self._counts.surplus += not self._retired and connection.alive
            connection.discard()
            return
        connection.idle_since_s = self._clock()
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """A connection closed; if it was idle it is no longer offered."""
        try:
            self._idle.remove(connection)
        except ValueError:
            pass

    def close_older(self, before_s: float) -> None:
        """Close connections idle since before ``before_s``."""
        while self._idle and self._idle[0].idle_since_s < before_s:
            self._idle.popleft().discard()

    def retire(self) -> None:
        """The worker is gone from the fleet: close what is idle, and what is in use after its response."""
        self._retired = True
        self.close_older(float("inf"))


class UpstreamPool:
    """Connections to all workers of the snapshot."""

    def __init__(
        self,
        *,
        max_idle_per_worker: int,
        max_head_bytes: int,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_idle = max_idle_per_worker
        self._max_head_bytes = max_head_bytes
        self._idle_s = idle_s
        self._clock = clock
        self._workers: dict[Address, WorkerConnections] = {}
        self.counts = UpstreamCounts()

    def worker(self, address: Address) -> WorkerConnections:
        """The connections to ``address``."""
        found = self._workers.get(address)
        if found is None:
            found = self._workers[address] = WorkerConnections(
                address,
                max_idle=self._max_idle,
                max_head_bytes=self._max_head_bytes,
                clock=self._clock,
                counts=self.counts,
            )
        return found

    def sizes(self) -> tuple[int, int]:
        """(idle connections, connections being made) over all workers."""
        workers = self._workers.values()
        return sum(worker.idle for worker in workers), sum(worker.connecting for worker in workers)

    def keep_only(self, addresses: set[Address]) -> None:
        """Forget workers that left the fleet."""
        for address in [known for known in self._workers if known not in addresses]:
            self._workers.pop(address).retire()

    def sweep(self, now_s: float) -> None:
        """Close connections that were idle too long; call about once a second."""
        for worker in self._workers.values():
            worker.close_older(now_s - self._idle_s)

    def close(self) -> None:
        """Close everything idle."""
        self.keep_only(set())
