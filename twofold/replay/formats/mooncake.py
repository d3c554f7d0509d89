"""Mooncake traces (FAST'25 release): JSON lines with ``timestamp`` ms, ``input_length``, ``output_length``,
``hash_ids``.

One request per line, open loop. ``hash_ids`` name prefix-chained blocks of ``block_tokens`` tokens.
"""

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from statistics import median

import msgspec

from twofold.replay.formats.lines import at_line, read_lines
from twofold.replay.workload import Blocks, Session, Step, WorkloadError, check_lengths, content_key

PROBE_ROWS = 256
"""Rows looked at to tell quantised timestamps from exact ones."""


class _Row(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def load(path: str, *, block_tokens: int = 512, tick_s: float | None = None, seed: int = 0) -> Iterator[Session]:
    """Sessions of one request each, in order of arrival.

    ``tick_s``: rows with equal timestamps are spread evenly at random over this many seconds, at most up to the next
    timestamp; None detects a quantised clock from the first rows, 0 leaves arrivals as they are. Raises WorkloadError.
    """
    rows = _rows(path, block_tokens)
    probe: list[tuple[int, _Row]] = []
    for item in rows:
        probe.append(item)
        if len(probe) == PROBE_ROWS:
            break
    tick_s = detect_tick_s([row.timestamp / 1000.0 for _, row in probe]) if tick_s is None else tick_s
    random_source = random.Random(f"mooncake-{seed}")
    for group, gap_s in _by_timestamp(probe, rows):
        start_s = group[0][1].timestamp / 1000.0
        span_s = min(tick_s, gap_s) if gap_s is not None else tick_s
        offsets = sorted(random_source.random() * span_s for _ in group)
        for (number, row), offset_s in zip(group, offsets, strict=True):
            keys = array("Q", (content_key("mooncake", hash_id) for hash_id in row.hash_ids))
            prompt = Blocks(keys=keys, block_tokens=block_tokens, input_tokens=row.input_length)
            step = Step(prompt=prompt, output_tokens=row.output_length)
            yield Session(session_id=f"row-{number}", start_s=start_s + offset_s, items=(step,), label="trace")


def detect_tick_s(timestamps_s: list[float]) -> float:
    """The tick of a quantised clock in seconds; 0 where timestamps look exact (fewer than half of the rows share
    one).
    """
    distinct = sorted(set(timestamps_s))
    if len(distinct) < 2 or len(distinct) > len(timestamps_s) / 2:
        return 0.0
    return median(b - a for a, b in itertools.pairwise(distinct))


def _rows(path: str, block_tokens: int) -> Iterator[tuple[int, _Row]]:
    decoder = msgspec.json.Decoder(_Row)
    last = 0.0
    for number, line in read_lines(path):
        try:
            row = decoder.decode(line)
            check_lengths(row.input_length, row.output_length)
        except (msgspec.DecodeError, WorkloadError, UnicodeDecodeError) as error:
            raise at_line(path, number, error) from None
        blocks = -(-row.input_length // block_tokens)
        if len(row.hash_ids) != blocks:
            raise at_line(
                path,
                number,
                f"{len(row.hash_ids)} hash_ids, but {row.input_length} tokens are {blocks} blocks of {block_tokens}",
            )
        if not row.timestamp >= last:
            raise at_line(path, number, f"timestamp {row.timestamp:g} goes back (previous row: {last:g})")
        last = row.timestamp
        yield number, row


def _by_timestamp(
    first: list[tuple[int, _Row]], rest: Iterable[tuple[int, _Row]]
) -> Iterator[tuple[list[tuple[int, _Row]], float | None]]:
    """Groups of rows with one timestamp, each with the seconds to the next group (None for the last)."""
    group: list[tuple[int, _Row]] = []
    for source in (first, rest):
        for item in source:
            if group and item[1].timestamp != group[0][1].timestamp:
                yield group, (item[1].timestamp - group[0][1].timestamp) / 1000.0
                group = []
            group.append(item)
    if group:
        yield group, None
