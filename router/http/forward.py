"""Which headers pass through the router, and the heads it writes on both sides."""

import re
from collections.abc import Sequence

from router.http.head import RequestHead, connection_tokens
from router.http.response_head import ResponseHead

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
# Credentials are for the router; accept-encoding would let a worker compress what the router must read; the rest
# is rewritten.
_NOT_TO_WORKERS = _HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"authorization",
    b"x-api-key",
    b"cookie",
    b"accept-encoding",
    b"x-request-id",
}
_NOT_TO_CLIENTS = _HOP_BY_HOP | {b"content-length", b"x-request-id", b"set-cookie"}

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/=+@-]{1,128}\Z")
REQUEST_ID_HEADERS = (b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id")

REASONS = {
    200: b"OK",
    204: b"No Content",
    400: b"Bad Request",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    417: b"Expectation Failed",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}


def client_request_id(head: RequestHead) -> bytes | None:
    """The id that the client gave, where it is short and harmless."""
    for name in REQUEST_ID_HEADERS:
        value = head.fields.get(name)
        if value is not None and _REQUEST_ID.match(value):
            return value
    return None


def request_to_worker(
    head: RequestHead,
    prefix: bytes,
    host: bytes,
    body_bytes: int,
    request_id: bytes,
    data_parallel_rank: int | None,
) -> bytes:
    """Head of the request as the worker gets it: same method, target (behind ``prefix``) and unknown headers."""
    if data_parallel_rank is not None:
        lines = lines_for_worker(head, _RANK) + b"x-data-parallel-rank: %d\r\n" % data_parallel_rank
    else:
        lines = head.worker_lines or lines_for_worker(head)
    return b"%b %b%b HTTP/1.1\r\nhost: %b\r\nx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n" % (
        head.method,
        prefix,
        head.target,
        host,
        request_id,
        lines,
        body_bytes,
    )


def lines_for_worker(head: RequestHead, without: frozenset[bytes] = frozenset()) -> bytes:
    """The client's header lines that a worker gets, less those named ``without``."""
    dropped = _NOT_TO_WORKERS | without
    if b"connection" in head.fields:
        named = connection_tokens(head.headers)
        if not named <= _CONNECTION_WORDS:
            dropped = dropped | (named - _NEVER_DROPPED)
    return b"".join([b"%b: %b\r\n" % field for field in head.headers if field[0] not in dropped])


_RANK = frozenset({b"x-data-parallel-rank"})
_CONNECTION_WORDS = frozenset({b"keep-alive", b"close", b""})
_NEVER_DROPPED = frozenset({b"content-type"})


def lines_for_client(head: ResponseHead) -> bytes:
    """Status line and header lines of a worker's response that a client gets."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, REASONS.get(head.status, b"Status"))]
    lines += [b"%b: %b\r\n" % field for field in head.headers if field[0] not in _NOT_TO_CLIENTS]
    return b"".join(lines)


def response_to_client(
    head: ResponseHead, *, extra: bytes, content_length: int | None, chunked: bool, keep_alive: bool, http10: bool
) -> bytes:
    """Head of a worker's response as the client gets it, with ``extra`` header lines.

    Neither length nor chunked: the body ends with the connection.
    """
    lines = (head.client_lines or lines_for_client(head)) + extra
    return lines + _framing_lines(content_length, chunked, keep_alive, http10)


def _framing_lines(content_length: int | None, chunked: bool, keep_alive: bool, http10: bool) -> bytes:
    """How the body ends and what becomes of the connection, with the empty line."""
    if chunked:
        lines = b"transfer-encoding: chunked\r\n"
    elif content_length is not None:
        lines = b"content-length: %d\r\n" % content_length
    else:
        lines = b""
    if not keep_alive:
        return lines + b"connection: close\r\n\r\n"
    return lines + (b"connection: keep-alive\r\n\r\n" if http10 else b"\r\n")


def response_head(
    status: int,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    content_length: int | None,
    keep_alive: bool,
    http10: bool = False,
) -> bytes:
    """Head of a response that the router makes itself, its empty line included."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, REASONS.get(status, b"Status"))]
    lines += [b"%b: %b\r\n" % field for field in headers]
    lines.append(_framing_lines(content_length, False, keep_alive, http10))
    return b"".join(lines)
