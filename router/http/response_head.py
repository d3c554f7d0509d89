"""The head of a worker's response: parsed by hand, because workers are trusted more than clients and it costs half."""

import re
from collections.abc import Sequence

import msgspec

from router.http.chunked import BodyDecoder, ChunkedDecoder, CloseDecoder, LengthDecoder

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: [^\r\n\x00]*)?\Z")
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")


class BadResponse(ValueError):
    """A response head that cannot be relayed safely."""


class ResponseHead(msgspec.Struct, frozen=True, kw_only=True):
    """Status and headers (names lower case) of a worker's answer, with its body framing.

    ``content_length`` is None where the body is chunked or lasts until the connection ends.
    """

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    content_type: bytes
    content_length: int | None
    chunked: bool
    keep_alive: bool
    client_lines: bytes = b""
    """Status line and the header lines that clients get, where they were made beforehand."""

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.content_type.startswith(b"text/event-stream")

    @property
    def has_body(self) -> bool:
        """Whether a body follows (for a request that was not HEAD)."""
        return self.status not in (204, 304)

    def decoder(self) -> BodyDecoder:
        """A fresh decoder of the body's framing."""
        if not self.has_body:
            return LengthDecoder(0)
        if self.chunked:
            return ChunkedDecoder()
        return CloseDecoder() if self.content_length is None else LengthDecoder(self.content_length)


def parse_response_head(data: bytes) -> ResponseHead:
    """Parse a head without its final empty line. Raises BadResponse."""
    lines = data.split(b"\r\n")
    status_line = _STATUS_LINE.match(lines[0])
    if status_line is None:
        raise BadResponse("malformed status line")
    headers: list[tuple[bytes, bytes]] = []
    content_type = b""
    length: int | None = None
    chunked = False
    keep_alive = status_line[1] == b"1"
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or b"\n" in value or b"\r" in value or b"\x00" in value or _TOKEN.match(name) is None:
            raise BadResponse("malformed header field")
        name = name.lower()
        value = value.strip(b" \t")
        if name == b"content-type":
            content_type = value.lower()
        elif name == b"content-length":
            if not value.isdigit() or len(value) > 15 or length is not None:
                raise BadResponse("malformed content-length")
            length = int(value)
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or chunked:
                raise BadResponse("unsupported transfer-encoding")
            chunked = True
        elif name == b"connection":
            lowered = value.lower()
            keep_alive = (keep_alive or b"keep-alive" in lowered) and b"close" not in lowered
        headers.append((name, value))
    if chunked and length is not None:
        raise BadResponse("content-length beside transfer-encoding")
    return ResponseHead(
        status=int(status_line[2]),
        headers=headers,
        content_type=content_type,
        content_length=length,
        chunked=chunked,
        keep_alive=keep_alive and (chunked or length is not None),
    )
