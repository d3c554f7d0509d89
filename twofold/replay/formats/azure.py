"""Azure LLM inference traces 2023 (Splitwise, ISCA 2024): CSV with ``TIMESTAMP,ContextTokens,GeneratedTokens``.

Arrivals and lengths only: every prompt is unique. Open loop.
"""

from array import array
from collections.abc import Iterator
from datetime import UTC, datetime

from twofold.replay.formats.lines import at_line, read_lines
from twofold.replay.workload import Blocks, Session, Step, WorkloadError, check_lengths, content_key

HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
BLOCK_TOKENS = 512


def load(path: str) -> Iterator[Session]:
    """Sessions of one request each, in order of arrival. A row that generated nothing asks for one token.

    Raises WorkloadError for a wrong header, a damaged row or a timestamp that goes back.
    """
    first: datetime | None = None
    last_s = 0.0
    for number, line in read_lines(path):
        cells = line.decode("utf-8", "replace").lstrip("\ufeff").split(",")
        if number == 1:
            if cells != HEADER:
                raise at_line(path, 1, f"expected the header {','.join(HEADER)}, got {','.join(cells)[:200]!r}")
            continue
        try:
            when, input_tokens, output_tokens = _row(cells)
            check_lengths(input_tokens, output_tokens)
        except (ValueError, WorkloadError) as error:
            raise at_line(path, number, error) from None
        first = first or when
        start_s = (when - first).total_seconds()
        if start_s < last_s:
            raise at_line(path, number, f"timestamp {cells[0]} goes back")
        last_s = start_s
        count = -(-input_tokens // BLOCK_TOKENS)
        keys = array("Q", (content_key("azure", number, index) for index in range(count)))
        prompt = Blocks(keys=keys, block_tokens=BLOCK_TOKENS, input_tokens=input_tokens)
        step = Step(prompt=prompt, output_tokens=output_tokens)
        yield Session(session_id=f"row-{number}", start_s=start_s, items=(step,), label="trace")


def _row(cells: list[str]) -> tuple[datetime, int, int]:
    if len(cells) != len(HEADER):
        raise WorkloadError(f"expected {len(HEADER)} cells, got {len(cells)}")
    try:
        when = datetime.fromisoformat(cells[0])
    except ValueError:
        raise WorkloadError(f"{cells[0][:80]!r} is not a timestamp") from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    counts = []
    for name, cell in zip(HEADER[1:], cells[1:], strict=True):
        try:
            counts.append(int(cell))
        except ValueError:
            raise WorkloadError(f"{name}: {cell[:80]!r} is not a whole number") from None
    return when, counts[0], max(1, counts[1])
