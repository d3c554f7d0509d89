"""How the body of a worker's response is read: event by event, or whole."""

from collections.abc import Callable
from typing import Protocol

from router.http.chunked import BodyDecoder, FramingError, encode_chunk, whole_chunks
from router.http.response_head import ResponseHead
from router.relay.context import RelayContext
from router.relay.endings import Ending, Markers, Seen, output_tokens, status_ending, stream_ending
from router.relay.events import EventStream, count_events, whole_events_before
from router.routing.ticket import Ticket
from router.telemetry.metrics import PoolMetrics

Writer = Callable[[bytes], None]


class BodyOwner(Protocol):
    """What a body is read for. Nothing is read once it has ended."""

    ticket: Ticket

    def events(self, data: bytes) -> Writer:
        """Whole events, framed for the client, the first ones; returns where further ones go."""

    def whole(self, body: bytes) -> None:
        """A complete unstreamed response."""

    def piece(self, payload: bytes) -> None:
        """A piece of an unstreamed response that is too large to be held."""

    def first_output(self, now_s: float) -> None:
        """The first event, or the unstreamed response, arrived."""

    def end(self, ending: Ending) -> None:
        """Nothing more comes."""


class ResponseBody(Protocol):
    """The part of a response behind its head."""

    outputs: int
    """Events (or 1 for an unstreamed response) passed on."""
    last_byte_s: float

    @property
    def begun(self) -> bool:
        """Whether output came; from then on silence is a stall."""

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another response."""

    @property
    def stall_ending(self) -> Ending:
        """What silence means now."""

    @property
    def held(self) -> bytes:
        """What has been received of an unstreamed response and not been passed on."""

    def feed(self, data: bytes) -> None:
        """Bytes of the body, framing included."""

    def eof(self) -> None:
        """The connection ended."""

    def close(self) -> None:
        """Drop what is held. Idempotent."""


class StreamBody:
    """Server-sent events on their way to the client. ``feed`` is the hot path: a few byte searches, no copying."""

    __slots__ = (
        "_chunked_out",
        "_clock",
        "_context",
        "_ended",
        "_events",
        "_metrics",
        "_owner",
        "_seen",
        "_tokens",
        "_write",
        "last_byte_s",
        "outputs",
    )

    def __init__(
        self,
        owner: BodyOwner,
        context: RelayContext,
        head: ResponseHead,
        *,
        metrics: PoolMetrics,
        markers: Markers,
        chunked_out: bool,
    ) -> None:
        self._owner = owner
        self._context = context
        self._clock = context.clock
        self._events = EventStream(
            head, chunked_out=chunked_out, max_event_bytes=context.settings.max_event_bytes, budget=context.budget
        )
        self._metrics = metrics
        self._tokens = owner.ticket.tokens
        self._seen = Seen(markers)
        self._chunked_out = chunked_out
        self._write: Writer | None = None
        self._ended = False
        self.outputs = 0
        self.last_byte_s = 0.0

    @property
    def begun(self) -> bool:
        """See ResponseBody."""
        return self.outputs > 0

    @property
    def reusable(self) -> bool:
        """See ResponseBody."""
        return self._events.complete

    @property
    def stall_ending(self) -> Ending:
        """See ResponseBody."""
        return Ending.COMPLETE if self._seen.done and not self._seen.error else Ending.STALLED

    @property
    def held(self) -> bytes:
        """See ResponseBody."""
        return b""

    def feed(self, data: bytes) -> None:
        """See ResponseBody."""
        now_s = self._clock()
        events = self._events
        if events.verbatim and whole_chunks(data) == len(data):
            out = data
        else:
            try:
                out = events.feed(data)
            except FramingError:
                self._end(Ending.TRUNCATED if self.outputs else Ending.BAD_RESPONSE)
                return
        if out:
            if self._seen.look(out):
                self._marked(out, now_s)
            elif self._write is None:
                self._first(out, now_s)
            else:
                count = count_events(out)
                self._metrics.output(count, now_s - self.last_byte_s)
                self.outputs += count
                self.last_byte_s = now_s
                self._tokens(count)
                self._write(out)
        else:
            self.last_byte_s = now_s
        if events.complete and not self._ended:
            self._framing_complete()

    def eof(self) -> None:
        """See ResponseBody."""
        if self._events.eof():
            self._framing_complete()
        else:
            self._end(stream_ending(self._seen, framing_complete=False))

    def close(self) -> None:
        """See ResponseBody."""
        self._ended = True
        if self._events.split:
            self._context.metrics.limit_hit("event_bytes")
            self._events.split = False
        self._events.close()

    def _first(self, out: bytes, now_s: float) -> None:
        """The first events: the client's side decides where they go."""
        self._count(out, now_s)
        self._write = self._owner.events(out)

    def _count(self, out: bytes, now_s: float) -> None:
        count = count_events(out)
        metrics = self._metrics
        if self.outputs:
            metrics.output(count, now_s - self.last_byte_s)
        else:
            self._owner.first_output(now_s)
            metrics.add(metrics.events, count)
        self.outputs += count
        self.last_byte_s = now_s
        self._tokens(count)

    def _marked(self, out: bytes, now_s: float) -> None:
        """A run with an end marker, an abort or an error: pass on what is good of it."""
        seen = self._seen
        ending = stream_ending(seen, framing_complete=False)
        if ending is Ending.COMPLETE:
            self._count(out, now_s)
            self._owner.events(out)
            return
        good = whole_events_before(out, seen.markers, framed=self._chunked_out)
        if good and self.outputs:
            self._count(good, now_s)
            self._owner.events(encode_chunk(good) if self._chunked_out else good)
        self._end(ending)

    def _framing_complete(self) -> None:
        ending = stream_ending(self._seen, framing_complete=True)
        rest = self._events.rest()
        if rest and ending is Ending.COMPLETE:
            self._owner.events(rest)
        self._end(ending)

    def _end(self, ending: Ending) -> None:
        self._ended = True
        self._owner.end(ending)


class WholeBody:
    """An unstreamed response: held until complete, or passed on in pieces once it is too large for that."""

    __slots__ = (
        "_at_once",
        "_clock",
        "_context",
        "_decoder",
        "_head",
        "_held",
        "_held_bytes",
        "_metrics",
        "_owner",
        "_passing",
        "last_byte_s",
        "outputs",
    )

    def __init__(self, owner: BodyOwner, context: RelayContext, head: ResponseHead, *, metrics: PoolMetrics) -> None:
        self._owner = owner
        self._context = context
        self._clock = context.clock
        self._head = head
        self._decoder: BodyDecoder | None = None
        self._at_once = False
        """Whether all of it came in one read, as is usual: no decoder is needed then."""
        self._metrics = metrics
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._passing = False
        self.outputs = 0
        self.last_byte_s = context.clock()

    @property
    def begun(self) -> bool:
        """See ResponseBody."""
        return bool(self.outputs or self._passing or self._held)

    @property
    def reusable(self) -> bool:
        """See ResponseBody."""
        decoder = self._decoder
        return self._at_once or (decoder is not None and decoder.done and not decoder.rest)

    @property
    def stall_ending(self) -> Ending:
        """See ResponseBody."""
        return Ending.STALLED

    @property
    def held(self) -> bytes:
        """See ResponseBody."""
        return b"".join(self._held)

    def feed(self, data: bytes) -> None:
        """See ResponseBody."""
        self.last_byte_s = self._clock()
        decoder = self._decoder
        if decoder is None:
            if len(data) == self._head.content_length:
                self._at_once = True
                self._complete(data)
                return
            decoder = self._decoder = self._head.decoder()
        try:
            payload = decoder.feed(data)
        except FramingError:
            self._owner.end(Ending.TRUNCATED)
            return
        if self._passing:
            if payload:
                self._owner.piece(payload)
            if decoder.done:
                self._owner.end(Ending.COMPLETE)
        elif decoder.done and not self._held:
            self._complete(payload)
        else:
            self._hold(payload)

    def eof(self) -> None:
        """See ResponseBody."""
        decoder = self._decoder or self._head.decoder()
        if not decoder.eof():
            self._owner.end(Ending.TRUNCATED)
        elif self._passing:
            self._owner.end(Ending.COMPLETE)
        else:
            self._complete(self.held)

    def close(self) -> None:
        """See ResponseBody."""
        self._context.budget.give(self._held_bytes)
        self._held = []
        self._held_bytes = 0

    def _hold(self, payload: bytes) -> None:
        context = self._context
        if payload and context.budget.take(len(payload)):
            self._held.append(payload)
            self._held_bytes += len(payload)
            payload = b""
        if self._done and not payload:
            self._complete(self.held)
        elif payload or self._held_bytes > context.settings.hold_response_bytes:
            self._pass_on(payload)

    def _pass_on(self, payload: bytes) -> None:
        """Too large to hold: commit to this worker and stream the body through."""
        held = self.held
        ending = status_ending(self._head.status, held)
        if ending is not Ending.COMPLETE:
            self._owner.end(ending)
            return
        self.close()
        self._context.metrics.limit_hit("hold_response_bytes")
        self._passing = True
        self.outputs = 1
        self._owner.first_output(self.last_byte_s)
        self._owner.piece(held + payload)
        if self._done:
            self._owner.end(Ending.COMPLETE)

    @property
    def _done(self) -> bool:
        return self._decoder is not None and self._decoder.done

    def _complete(self, body: bytes) -> None:
        status = self._head.status
        if status < 400:
            self.outputs = 1
            self._owner.first_output(self.last_byte_s)
            self._metrics.add(self._metrics.events, output_tokens(body))
            self._owner.whole(body)
            self._owner.end(Ending.COMPLETE)
            return
        ending = status_ending(status, body)
        if ending is Ending.COMPLETE:
            self._owner.whole(body)
        elif not self._held:
            # The engine's own answer is kept for when no other worker gives a better one.
            self._held = [body]
        self._owner.end(ending)
