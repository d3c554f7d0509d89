"""How an attempt at a worker ended: one pure classification that retries, error events and (later) failover rest on."""

import enum
import re

import msgspec

from router.routing.types import Endpoint
from twofold.model.reasons import RejectReason


class Ending(enum.StrEnum):
    """Every way in which a worker can stop answering."""

    COMPLETE = "complete"
    """The response came to its own end."""
    TRUNCATED = "truncated"
    """The connection or the framing ended before the response did."""
    STALLED = "stalled"
    """Bytes stopped coming, the connection stayed."""
    ABORTED = "aborted"
    """The engine gave the request up (finish reason "abort": sleep, pause, a leaving rank)."""
    ENGINE_ERROR = "engine-error"
    """An error event inside the stream."""
    DONE_WITHOUT_FINISH = "done-without-finish"
    """An end marker without a finish reason: an engine in its shutdown window answers like this."""
    CONNECT_FAILED = "connect-failed"
    NO_RESPONSE = "no-response"
    """The connection ended before the response head."""
    FIRST_BYTE_TIMEOUT = "first-byte-timeout"
    BAD_RESPONSE = "bad-response"
    """Bytes that are not HTTP."""
    UNAVAILABLE = "unavailable"
    """502, 503, or 500 of an engine that is shutting down."""
    REFUSED = "refused"
    """The engine's admission control: 429, or 503 that says so."""
    CANCELLED = "cancelled"
    """The router gave it up: the client left or the router stops."""


RETRYABLE = frozenset(
    {
        Ending.TRUNCATED,
        Ending.ABORTED,
        Ending.ENGINE_ERROR,
        Ending.DONE_WITHOUT_FINISH,
        Ending.CONNECT_FAILED,
        Ending.NO_RESPONSE,
        Ending.BAD_RESPONSE,
        Ending.UNAVAILABLE,
        Ending.REFUSED,
        Ending.STALLED,
    }
)
"""Endings after which another worker may be tried while the client has not got a byte."""

WORKER_FAULT = RETRYABLE - {Ending.REFUSED, Ending.ABORTED} | {Ending.FIRST_BYTE_TIMEOUT}
"""Endings that count against the worker (circuit)."""


def client_error(ending: Ending) -> tuple[int, RejectReason, str]:
    """Status, reason and text with which a final failure reaches the client."""
    if ending is Ending.FIRST_BYTE_TIMEOUT:
        return 504, RejectReason.UPSTREAM_TIMEOUT, "the worker did not answer in time"
    if ending is Ending.STALLED:
        return 504, RejectReason.UPSTREAM_STALLED, "the worker stopped answering"
    if ending is Ending.CANCELLED:
        return 503, RejectReason.SHUTTING_DOWN, "the router is shutting down"
    return 502, RejectReason.UPSTREAM_FAILED, _TEXTS.get(ending, "the worker failed")


_TEXTS = {
    Ending.CONNECT_FAILED: "no connection to the worker",
    Ending.NO_RESPONSE: "the worker closed the connection without an answer",
    Ending.TRUNCATED: "the worker's response broke off",
    Ending.ABORTED: "the worker aborted the request",
    Ending.BAD_RESPONSE: "the worker's response is not valid HTTP",
}


class Markers(msgspec.Struct, frozen=True, kw_only=True):
    """Byte patterns in an endpoint's events.

    JSON strings cannot hold a raw line feed or unescaped quotes, so text that a model writes never matches them.
    """

    done: tuple[bytes, ...] = ()
    """Whole lines."""
    finish: bytes = b""
    """Empty: the end marker alone says that the response is finished."""
    aborts: tuple[bytes, ...] = ()
    error: bytes = b""


_CHOICES = Markers(
    done=(b"data: [DONE]",),
    finish=b'"finish_reason":"',
    aborts=(b'"finish_reason":"abort"', b'"finish_reason":"error"'),
    error=b'data: {"error":',
)
_MESSAGES = Markers(done=(b"event: message_stop",), finish=b'"stop_reason":"', error=b"event: error\n")
_RESPONSES = Markers(
    done=(b"event: response.completed", b"event: response.incomplete", b"event: response.failed"),
    error=b"event: error\n",
)
_BY_ENDPOINT = {
    Endpoint.COMPLETIONS: _CHOICES,
    Endpoint.CHAT: _CHOICES,
    Endpoint.MESSAGES: _MESSAGES,
    Endpoint.RESPONSES: _RESPONSES,
}
NO_MARKERS = Markers()


def markers_of(endpoint: Endpoint) -> Markers:
    """The patterns of an endpoint's streams; none where its framing is the only end."""
    return _BY_ENDPOINT.get(endpoint, NO_MARKERS)


class Seen:
    """What the events of one stream have shown so far."""

    __slots__ = ("_marked", "_markers", "aborted", "done", "error", "finished", "markers", "refused")

    def __init__(self, markers: Markers) -> None:
        self.markers = markers
        self._markers = tuple(marker for marker in (markers.finish, markers.error, *markers.done) if marker)
        self._marked = False
        self.finished = not markers.finish
        self.aborted = False
        self.error = False
        """An error event that blames the engine."""
        self.refused = False
        """An error event that blames the request: final, like a 4xx."""
        self.done = False

    def look(self, events: bytes) -> bool:
        """Take in whole events (with or without chunk framing); True when they hold an end marker, abort or error."""
        for marker in self._markers:
            if marker in events:
                self._marked = self._examine(events)
                break
        return self._marked

    def _examine(self, events: bytes) -> bool:
        markers = self.markers
        if markers.finish and markers.finish in events:
            self.finished = True
            self.aborted = any(marker in events for marker in markers.aborts)
        if markers.error and markers.error in events:
            self.refused = _blames_request(events, markers.error)
            self.error = not self.refused
        for marker in markers.done:
            if marker in events and (marker + b"\n" in events or marker + b"\r\n" in events):
                self.done = True
        return self.done or self.error or self.aborted or self.refused


_REQUEST_ERROR = re.compile(rb'"code":\s*4\d\d\b|"type":\s*"(?:invalid_request|not_found|rate_limit)_error"')


def _blames_request(events: bytes, marker: bytes) -> bool:
    """Whether the error event in ``events`` bears a 4xx code.

    Were it taken for the engine's fault, one bad client could open the circuits of a whole fleet.
    """
    start = events.find(marker)
    end = events.find(b"\n\n", start)
    return _REQUEST_ERROR.search(events, start, end if end >= 0 else len(events)) is not None


_USAGE = (b'"completion_tokens":', b'"output_tokens":')
_NUMBER = re.compile(rb"\s*(\d{1,9})")
_USAGE_TAIL_BYTES = 4096


def output_tokens(body: bytes) -> int:
    """Output tokens by the usage at the end of an unstreamed response; 0 where it has none.

    A byte search: generated text cannot hold unescaped quotes.
    """
    tail = max(0, len(body) - _USAGE_TAIL_BYTES)
    for name in _USAGE:
        at = body.rfind(name, tail)
        if at >= 0:
            found = _NUMBER.match(body, at + len(name))
            return int(found[1]) if found else 0
    return 0


def stream_ending(seen: Seen, *, framing_complete: bool) -> Ending:
    """Classify a stream that has ended or shown an end marker.

    ``framing_complete``: the body came to the end that its framing states.
    """
    if seen.refused:
        return Ending.COMPLETE
    if seen.error:
        return Ending.ENGINE_ERROR
    if seen.aborted:
        return Ending.ABORTED
    if seen.done:
        return Ending.COMPLETE if seen.finished else Ending.DONE_WITHOUT_FINISH
    if not seen.markers.done and framing_complete:
        return Ending.COMPLETE
    return Ending.TRUNCATED


_SHUTTING_DOWN = (b"cannot schedule new futures", b"EngineCore encountered an issue", b"EngineDeadError")
_ADMISSION = re.compile(rb"queue|admission|overloaded|too many", re.IGNORECASE)


def status_ending(status: int, body: bytes) -> Ending:
    """Classify a whole response by its status and the beginning of its body."""
    if status == 429:
        return Ending.REFUSED
    if status == 503:
        return Ending.REFUSED if _ADMISSION.search(body[:2048]) else Ending.UNAVAILABLE
    if status == 502:
        return Ending.UNAVAILABLE
    if status == 500 and any(text in body for text in _SHUTTING_DOWN):
        return Ending.UNAVAILABLE
    return Ending.COMPLETE
