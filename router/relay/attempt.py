"""One try at one worker: the upstream side of a request, replaceable while the client's side stays."""

import asyncio
import logging
from typing import Protocol

from router.http.chunked import BodyDecoder, FramingError, encode_chunk
from router.http.response_head import ResponseHead
from router.relay.context import RelayContext
from router.relay.endings import (
    WORKER_FAULT,
    Ending,
    Markers,
    Seen,
    output_tokens,
    status_ending,
    stream_ending,
)
from router.relay.events import EventStream, count_events, whole_events_before
from router.relay.fleet import RelayTarget
from router.relay.upstream import UpstreamConnection, WorkerConnections
from router.routing.ticket import Ticket
from router.routing.types import Decision

log = logging.getLogger(__name__)


class AttemptOwner(Protocol):
    """What an attempt reports to."""

    def attempt_events(self, attempt: "Attempt", data: bytes) -> None:
        """Whole events, framed for the client."""

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
        "_decoder",
        "_ended",
        "_events",
        "_fresh",
        "_held",
        "_held_bytes",
        "_last_byte_s",
        "_owner",
        "_passing",
        "_paused",
        "_pool_metrics",
        "_request",
        "_seen",
        "_sent_s",
        "_stream",
        "_ticket",
        "decision",
        "head",
        "outputs",
        "target",
    )

    def __init__(
        self,
        context: RelayContext,
        owner: AttemptOwner,
        *,
        target: RelayTarget,
        decision: Decision,
        ticket: Ticket,
        request: bytes,
        body: bytes,
        stream: bool,
        chunked_out: bool,
        markers: Markers,
    ) -> None:
        self._context = context
        self._owner = owner
        self.target = target
        self.decision = decision
        self._ticket = ticket
        self._request = request
        self._body = body
        self._stream = stream
        self._chunked_out = chunked_out
        self._seen = Seen(markers)
        self._pool_metrics = context.metrics.pool(decision.pool)
        self.head: ResponseHead | None = None
        self.outputs = 0
        """Events (or 1 for an unstreamed response) received."""
        self._connection: UpstreamConnection | None = None
        self._events: EventStream | None = None
        self._decoder: BodyDecoder | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._passing = False
        self._ended = False
        self._fresh = False
        self._paused = False
        self._sent_s = context.clock()
        self._last_byte_s = self._sent_s

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
        self._end(Ending.CANCELLED)

    def pause(self) -> None:
        """Take no more from the worker for now."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        """Take bytes again."""
        self._paused = False
        self._last_byte_s = self._context.clock()
        if self._connection is not None:
            self._connection.resume_reading()

    def check(self, now_s: float) -> None:
        """Watchdog, called a few times a second."""
        if self._paused or self._connection is None:
            return
        settings = self._context.settings
        if self.outputs or self._passing or self._held:
            if now_s - self._last_byte_s > settings.stall_timeout_s:
                self._end(Ending.COMPLETE if self._seen.done and not self._seen.error else Ending.STALLED)
            return
        if not self._stream and now_s >= self._ticket.assume_first_token_at_s:
            self._ticket.assume_first_token(now_s)
        patience_s = settings.first_byte_timeout_s if self._stream else settings.response_timeout_s
        if now_s - self._sent_s > patience_s:
            self._end(Ending.FIRST_BYTE_TIMEOUT)

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
            self._end(Ending.CONNECT_FAILED)
            return
        if self._ended:
            worker.keep(connection)
        elif connection.alive:
            self._send(connection)
        else:
            self._end(Ending.CONNECT_FAILED)

    def _send(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self._sent_s = self._context.clock()
        connection.send(self, self._request, self._body)
        if self._paused:
            connection.pause_reading()

    # -- ResponseReader

    def response_head(self, head: ResponseHead) -> None:
        """See ResponseReader."""
        self.head = head
        if head.is_event_stream and head.status == 200:
            context = self._context
            self._events = EventStream(
                head,
                chunked_out=self._chunked_out,
                max_event_bytes=context.settings.max_event_bytes,
                budget=context.budget,
            )
            return
        self._decoder = head.decoder()
        self._last_byte_s = self._context.clock()
        if self._decoder.done:
            self._whole_complete()

    def response_data(self, data: bytes) -> None:
        """See ResponseReader. The hot path: no parsing, no copying, a few byte searches."""
        events = self._events
        if events is None:
            self._take_whole(data)
            return
        now_s = self._context.clock()
        try:
            out = events.feed(data)
        except FramingError:
            self._end(Ending.TRUNCATED if self.outputs else Ending.BAD_RESPONSE)
            return
        if out:
            if self._seen.look(out):
                if not self._marked(out, now_s):
                    return
            else:
                self._count(out, now_s)
                self._owner.attempt_events(self, out)
        else:
            self._last_byte_s = now_s
        if events.complete and not self._ended:
            self._framing_complete(events)

    def response_eof(self, *, any_bytes: bool) -> None:
        """See ResponseReader."""
        connection, self._connection = self._connection, None
        if self._ended:
            return
        if self.head is None:
            if connection is not None and connection.used and not any_bytes and not self._fresh:
                # The worker had closed a connection that was kept too long; that says nothing about the worker.
                self._open(self._context.upstream.worker(self.target.address))
                return
            self._end(Ending.NO_RESPONSE if not any_bytes else Ending.BAD_RESPONSE)
        elif self._events is not None:
            if self._events.eof():
                self._framing_complete(self._events)
            else:
                self._end(stream_ending(self._seen, framing_complete=False))
        elif self._decoder is not None and self._decoder.eof():
            self._whole_complete()
        else:
            self._end(Ending.TRUNCATED)

    def response_bad(self, message: str) -> None:
        """See ResponseReader."""
        log.warning("bad response", extra={"target_id": self.target.target_id, "cause": message})
        self._end(Ending.BAD_RESPONSE)

    # -- streams

    def _count(self, out: bytes, now_s: float) -> None:
        events = count_events(out)
        if self.outputs:
            self._pool_metrics.output(events, now_s - self._last_byte_s)
        else:
            self._first_output(now_s)
            self._pool_metrics.add(self._pool_metrics.events, events)
        self.outputs += events
        self._last_byte_s = now_s
        self._ticket.tokens(events)

    def _first_output(self, now_s: float) -> None:
        if self._stream:
            self._ticket.first_token(now_s)
        self._owner.attempt_first_output(self, now_s)

    def _marked(self, out: bytes, now_s: float) -> bool:
        """A run with an end marker, an abort or an error: pass on what is good of it. False when the attempt ended."""
        seen = self._seen
        ending = stream_ending(seen, framing_complete=False)
        if ending is Ending.COMPLETE:
            self._count(out, now_s)
            self._owner.attempt_events(self, out)
            return not self._ended
        good = whole_events_before(out, seen.markers, framed=self._chunked_out)
        if good and self.outputs:
            self._count(good, now_s)
            self._owner.attempt_events(self, encode_chunk(good) if self._chunked_out else good)
        self._end(ending)
        return False

    def _framing_complete(self, events: EventStream) -> None:
        ending = stream_ending(self._seen, framing_complete=True)
        rest = events.rest()
        if rest and ending is Ending.COMPLETE:
            self._owner.attempt_events(self, rest)
        self._end(ending)

    # -- unstreamed responses

    def _take_whole(self, data: bytes) -> None:
        decoder = self._decoder
        if decoder is None or self.head is None:
            return
        try:
            payload = decoder.feed(data)
        except FramingError:
            self._end(Ending.TRUNCATED)
            return
        self._last_byte_s = self._context.clock()
        if self._passing:
            if payload:
                self._owner.attempt_piece(self, payload)
            if decoder.done:
                self._end(Ending.COMPLETE)
            return
        context = self._context
        if payload and context.budget.take(len(payload)):
            self._held.append(payload)
            self._held_bytes += len(payload)
            payload = b""
        if decoder.done and not payload:
            self._whole_complete()
        elif payload or self._held_bytes > context.settings.hold_response_bytes:
            self._pass_on(payload)

    def _pass_on(self, payload: bytes) -> None:
        """Too large to hold: commit to this worker and stream the body through."""
        assert self.head is not None
        assert self._decoder is not None
        held = b"".join(self._held)
        ending = status_ending(self.head.status, held)
        if ending is not Ending.COMPLETE:
            self._end(ending)
            return
        self._release_held()
        self._context.metrics.limit_hit("hold_response_bytes")
        self._passing = True
        self.outputs = 1
        self._first_output(self._last_byte_s)
        self._owner.attempt_piece(self, held + payload)
        if self._decoder.done:
            self._end(Ending.COMPLETE)

    def _whole_complete(self) -> None:
        assert self.head is not None
        if self._passing:
            self._end(Ending.COMPLETE)
            return
        body = b"".join(self._held)
        ending = status_ending(self.head.status, body)
        if ending is Ending.COMPLETE:
            if self.head.status < 400:
                self.outputs = 1
                self._first_output(self._last_byte_s)
                self._pool_metrics.add(self._pool_metrics.events, output_tokens(body))
            self._owner.attempt_whole(self, body)
        self._end(ending)

    @property
    def held_body(self) -> bytes:
        """What has been received of an unstreamed response."""
        return b"".join(self._held)

    def _release_held(self) -> None:
        self._context.budget.give(self._held_bytes)
        self._held = []
        self._held_bytes = 0

    # -- the end

    def _end(self, ending: Ending) -> None:
        if self._ended:
            return
        self._ended = True
        context = self._context
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._reusable():
                connection.release()
            else:
                connection.discard()
        now_s = context.clock()
        failed = ending in WORKER_FAULT
        self._ticket.finish(now_s, failed)
        slot = self.target.slot
        if failed:
            context.fleet.live.record_failure(slot, now_s)
            context.metrics.slab.inc(context.metrics.failures.cell(ending.value))
        elif ending is Ending.COMPLETE:
            context.fleet.live.record_success(slot)
        if self._events is not None:
            if self._events.split:
                context.metrics.limit_hit("event_bytes")
            self._events.close()
        self._owner.attempt_ended(self, ending)
        self._release_held()

    def _reusable(self) -> bool:
        head = self.head
        if head is None or not head.keep_alive:
            return False
        if self._events is not None:
            return self._events.complete
        return self._decoder is not None and self._decoder.done and not self._decoder.rest


def _cause(error: Exception) -> str:
    return type(error).__name__ if not isinstance(error, OSError) or not error.strerror else error.strerror
