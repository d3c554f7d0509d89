"""One try at one worker: the upstream side of a request, replaceable while the client's side stays."""

import asyncio
import logging
from typing import Protocol

from router.http.response_head import ResponseHead
from router.relay.bodies import ResponseBody, StreamBody, WholeBody, Writer
from router.relay.context import RelayContext
from router.relay.endings import WORKER_FAULT, Ending, Markers
from router.relay.fleet import RelayTarget
from router.relay.upstream import UpstreamConnection, WorkerConnections
from router.routing.ticket import Ticket
from router.telemetry.metrics import PoolMetrics

log = logging.getLogger(__name__)


class AttemptOwner(Protocol):
    """What an attempt reports to."""

    def attempt_events(self, attempt: "Attempt", data: bytes) -> Writer:
        """Whole events, framed for the client; returns where further ones may go."""

    def attempt_whole(self, attempt: "Attempt", body: bytes) -> None:
        """A complete unstreamed response."""

    def attempt_piece(self, attempt: "Attempt", payload: bytes) -> None:
        """A piece of an unstreamed response that is too large to be held."""

    def attempt_first_output(self, attempt: "Attempt", now_s: float) -> None:
        """The first event, or the unstreamed response, arrived."""

    def attempt_ended(self, attempt: "Attempt", ending: Ending) -> None:
        """Nothing more comes. Called once."""


class Attempt:
    """Sends one request to one worker and reads its answer. Never outlives its owner's interest: ``cancel``."""

    __slots__ = (
        "_body",
        "_chunked_out",
        "_connection",
        "_context",
        "_ended",
        "_fresh",
        "_markers",
        "_metrics",
        "_owner",
        "_paused",
        "_request",
        "_response",
        "_sent_s",
        "_stream",
        "head",
        "target",
        "ticket",
    )

    def __init__(
        self,
        context: RelayContext,
        owner: AttemptOwner,
        *,
        target: RelayTarget,
        ticket: Ticket,
        request: bytes,
        body: bytes,
        stream: bool,
        chunked_out: bool,
        markers: Markers,
        metrics: PoolMetrics,
    ) -> None:
        self._context = context
        self._owner = owner
        self.target = target
        self.ticket = ticket
        self._request = request
        self._body = body
        self._stream = stream
        self._chunked_out = chunked_out
        self._markers = markers
        self._metrics = metrics
        self.head: ResponseHead | None = None
        self._response: ResponseBody | None = None
        self._connection: UpstreamConnection | None = None
        self._ended = False
        self._fresh = False
        self._paused = False
        self._sent_s = 0.0

    @property
    def outputs(self) -> int:
        """Events (or 1 for an unstreamed response) received."""
        return self._response.outputs if self._response is not None else 0

    @property
    def held_body(self) -> bytes:
        """What has been received of an unstreamed response."""
        return self._response.held if self._response is not None else b""

    # -- control

    def begin(self) -> None:
        """Send the request on a kept connection, or open one."""
        worker = self._context.upstream.worker(self.target.address)
        connection = worker.take_idle()
        if connection is not None:
            self._send(connection)
        else:
            self._open(worker)

    def cancel(self) -> None:
        """Give up: the worker's connection closes, which aborts the request in the engine."""
        self.end(Ending.CANCELLED)

    def pause(self) -> None:
        """Take no more from the worker for now."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        """Take bytes again."""
        self._paused = False
        if self._response is not None:
            self._response.last_byte_s = self._context.clock()
        if self._connection is not None:
            self._connection.resume_reading()

    def check(self, now_s: float) -> None:
        """Watchdog, called a few times a second."""
        if self._paused or self._connection is None:
            return
        settings = self._context.settings
        response = self._response
        if response is not None and response.begun:
            if now_s - response.last_byte_s > settings.stall_timeout_s:
                self.end(response.stall_ending)
            return
        if not self._stream and now_s >= self.ticket.assume_first_token_at_s:
            self.ticket.assume_first_token(now_s)
        patience_s = settings.first_byte_timeout_s if self._stream else settings.response_timeout_s
        if now_s - self._sent_s > patience_s:
            self.end(Ending.FIRST_BYTE_TIMEOUT)

    # -- connecting

    def _open(self, worker: WorkerConnections) -> None:
        self._fresh = True
        self._context.spawn(self._connect(worker))

    async def _connect(self, worker: WorkerConnections) -> None:
        try:
            async with asyncio.timeout(self._context.settings.connect_timeout_s):
                connection = await worker.connect()
        except (OSError, UnicodeError) as error:
            log.info("no connection to worker", extra={"target_id": self.target.target_id, "cause": _cause(error)})
            self.end(Ending.CONNECT_FAILED)
            return
        if self._ended:
            worker.keep(connection)
        elif connection.alive:
            self._send(connection)
        else:
            self.end(Ending.CONNECT_FAILED)

    def _send(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self._sent_s = self._context.clock()
        connection.send(self, self._request, self._body)
        if self._paused:
            connection.pause_reading()

    # -- ResponseReader

    def response_head(self, head: ResponseHead) -> Writer:
        """See ResponseReader."""
        self.head = head
        context = self._context
        metrics = self._metrics
        if head.is_event_stream and head.status == 200:
            response: ResponseBody = StreamBody(
                self, context, head, metrics=metrics, markers=self._markers, chunked_out=self._chunked_out
            )
            self._response = response
        else:
            response = self._response = WholeBody(self, context, head, metrics=metrics)
            if head.content_length == 0 or not head.has_body:
                response.feed(b"")
        return response.feed

    def response_eof(self, *, any_bytes: bool) -> None:
        """See ResponseReader."""
        connection, self._connection = self._connection, None
        if self._ended:
            return
        if self._response is not None:
            self._response.eof()
        elif connection is not None and connection.used and not any_bytes and not self._fresh:
            # The worker had closed a connection that was kept too long; that says nothing about the worker.
            self._open(self._context.upstream.worker(self.target.address))
        else:
            self.end(Ending.NO_RESPONSE if not any_bytes else Ending.BAD_RESPONSE)

    def response_bad(self, message: str) -> None:
        """See ResponseReader."""
        log.warning("bad response", extra={"target_id": self.target.target_id, "cause": message})
        self.end(Ending.BAD_RESPONSE)

    # -- BodyOwner

    def events(self, data: bytes) -> Writer:
        """See BodyOwner."""
        return self._owner.attempt_events(self, data)

    def whole(self, body: bytes) -> None:
        """See BodyOwner."""
        self._owner.attempt_whole(self, body)

    def piece(self, payload: bytes) -> None:
        """See BodyOwner."""
        self._owner.attempt_piece(self, payload)

    def first_output(self, now_s: float) -> None:
        """See BodyOwner."""
        if self._stream:
            self.ticket.first_token(now_s)
            self._owner.attempt_first_output(self, now_s)

    def end(self, ending: Ending) -> None:
        """See BodyOwner. Settles the accounts and the connection, once."""
        if self._ended:
            return
        self._ended = True
        context = self._context
        connection, self._connection = self._connection, None
        response, head = self._response, self.head
        if connection is not None:
            if response is not None and head is not None and head.keep_alive and response.reusable:
                connection.release()
            else:
                connection.discard()
        now_s = context.clock()
        failed = ending in WORKER_FAULT
        self.ticket.finish(now_s, failed)
        slot = self.target.slot
        if failed:
            context.fleet.live.record_failure(slot, now_s)
            context.metrics.slab.inc(context.metrics.failures.cell(ending.value))
        elif ending is Ending.COMPLETE:
            context.fleet.live.record_success(slot)
        self._owner.attempt_ended(self, ending)
        if response is not None:
            response.close()
            self._response = None  # they refer to one another: no work for the garbage collector


def _cause(error: Exception) -> str:
    return type(error).__name__ if not isinstance(error, OSError) or not error.strerror else error.strerror
