"""Counters, gauges and histograms of one process in shared memory: one memory write on the hot path, rendered
elsewhere.

A slab has one writer. Its directory is append-only JSON lines (one for each metric and for each series) whose used
length is stored after the line itself, so that a reader in another process never parses half a line. Values are
aligned float64 cells. A process that starts again takes its slab over: counters and histograms go on, gauges begin
at zero.

The number of series is bounded twice: per metric (further label values share one series "other") and per slab (what
does not fit is dropped and counted in ``twofold_dropped_series_total``).
"""

import bisect
import mmap
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from router.shm.files import PAGE_BYTES, SharedMemoryError, close_quietly, create_mapped, open_mapped

LAYOUT_VERSION = 1
CELLS = 16384
DIRECTORY_BYTES = 1 << 20
MAX_SERIES = 512
MAX_BUCKETS = 60
MAX_LABEL_CHARS = 128
OTHER = "other"
DROPPED_SERIES = "twofold_dropped_series_total"

MAGIC = b"TWFCOUNT"
HEADER = struct.Struct("<8sIIII")
"""magic, layout version, cells, directory bytes, unused."""
USED_DIRECTORY = 8
USED_CELLS = 9
"""Indices of 64-bit words in the header page."""
_SINK_CELLS = MAX_BUCKETS + 4
"""Cells at the start that nobody reads: values of series that did not fit."""


class FamilyLine(msgspec.Struct, frozen=True, tag_field="t", tag="f", omit_defaults=True):
    """Directory line of a metric."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Cells of one series: one value, or the buckets with +Inf and the sum."""
        return len(self.bounds) + 2 if self.kind == "histogram" else 1


class SeriesLine(msgspec.Struct, frozen=True, tag_field="t", tag="s"):
    """Directory line of one series: its metric, its label values, its first cell."""

    name: str
    values: tuple[str, ...]
    cell: int


DirectoryLine = FamilyLine | SeriesLine
DECODER: msgspec.json.Decoder[DirectoryLine] = msgspec.json.Decoder(DirectoryLine)
_ENCODER = msgspec.json.Encoder()


class Histogram:
    """One histogram series: cells of its buckets (not cumulative, +Inf last) from ``base``, its sum after them."""

    __slots__ = ("base", "bounds", "sum_cell")

    def __init__(self, base: int, bounds: tuple[float, ...]) -> None:
        self.base = base
        self.bounds = bounds
        self.sum_cell = base + len(bounds) + 1


class Family:
    """A metric with its label names; hands out series."""

    def __init__(self, slab: "CounterSlab", line: FamilyLine, max_series: int) -> None:
        self._slab = slab
        self._line = line
        self.max_series = max_series
        self._cells: dict[tuple[str, ...], int] = {}
        self._histograms: dict[tuple[str, ...], Histogram] = {}
        self._stored: set[tuple[str, ...]] = set()

    @property
    def line(self) -> FamilyLine:
        """What the directory says of it."""
        return self._line

    def cell(self, *values: str) -> int:
        """Cell of the series with these label values, for ``inc`` and ``set``; the same for the same values."""
        cell = self._cells.get(values)
        return cell if cell is not None else self._add(values)

    def series(self, *values: str) -> Histogram:
        """The histogram series with these label values, for ``observe``."""
        histogram = self._histograms.get(values)
        if histogram is None:
            histogram = self._histograms[values] = Histogram(self.cell(*values), self._line.bounds)
            if len(self._histograms) > 2 * self.max_series:
                self._histograms.clear()
        return histogram

    def adopt(self, values: tuple[str, ...], cell: int) -> None:
        """Take over a series that the directory already holds."""
        self._cells[values] = cell
        self._stored.add(values)

    def _add(self, values: tuple[str, ...]) -> int:
        if len(values) != len(self._line.labels):
            raise ValueError(f"{self._line.name} has labels {self._line.labels}, got {len(values)} values")
        if self._line.labels and len(self._stored) >= self.max_series - 1:
            stored = (OTHER,) * len(values)
        else:
            stored = tuple(value[:MAX_LABEL_CHARS] for value in values)
        cell = self._cells.get(stored)
        if cell is None:
            cell = self._cells[stored] = self._slab.allocate(self._line, stored)
            self._stored.add(stored)
        # Unbounded label values must not grow this map: what shares "other" is looked up again each time.
        if len(self._cells) < 2 * self.max_series:
            self._cells[values] = cell
        return cell


class CounterSlab:
    """The metrics of one process."""

    def __init__(self, path: Path, file: mmap.mmap) -> None:
        self.path = path
        self._file = file
        _, _, _, directory_bytes, _ = HEADER.unpack_from(file, 0)
        view = memoryview(file)
        self._words = view[:PAGE_BYTES].cast("Q")
        self._directory = view[PAGE_BYTES : PAGE_BYTES + directory_bytes]
        self.cells = view[PAGE_BYTES + directory_bytes :].cast("d")
        """The values; ``slab.cells[cell] += 1.0`` is what ``inc`` does."""
        self._families: dict[str, Family] = {}
        self._dropped = 0
        self._adopt()
        self._dropped = self.counter(DROPPED_SERIES, "Series that did not fit into the counters of a process").cell()

    @classmethod
    def open(cls, path: Path, *, cells: int = CELLS, directory_bytes: int = DIRECTORY_BYTES) -> "CounterSlab":
        """The slab at ``path``, created, or taken over from an earlier life of this process.

        A file of another layout is replaced. Raises SharedMemoryError when there is no room.
        """
        try:
            file = open_mapped(path, writable=True)
            magic, layout, _, _, _ = HEADER.unpack_from(file, 0)
            if magic == MAGIC and layout == LAYOUT_VERSION:
                return cls(path, file)
        except (SharedMemoryError, msgspec.MsgspecError, ValueError):
            pass
        path.unlink(missing_ok=True)
        file = create_mapped(path, PAGE_BYTES + directory_bytes + 8 * cells)
        memoryview(file)[:PAGE_BYTES].cast("Q")[USED_CELLS] = _SINK_CELLS
        HEADER.pack_into(file, 0, MAGIC, LAYOUT_VERSION, cells, directory_bytes, 0)
        return cls(path, file)

    def counter(self, name: str, help_text: str, labels: Sequence[str] = (), *, max_series: int = MAX_SERIES) -> Family:
        """A value that only grows; its name ends in ``_total``. Raises ValueError when defined differently before."""
        return self._family(FamilyLine(name, "counter", help_text, tuple(labels)), max_series)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = (), *, max_series: int = MAX_SERIES) -> Family:
        """A value that goes up and down; summed over processes when rendered."""
        return self._family(FamilyLine(name, "gauge", help_text, tuple(labels)), max_series)

    def histogram(
        self,
        name: str,
        help_text: str,
        bounds: Sequence[float],
        labels: Sequence[str] = (),
        *,
        max_series: int = MAX_SERIES,
    ) -> Family:
        """A distribution over ``bounds`` (ascending upper bounds, at most 60; +Inf is added)."""
        values = tuple(float(bound) for bound in bounds)
        if not values or len(values) > MAX_BUCKETS or any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"{name}: bounds must be 1..{MAX_BUCKETS} ascending numbers")
        return self._family(FamilyLine(name, "histogram", help_text, tuple(labels), values), max_series)

    def inc(self, cell: int, amount: float = 1.0) -> None:
        """Add ``amount`` to a counter or gauge cell."""
        self.cells[cell] += amount

    def set(self, cell: int, value: float) -> None:
        """Set a gauge cell."""
        self.cells[cell] = value

    def observe(self, histogram: Histogram, value: float) -> None:
        """Count ``value`` in its bucket."""
        cells = self.cells
        cells[histogram.base + bisect.bisect_left(histogram.bounds, value)] += 1.0
        cells[histogram.sum_cell] += value

    def allocate(self, family: FamilyLine, values: tuple[str, ...]) -> int:
        """First cell of a new series; the sink (cell 0) when the slab is full."""
        width = family.width
        cell = self._words[USED_CELLS]
        if cell + width > len(self.cells) or not self._append(SeriesLine(family.name, values, cell)):
            self.cells[self._dropped] += 1.0
            return 0
        self._words[USED_CELLS] = cell + width
        return cell

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._words.release()
        self._directory.release()
        self.cells.release()
        close_quietly(self._file)

    def _family(self, line: FamilyLine, max_series: int) -> Family:
        known = self._families.get(line.name)
        if known is not None:
            if known.line != line:
                raise ValueError(f"metric {line.name} is already defined as {known.line}")
            known.max_series = max_series
            return known
        family = self._families[line.name] = Family(self, line, max_series)
        self._append(line)
        return family

    def _append(self, line: DirectoryLine) -> bool:
        encoded = _ENCODER.encode(line) + b"\n"
        used = self._words[USED_DIRECTORY]
        if used + len(encoded) > len(self._directory):
            return False
        self._directory[used : used + len(encoded)] = encoded
        self._words[USED_DIRECTORY] = used + len(encoded)
        return True

    def _adopt(self) -> None:
        used = self._words[USED_DIRECTORY]
        end = _SINK_CELLS
        for text in bytes(self._directory[:used]).splitlines():
            line = DECODER.decode(text)
            if isinstance(line, FamilyLine):
                self._families[line.name] = Family(self, line, MAX_SERIES)
                continue
            family = self._families[line.name]
            family.adopt(line.values, line.cell)
            end = max(end, line.cell + family.line.width)
            if family.line.kind == "gauge":
                self.cells[line.cell] = 0.0
        # Its last life may have died between a line and the word behind it.
        self._words[USED_CELLS] = max(end, self._words[USED_CELLS])
