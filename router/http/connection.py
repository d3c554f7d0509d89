"""The client side: one asyncio Protocol per connection, one request at a time on it, every wait and buffer bounded."""

import asyncio
from typing import TYPE_CHECKING, cast

from router.http.chunked import ChunkedDecoder, FramingError
from router.http.exchange import ClientExchange, Reply, Request
from router.http.forward import response_head
from router.http.head import HttpError, RequestHead
from twofold.model.reasons import RejectReason

if TYPE_CHECKING:
    from router.http.server import HttpServer

Header = tuple[bytes, bytes]
_JSON: Header = (b"content-type", b"application/json")
_NEVER = float("inf")


class ClientConnection(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_body_bytes",
        "_buffer",
        "_buffered",
        "_decoder",
        "_exchange",
        "_head",
        "_keep_alive",
        "_left",
        "_pieces",
        "_processing",
        "_server",
        "_state",
        "_transport",
        "_wait_head_s",
        "deadline_s",
        "writing_paused",
    )

    _HEAD, _BODY, _BUSY, _LINGER, _CLOSED = range(5)

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._state = self._HEAD
        self._buffer = b""
        self._head: RequestHead | None = None
        self._decoder: ChunkedDecoder | None = None
        self._left = 0
        self._pieces: list[bytes] = []
        self._body_bytes = 0
        self._buffered = 0
        self._exchange: ClientExchange | None = None
        self._keep_alive = True
        self._processing = False
        self._wait_head_s = 0.0
        self.deadline_s = _NEVER
        self.writing_paused = False

    # -- asyncio callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or answer that there are too many."""
        # uvloop's transports fit the interface without deriving from it.
        self._transport = cast("asyncio.Transport", transport)
        server = self._server
        server.connections.add(self)
        self.deadline_s = server.clock() + server.limits.head_timeout_s
        if len(server.connections) > server.limits.connections:
            self._refuse(HttpError(503, RejectReason.SATURATED, "too many connections", limit="connections"))

    def connection_lost(self, error: Exception | None) -> None:
        """Give everything back and tell the exchange."""
        self._state = self._CLOSED
        self._server.connections.discard(self)
        self._forget_body()
        self._buffer = b""
        self._transport = None
        self.deadline_s = _NEVER
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_gone()

    def eof_received(self) -> bool:
        """A client that stops sending is taken as gone: the transport closes."""
        return False

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.writing_paused = True
        if self._exchange is not None:
            self._exchange.client_paused()

    def resume_writing(self) -> None:
        """The client caught up."""
        self.writing_paused = False
        if self._exchange is not None:
            self._exchange.client_resumed()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client, in any cut."""
        state = self._state
        if state == self._BUSY:
            self._buffer += data
            if len(self._buffer) > self._server.limits.pipelined_bytes:
                self._drop_pipelined()
            return
        if state >= self._LINGER:
            return
        self._buffer = self._buffer + data if self._buffer else data
        self._process()

    # -- what exchanges use

    @property
    def keep_alive(self) -> bool:
        """Whether the connection will serve another request after this one."""
        return self._keep_alive and not self._server.draining

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._state == self._CLOSED or self._transport is None

    def reply(self, reply: Reply) -> None:
        """Send a whole response and end the exchange."""
        head = self._head
        keep_alive = self.keep_alive
        self.write(
            response_head(
                reply.status,
                reply.headers,
                content_length=None if reply.status == 204 else len(reply.body),
                keep_alive=keep_alive,
                http10=head is not None and head.http10,
            )
            + (b"" if head is not None and head.method == b"HEAD" else reply.body)
        )
        self.finish(keep_alive)

    def write(self, data: bytes) -> None:
        """Send bytes of the response."""
        if self._transport is not None:
            self._transport.write(data)

    def finish(self, keep_alive: bool) -> None:
        """The response is complete; go on to the next request, or close after the written bytes."""
        self._exchange = None
        self._forget_body()
        self._head = None
        if self._transport is None:
            return
        if not keep_alive or self._server.draining:
            self._close()
            return
        self._state = self._HEAD
        self.deadline_s = self._server.clock() + self._server.limits.keep_alive_s
        if self._buffer and not self._processing:
            self._process()

    def abort(self) -> None:
        """Cut the connection, so that a client cannot take an incomplete response for a complete one."""
        self._exchange = None
        if self._transport is not None:
            self._state = self._CLOSED
            self._transport.abort()

    # -- deadlines and closing

    def expired(self) -> None:
        """The present wait ran out."""
        self.deadline_s = _NEVER
        if self._state == self._HEAD and not self._buffer:
            self._close()
        elif self._state in (self._HEAD, self._BODY):
            limit = "head_timeout" if self._state == self._HEAD else "body_timeout"
            self._refuse(HttpError(408, RejectReason.CLIENT_TIMEOUT, "the request did not arrive in time", limit=limit))
        elif self._transport is not None:
            self._transport.abort()

    def close_when_idle(self) -> None:
        """Close now if no request is being read or answered."""
        if self._state == self._HEAD and not self._buffer:
            self._close()

    def _close(self) -> None:
        if self._transport is not None and self._state != self._CLOSED:
            self._state = self._CLOSED
            # A client that never reads what is still buffered must not hold the connection.
            self.deadline_s = self._server.clock() + self._server.limits.keep_alive_s
            self._transport.close()

    def _refuse(self, error: HttpError) -> None:
        """Answer a request that cannot be read to its end, then discard input for a while before closing."""
        reply = self._server.handler.rejected(error, self._head)
        self._send_and_linger(reply)

    def _send_and_linger(self, reply: Reply) -> None:
        head = self._head
        self._forget_body()
        self._buffer = b""
        self.write(
            response_head(reply.status, reply.headers, content_length=len(reply.body), keep_alive=False)
            + (b"" if head is not None and head.method == b"HEAD" else reply.body)
        )
        self._state = self._LINGER
        self.deadline_s = self._server.clock() + self._server.limits.linger_s
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    # -- reading requests

    def _process(self) -> None:
        """Read as many requests as the buffer holds, one after the other."""
        self._processing = True
        try:
            while self._buffer and self._state < self._BUSY:
                before = self._state
                if self._state == self._HEAD:
                    self._read_head()
                else:
                    self._read_body()
                if self._state == before:
                    break
        except HttpError as error:
            self._refuse(error)
        finally:
            self._processing = False

    def _read_head(self) -> None:
        found = self._server.heads.recall(self._buffer) or self._new_head()
        if found is None:
            return
        head, body_start = found
        now_s = self._server.clock()
        self._head = head
        self._keep_alive = head.keep_alive
        self._wait_head_s = 0.0
        reply = self._early_reply(head)
        if reply is None:
            self._arrival(head, now_s, body_start)
        else:
            self._answer_early(head, reply, body_start)

    def _new_head(self) -> tuple[RequestHead, int] | None:
        """The head in the buffer and where it ends; None while it is incomplete. Raises HttpError."""
        limit = self._server.limits.head_bytes
        buffer = self._buffer
        if buffer.startswith(b"\r\n"):
            # Empty lines before a request line are to be ignored (RFC 9112, 2.2).
            buffer = self._buffer = buffer.lstrip(b"\r\n")
        end = buffer.find(b"\r\n\r\n", 0, limit)
        if end >= 0:
            return self._server.heads.read(buffer[: end + 4]), end + 4
        if len(buffer) >= limit:
            raise HttpError(431, RejectReason.HEAD_TOO_LARGE, f"request head above {limit} bytes", limit="head_bytes")
        self._await_head()
        return None

    def _await_head(self) -> None:
        """Give a head that has begun to arrive its own time, once."""
        if self._buffer and self._wait_head_s == 0.0:
            self._wait_head_s = self._server.clock() + self._server.limits.head_timeout_s
            self.deadline_s = self._wait_head_s

    def _early_reply(self, head: RequestHead) -> Reply | None:
        limits = self._server.limits
        if head.content_length is not None and head.content_length > limits.body_bytes:
            raise _body_too_large(limits.body_bytes)
        expectation = head.fields.get(b"expect")
        if expectation is not None and not head.http10 and not head.expects_continue:
            raise HttpError(417, RejectReason.BAD_REQUEST, "unknown expectation")
        return self._server.handler.precheck(head)

    def _answer_early(self, head: RequestHead, reply: Reply, body_start: int) -> None:
        length = head.content_length or 0
        if head.chunked or head.expects_continue or len(self._buffer) < body_start + length:
            self._send_and_linger(reply)
            return
        self._buffer = self._buffer[body_start + length :]
        self._state = self._BUSY
        self.deadline_s = _NEVER
        self.reply(reply)
        self._restart()

    def _arrival(self, head: RequestHead, now_s: float, body_start: int) -> None:
        """The head is good: take the body, at once where all of it is there."""
        length = head.content_length or 0
        buffer = self._buffer
        have = len(buffer) - body_start
        if not head.chunked and have >= length:
            body = buffer[body_start : body_start + length]
            self._buffer = buffer[body_start + length :] if have > length else b""
            self._take(length)
            self._dispatch(Request(head, body, now_s))
            return
        self._buffer = buffer[body_start:]
        self._decoder = ChunkedDecoder() if head.chunked else None
        self._left = length
        self._body_bytes = 0
        self._state = self._BODY
        self.deadline_s = now_s + self._server.limits.body_timeout_s
        if head.expects_continue and not self._buffer:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_body(self) -> None:
        data, self._buffer = self._buffer, b""
        decoder = self._decoder
        if decoder is None:
            piece = data if len(data) <= self._left else data[: self._left]
            self._left -= len(piece)
            done, rest = self._left == 0, data[len(piece) :]
        else:
            try:
                piece = decoder.feed(data)
            except FramingError as error:
                raise HttpError(400, RejectReason.BAD_REQUEST, str(error)) from None
            done, rest = decoder.done, decoder.rest
        self._body_bytes += len(piece)
        if self._body_bytes > self._server.limits.body_bytes:
            raise _body_too_large(self._server.limits.body_bytes)
        self._take(len(piece))
        if piece:
            self._pieces.append(piece)
        if done:
            self._buffer = rest
            body = b"".join(self._pieces)
            self._pieces = []
            self._decoder = None
            assert self._head is not None
            self._dispatch(Request(self._head, body, self._server.clock()))

    def _dispatch(self, request: Request) -> None:
        self._state = self._BUSY
        self.deadline_s = _NEVER
        if len(self._buffer) > self._server.limits.pipelined_bytes:
            self._drop_pipelined()
        exchange = self._server.handler.handle(self, request)
        if exchange is not None and self._state == self._BUSY and self._head is request.head:
            self._exchange = exchange
        self._restart()

    def _drop_pipelined(self) -> None:
        self._buffer = b""
        self._keep_alive = False
        self._server.handler.limit_hit("pipelined_bytes")

    def _restart(self) -> None:
        """Let the reading loop see a change of state where an answer was given at once."""
        if self._state == self._HEAD and self._buffer:
            asyncio.get_running_loop().call_soon(self._continue)

    def _continue(self) -> None:
        if self._state == self._HEAD and self._buffer:
            self._process()

    def _take(self, size: int) -> None:
        if not self._server.budget.take(size):
            raise HttpError(429, RejectReason.SATURATED, "the router holds too many request bytes")
        self._buffered += size

    def _forget_body(self) -> None:
        if self._buffered:
            self._server.budget.give(self._buffered)
            self._buffered = 0
        self._pieces = []
        self._decoder = None


def _body_too_large(limit_bytes: int) -> HttpError:
    return HttpError(413, RejectReason.BODY_TOO_LARGE, f"request body above {limit_bytes} bytes", limit="body_bytes")
