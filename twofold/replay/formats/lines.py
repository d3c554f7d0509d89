"""Reading text files line by line, gzip or plain, within bounds, with errors that name the line."""

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from twofold.replay.workload import WorkloadError

MAX_LINE_BYTES = 64 << 20


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of each non-empty line. Gzip is recognised by its magic number.

    Raises WorkloadError when the file cannot be read, is damaged or holds a line over ``MAX_LINE_BYTES``.
    """
    number = 0
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: BinaryIO = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise WorkloadError(f"{path}: line {number}: longer than {MAX_LINE_BYTES} bytes")
                line = line.strip()
                if line:
                    yield number, line
    except OSError as error:
        raise WorkloadError(f"{path}: after line {number}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise WorkloadError(f"{path}: after line {number}: damaged gzip data: {error}") from None


def at_line(path: str, number: int, error: object) -> WorkloadError:
    """A WorkloadError that names file and line."""
    return WorkloadError(f"{path}: line {number}: {error}")
