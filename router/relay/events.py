"""The bytes of a server-sent event stream on their way from worker to client.

Whole events travel in the very buffers and chunk framing in which they came. Only where a read cuts an event in two is
the framing taken off and put on again, so that the client is never left inside an event: whatever happens to the
worker, an error event or the continuation from elsewhere can follow.
"""

from router.http.chunked import ChunkedDecoder, encode_chunk, whole_chunks
from router.http.limits import BufferBudget
from router.http.response_head import ResponseHead
from router.relay.endings import Markers


class EventStream:
    """Cuts a worker's body into runs of whole events.

    ``chunked_out``: whether the client gets chunk framing. Feed it reads; ``complete`` is set at the body's end.
    """

    __slots__ = ("_budget", "_chunked_out", "_decoder", "_held", "_max_event_bytes", "complete", "split", "verbatim")

    def __init__(self, head: ResponseHead, *, chunked_out: bool, max_event_bytes: int, budget: BufferBudget) -> None:
        self._decoder = head.decoder()
        self.verbatim = chunked_out and isinstance(self._decoder, ChunkedDecoder)
        self._chunked_out = chunked_out
        self._held = b""
        self._max_event_bytes = max_event_bytes
        self._budget = budget
        self.complete = False
        self.split = False
        """Whether an event was too large to be kept whole."""

    def feed(self, data: bytes) -> bytes:
        """The client's bytes for this read: whole events, framed; b"" while none is complete. The last-chunk marker is
        held back. Raises FramingError."""
        if self.verbatim:
            end = whole_chunks(data)
            if end >= 0:
                if end < len(data):
                    self.complete = True
                    return data[:end]
                return data
            self.verbatim = False
        return self._decode(data)

    def eof(self) -> bool:
        """The connection ended; True when that is the body's own end."""
        if self.complete or self._decoder.eof():
            self.complete = True
        return self.complete

    def rest(self) -> bytes:
        """Framed bytes behind the last whole event, when the body is complete: an event without its empty line."""
        held = self._held
        self._release()
        return self._frame(held)

    def close(self) -> None:
        """Drop what is held. Idempotent."""
        self._release()

    def _decode(self, data: bytes) -> bytes:
        decoder = self._decoder
        payload = decoder.feed(data)
        held = self._held
        if decoder.done:
            self.complete = True
        whole = held + payload if held else payload
        cut = _last_boundary(whole, max(0, len(held) - 3))
        rest = whole[cut:]
        growth = len(rest) - len(held)
        if len(rest) > self._max_event_bytes or (growth > 0 and not self._budget.take(growth)):
            # Too large to keep whole: it passes in pieces, and cannot be continued elsewhere.
            self.split = True
            self._release()
            return self._frame(whole)
        if growth < 0:
            self._budget.give(-growth)
        self._held = rest
        if not rest and not self.complete and isinstance(decoder, ChunkedDecoder) and decoder.at_boundary:
            self.verbatim = self._chunked_out
        return self._frame(whole[:cut])

    def _frame(self, payload: bytes) -> bytes:
        return encode_chunk(payload) if payload and self._chunked_out else payload

    def _release(self) -> None:
        if self._held:
            self._budget.give(len(self._held))
            self._held = b""


def _last_boundary(payload: bytes, start: int) -> int:
    """Offset behind the last event end at or after ``start``; 0 when there is none."""
    found = payload.rfind(b"\n\n", start)
    end = found + 2 if found >= 0 else 0
    if payload.find(b"\r", start) >= 0:
        found = payload.rfind(b"\r\n\r\n", start)
        end = max(end, found + 4 if found >= 0 else 0)
    return end


def count_events(data: bytes) -> int:
    """Events in a run of whole events. JSON escapes line feeds, so only event ends count."""
    return data.count(b"\n\n") or data.count(b"\r\n\r\n") or 1


def whole_events_before(run: bytes, markers: Markers, *, framed: bool) -> bytes:
    """Payload of the events in front of the one with which a stream ends badly; ``run`` is whole events."""
    payload = ChunkedDecoder().feed(run) if framed else run
    candidates = [payload.find(marker) for marker in (*markers.aborts, *markers.done)]
    if markers.error:
        candidates.append(payload.find(markers.error))
    first = min((position for position in candidates if position >= 0), default=0)
    boundary = payload.rfind(b"\n\n", 0, first)
    return payload[: boundary + 2] if boundary >= 0 else b""
