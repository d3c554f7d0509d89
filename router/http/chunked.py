"""HTTP/1 body framings, decoded incrementally and strictly, and the check that lets whole chunks pass verbatim."""

import re
from typing import Protocol

_SIZE_LINE = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")
_SIZE_LINE_EXTENDED = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n\x00]*)?\r\n")
_MAX_LINE_BYTES = 4096
_MAX_TRAILER_BYTES = 16_384

LAST_CHUNK = b"0\r\n\r\n"


class FramingError(ValueError):
    """A body that breaks its framing."""


class BodyDecoder(Protocol):
    """Takes wire bytes, gives payload. ``done`` once the body has ended; ``rest`` then holds bytes behind it."""

    done: bool
    rest: bytes

    def feed(self, data: bytes) -> bytes:
        """Payload in ``data``. Raises FramingError."""

    def eof(self) -> bool:
        """Tell that the connection ended; True when the body is complete by that."""


class ChunkedDecoder:
    """Chunked transfer coding. Trailers are read and dropped, chunk extensions ignored, bare line feeds refused."""

    __slots__ = ("_left", "_line", "_state", "_trailer_bytes", "done", "rest")

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._state = self._SIZE
        self._left = 0
        self._line = b""
        self._trailer_bytes = 0

    @property
    def at_boundary(self) -> bool:
        """Between two chunks, nothing pending."""
        return self._state == self._SIZE and not self._line

    def feed(self, data: bytes) -> bytes:
        """See BodyDecoder."""
        if self.done:
            self.rest += data
            return b""
        if self._line:
            data = self._line + data
            self._line = b""
        pieces: list[bytes] = []
        position = 0
        while position < len(data) and not self.done:
            if self._state == self._DATA:
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._state = self._DATA_END
                continue
            following = self._read_line(data, position)
            if following < 0:
                break
            position = following
        if self.done:
            self.rest = data[position:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def eof(self) -> bool:
        """A chunked body is complete only by its last chunk."""
        return self.done

    def _read_line(self, data: bytes, position: int) -> int:
        """Consume one framing line at ``position``; where it goes on, or -1 when more bytes are needed."""
        end = data.find(b"\r\n", position)
        if end < 0:
            if len(data) - position > _MAX_LINE_BYTES:
                raise FramingError("chunk line too long")
            self._line = data[position:]
            self._check_prefix()
            return -1
        if self._state == self._DATA_END:
            if end != position:
                raise FramingError("chunk longer than its size")
            self._state = self._SIZE
        elif self._state == self._SIZE:
            if end - position > _MAX_LINE_BYTES:
                raise FramingError("chunk line too long")
            match = _SIZE_LINE_EXTENDED.match(data, position)
            if match is None or match.end() != end + 2:
                raise FramingError("malformed chunk size")
            self._left = int(match.group(1), 16)
            self._state = self._DATA if self._left else self._TRAILER
        elif end == position:
            self.done = True
        else:
            self._trailer_bytes += end - position
            if self._trailer_bytes > _MAX_TRAILER_BYTES:
                raise FramingError("trailers too long")
        return end + 2

    def _check_prefix(self) -> None:
        """Refuse early what can no longer become a valid line."""
        line = self._line
        if self._state == self._DATA_END and line not in (b"", b"\r"):
            raise FramingError("chunk longer than its size")
        if self._state == self._SIZE and b"\n" in line:
            raise FramingError("malformed chunk size")


class LengthDecoder:
    """A body of a stated number of bytes."""

    __slots__ = ("_left", "done", "rest")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """See BodyDecoder."""
        if len(data) <= self._left:
            self._left -= len(data)
            self.done = self._left == 0
            return data
        payload = data[: self._left]
        self.rest += data[self._left :]
        self._left = 0
        self.done = True
        return payload

    def eof(self) -> bool:
        """Complete only when all bytes have come."""
        return self.done


class CloseDecoder:
    """A body that lasts until the connection ends (HTTP/1.0 style)."""

    __slots__ = ("done", "rest")

    def __init__(self) -> None:
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """See BodyDecoder."""
        return data

    def eof(self) -> bool:
        """The end of the connection is the end of the body."""
        self.done = True
        return True


def encode_chunk(payload: bytes) -> bytes:
    """``payload`` (not empty) as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def whole_chunks(data: bytes) -> int:
    """How much of ``data`` is whole plain chunks of which the last ends a server-sent event.

    Returns the offset of the last-chunk marker or of the end of ``data``; -1 when the bytes must take the decoding path
    (a chunk cut by the read, an event cut by a chunk, extensions, trailers).
    """
    size = len(data)
    match = _SIZE_LINE.match
    found = match(data)
    if found is not None and found.end() + int(found[1], 16) + 2 == size and data.endswith(b"\n\n\r\n"):
        return size  # one event in one chunk: the usual read
    position = 0
    while position < size:
        found = match(data, position)
        if found is None:
            return -1
        length = int(found[1], 16)
        start = found.end()
        if length == 0:
            return position if data[position:] == LAST_CHUNK and _ends_event(data, position) else -1
        position = start + length + 2
        if position > size or data[position - 2 : position] != b"\r\n":
            return -1
    return position if _ends_event(data, position) else -1


def _ends_event(data: bytes, position: int) -> bool:
    return position == 0 or data[position - 4 : position] == b"\n\n\r\n"
