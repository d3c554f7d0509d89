"""Strict parsing of a request head: llhttp for the grammar, own rules where its reading leaves room for smuggling."""

from collections.abc import Sequence
from typing import Any

import httptools
import msgspec

from twofold.model.reasons import RejectReason


class HttpError(Exception):
    """A request that is answered with an error before any routing. ``limit`` names the bound it ran into, if one."""

    def __init__(self, status: int, reason: RejectReason, message: str, *, limit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.limit = limit


class RequestHead(msgspec.Struct, frozen=True, kw_only=True):
    """One request head. ``target`` is origin-form (path and query as sent); header names are lower case.

    ``content_length`` is None where the head has none; it and ``chunked`` exclude one another. It is not among the
    headers: heads that differ in nothing else share them.
    """

    method: bytes
    target: bytes
    path: bytes
    http10: bool
    headers: Sequence[tuple[bytes, bytes]]
    fields: dict[bytes, bytes]
    """Headers by name; the first value where a name repeats."""
    content_length: int | None
    chunked: bool
    keep_alive: bool
    worker_lines: bytes = b""
    """The header lines that a worker gets; made by RequestHeads."""
    request_id: bytes = b""
    """The id that the client gave, where it is short and harmless; found by RequestHeads."""

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for ``100 Continue`` before it sends the body."""
        return not self.http10 and self.fields.get(b"expect", b"").lower() == b"100-continue"


class _Collector:
    __slots__ = ("done", "headers", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.done = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.done = True


def parse_head(data: bytes, max_headers: int) -> RequestHead:
    """Parse a head that ends in its empty line. Raises HttpError for anything not plainly well-formed HTTP/1."""
    collector = _Collector()
    parser: Any = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer to upgrade may be ignored; CONNECT is refused below by its target
    except httptools.HttpParserInvalidMethodError:
        raise _bad("unknown method", 501) from None
    except httptools.HttpParserError as error:
        raise _bad(str(error)) from None
    if not collector.done:
        raise _bad("incomplete request head")
    headers = collector.headers
    if len(headers) > max_headers:
        raise HttpError(431, RejectReason.HEAD_TOO_LARGE, f"more than {max_headers} header fields", limit="headers")
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise _bad("only HTTP/1.1 and HTTP/1.0 are spoken here", 505)
    target = _origin_form(collector.url)
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        if name not in fields:
            fields[name] = value
        elif name in _SINGLE:
            raise _bad(f"repeated {name.decode()} header")
    http10 = version == "1.0"
    if not http10 and b"host" not in fields:
        raise _bad("missing host header")
    content_length, chunked = _framing(fields, http10)
    if fields.pop(b"content-length", None) is not None:
        headers = [field for field in headers if field[0] != b"content-length"]
    query = target.find(b"?")
    return RequestHead(
        method=parser.get_method(),
        target=target,
        path=target if query < 0 else target[:query],
        http10=http10,
        headers=headers,
        fields=fields,
        content_length=content_length,
        chunked=chunked,
        keep_alive=_keep_alive(headers, http10),
    )


_SINGLE = frozenset({b"host", b"content-length", b"transfer-encoding", b"content-type", b"expect"})


def _framing(fields: dict[bytes, bytes], http10: bool) -> tuple[int | None, bool]:
    encoding = fields.get(b"transfer-encoding")
    length = fields.get(b"content-length")
    if encoding is not None:
        if http10 or length is not None:
            raise _bad("transfer-encoding not allowed here")
        if encoding.lower() != b"chunked":
            raise _bad("only the chunked transfer-encoding is supported", 501)
        return None, True
    if length is None:
        return None, False
    if not length.isdigit():
        raise _bad("invalid content-length")
    return int(length), False


def _origin_form(url: bytes) -> bytes:
    if url.startswith(b"/"):
        return url
    if url == b"*":
        return url
    for scheme in (b"http://", b"https://"):
        if url[: len(scheme)].lower() == scheme:
            slash = url.find(b"/", len(scheme))
            if slash >= 0:
                return url[slash:]
            query = url.find(b"?", len(scheme))
            return b"/" + url[query:] if query >= 0 else b"/"
    raise _bad("unsupported request target")


def _keep_alive(headers: Sequence[tuple[bytes, bytes]], http10: bool) -> bool:
    tokens = connection_tokens(headers)
    if b"close" in tokens:
        return False
    return not http10 or b"keep-alive" in tokens


def connection_tokens(headers: Sequence[tuple[bytes, bytes]]) -> set[bytes]:
    """Lower-case members of all ``Connection`` headers."""
    tokens: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            for token in value.lower().split(b","):
                tokens.add(token.strip())
    return tokens


def _bad(message: str, status: int = 400) -> HttpError:
    return HttpError(status, RejectReason.BAD_HEAD, message)
