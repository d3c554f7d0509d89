"""Heads met before, so that most are not parsed again.

The requests of a client differ in the length of their bodies, the responses of a worker in that and, once a second, in
the date. A head is remembered without the digits of its length: whoever sends the same bytes around other digits gets
the same head with another length. Only heads that the strict parsers took are remembered, and digits for digits change
nothing in what they checked.
"""

from typing import TypeVar

import msgspec

from router.http.forward import client_request_id, lines_for_client, lines_for_worker
from router.http.head import RequestHead, parse_head
from router.http.response_head import ResponseHead, parse_response_head

MAX_HEADS = 256
MAX_HEAD_BYTES = 2048
_MAX_DIGITS = 12
_NAMES = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")

_Head = TypeVar("_Head", RequestHead, ResponseHead)


def without_length(head: bytes) -> tuple[bytes, int | None]:
    """``head`` without the digits of its Content-Length, and the length.

    (``head``, None) where it has none in plain form; b"" for a head that is not to be remembered.
    """
    at = head.find(_NAMES[0])
    if at < 0:
        at = head.find(_NAMES[1])
        if at < 0:
            return head, None
    start = at + 18
    end = head.find(b"\r\n", start)
    if end < 0:
        end = len(head)
    digits = head[start:end]
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        return b"", None
    return head[:start] + head[end:], int(digits)


class RequestHeads:
    """Parses request heads and remembers them with the lines that they send on."""

    __slots__ = ("_known", "_max_headers")

    def __init__(self, max_headers: int) -> None:
        self._max_headers = max_headers
        self._known: dict[bytes, RequestHead] = {}

    def read(self, data: bytes) -> RequestHead:
        """The head of ``data``, its empty line included. Raises HttpError as ``parse_head`` does."""
        key, length = without_length(data)
        head = self._known.get(key)
        if head is None:
            head = parse_head(data, self._max_headers)
            head = msgspec.structs.replace(
                head, worker_lines=lines_for_worker(head), request_id=client_request_id(head) or b""
            )
            _remember(self._known, key, head)
        elif head.content_length != length and length is not None:
            return msgspec.structs.replace(head, content_length=length)
        return head


class ResponseHeads:
    """Parses the heads of workers' responses and remembers them with the lines that clients get."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[bytes, ResponseHead] = {}

    def read(self, data: bytes) -> ResponseHead:
        """The head of ``data``, without its empty line. Raises BadResponse as ``parse_response_head`` does."""
        key, length = without_length(data)
        head = self._known.get(key)
        if head is None:
            head = parse_response_head(data)
            head = msgspec.structs.replace(head, client_lines=lines_for_client(head))
            _remember(self._known, key, head)
        elif head.content_length != length and length is not None:
            return msgspec.structs.replace(head, content_length=length)
        return head


def _remember(known: dict[bytes, _Head], key: bytes, head: _Head) -> None:
    if not 0 < len(key) <= MAX_HEAD_BYTES:
        return
    if len(known) >= MAX_HEADS:
        known.clear()
    known[key] = head
