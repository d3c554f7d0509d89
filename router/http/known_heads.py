"""Heads met before, so that most are not parsed again.

The requests of a client differ in the length of their bodies, the responses of a worker in that and, once a second, in
the date. A head is remembered without the digits of its length: whoever sends the same bytes around other digits gets
the same head with another length. Only heads that the strict parsers took are remembered, and digits in the place of
digits change nothing in what they checked.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from msgspec.structs import replace

from router.http.forward import client_request_id, lines_for_client, lines_for_worker
from router.http.head import RequestHead, parse_head
from router.http.response_head import ResponseHead, parse_response_head

MAX_HEADS = 256
MAX_HEAD_BYTES = 2048
_MAX_DIGITS = 12
_NAMES = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")
_END = b"\r\n\r\n"

_Head = TypeVar("_Head", RequestHead, ResponseHead)


def split_length(head: bytes) -> tuple[bytes, bytes, bytes]:
    """``head`` in front of the digits of its Content-Length, the digits, and behind them.

    (``head``, b"", b"") where it has none in plain form.
    """
    at = head.find(_NAMES[0])
    if at < 0:
        at = head.find(_NAMES[1])
        if at < 0:
            return head, b"", b""
    start = at + 18
    end = head.find(b"\r\n", start)
    digits = head[start:end]
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        return head, b"", b""
    return head[:start], digits, head[end:]


class KnownHeads(Generic[_Head]):
    """A parser of heads that remembers what it parsed. ``recall`` is for the usual case: the same head once more."""

    __slots__ = ("_after", "_before", "_digits_at", "_known", "_last", "_parse")

    def __init__(self, parse: Callable[[bytes], _Head]) -> None:
        self._parse: Callable[[bytes], _Head] = parse
        self._known: dict[bytes, _Head] = {}
        self._last: _Head | None = None
        self._before = self._after = b""
        self._digits_at = 0

    @property
    def remembered(self) -> int:
        """How many heads are remembered; at most MAX_HEADS."""
        return len(self._known)

    def recall(self, buffer: bytes) -> tuple[_Head, int] | None:
        """The head at the beginning of ``buffer`` and where it ends, if it is the one read last but for its length."""
        head = self._last
        if head is None or not buffer.startswith(self._before):
            return None
        start = self._digits_at
        end = buffer.find(b"\r", start, start + _MAX_DIGITS + 1)
        digits = buffer[start:end]
        if end < 0 or not digits.isdigit() or not buffer.startswith(self._after, end):
            return None
        return replace(head, content_length=int(digits)), end + len(self._after)

    def read(self, data: bytes) -> _Head:
        """The head of ``data``, its empty line included. Raises what the parser does."""
        before, digits, after = split_length(data)
        key = before + after
        head = self._known.get(key)
        if head is None:
            head = self._parse(data)
            if len(key) > MAX_HEAD_BYTES:
                return head
            if len(self._known) >= MAX_HEADS:
                self._known.clear()
            self._known[key] = head
        if not digits:
            return head
        self._last, self._before, self._after, self._digits_at = head, before, after, len(before)
        return replace(head, content_length=int(digits))


def request_heads(max_headers: int) -> KnownHeads[RequestHead]:
    """Request heads with the lines that they send on. Reading raises HttpError."""

    def parse(data: bytes) -> RequestHead:
        head = parse_head(data, max_headers)
        return replace(head, worker_lines=lines_for_worker(head), request_id=client_request_id(head) or b"")

    return KnownHeads(parse)


def response_heads() -> KnownHeads[ResponseHead]:
    """Heads of workers' responses with the lines that clients get. Reading raises BadResponse."""

    def parse(data: bytes) -> ResponseHead:
        head = parse_response_head(data.removesuffix(_END))
        return replace(head, client_lines=lines_for_client(head))

    return KnownHeads(parse)
