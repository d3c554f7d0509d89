"""Reads the counters of all processes of a replica and renders their sums in Prometheus' text format (version
0.0.4)."""

from collections.abc import Iterable, Iterator, Set
from itertools import accumulate
from pathlib import Path

import msgspec

from router.shm.counters import (
    DECODER,
    HEADER,
    LAYOUT_VERSION,
    MAGIC,
    USED_DIRECTORY,
    FamilyLine,
    SeriesLine,
)
from router.shm.files import PAGE_BYTES, SharedMemoryError, close_quietly, open_mapped

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class SeriesValue(msgspec.Struct, frozen=True):
    """One series as read: cells are one value, or buckets and sum of a histogram."""

    family: FamilyLine
    values: tuple[str, ...]
    cells: tuple[float, ...]


class SlabReader:
    """Reads the slab of another process; parses only what was added to its directory since."""

    def __init__(self, path: Path) -> None:
        """Raises SharedMemoryError when the file is no slab of this layout."""
        self.path = path
        self.process = path.name.removeprefix("counters.")
        self._file = open_mapped(path, writable=False)
        magic, layout, _, directory_bytes, _ = HEADER.unpack_from(self._file, 0)
        if magic != MAGIC or layout != LAYOUT_VERSION:
            close_quietly(self._file)
            raise SharedMemoryError(f"{path}: no counters of layout {LAYOUT_VERSION}")
        view = memoryview(self._file)
        self._words = view[:PAGE_BYTES].cast("Q")
        self._directory = view[PAGE_BYTES : PAGE_BYTES + directory_bytes]
        self._cells = view[PAGE_BYTES + directory_bytes :].cast("d")
        self._parsed = 0
        self._families: dict[str, FamilyLine] = {}
        self._series: list[SeriesLine] = []

    def read(self) -> list[SeriesValue]:
        """All series with their values now."""
        self._parse()
        found = []
        for line in self._series:
            family = self._families[line.name]
            cells = tuple(self._cells[line.cell : line.cell + family.width])
            found.append(SeriesValue(family, line.values, cells))
        return found

    def families(self) -> list[FamilyLine]:
        """All metrics defined, with or without series."""
        self._parse()
        return list(self._families.values())

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._words.release()
        self._directory.release()
        self._cells.release()
        close_quietly(self._file)

    def _parse(self) -> None:
        used = self._words[USED_DIRECTORY]
        for text in bytes(self._directory[self._parsed : used]).splitlines():
            line = DECODER.decode(text)
            if isinstance(line, FamilyLine):
                self._families[line.name] = line
            else:
                self._series.append(line)
        self._parsed = used


class CounterBook:
    """The counters of all processes below one directory, summed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._readers: dict[Path, tuple[int, SlabReader]] = {}

    def totals(self, dead: Set[str] = frozenset()) -> list[SeriesValue]:
        """Every series summed over the processes, in order of name and labels. Gauges of ``dead`` processes are left
        out; their counters stay, so that sums never fall."""
        sums: dict[tuple[str, tuple[str, ...]], SeriesValue] = {}
        for reader in self._refresh():
            for series in reader.read():
                if series.family.kind == "gauge" and reader.process in dead:
                    continue
                key = (series.family.name, series.values)
                before = sums.get(key)
                if before is None:
                    sums[key] = series
                elif before.family == series.family:
                    cells = tuple(a + b for a, b in zip(before.cells, series.cells, strict=True))
                    sums[key] = SeriesValue(series.family, series.values, cells)
        return [sums[key] for key in sorted(sums)]

    def families(self) -> list[FamilyLine]:
        """All metrics that any process defined, with or without series, by name."""
        found = {family.name: family for reader in self._refresh() for family in reader.families()}
        return [found[name] for name in sorted(found)]

    def close(self) -> None:
        """Unmap everything."""
        for _, reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _refresh(self) -> Iterator[SlabReader]:
        for path in sorted(self._directory.glob("counters.*")):
            try:
                inode = path.stat().st_ino
                known = self._readers.get(path)
                if known is None or known[0] != inode:
                    if known is not None:
                        known[1].close()
                    known = self._readers[path] = (inode, SlabReader(path))
                yield known[1]
            except (SharedMemoryError, OSError):
                continue  # being created at this moment; it is there at the next scrape


def render(series: Iterable[SeriesValue], families: Iterable[FamilyLine] = ()) -> str:
    """``series``, grouped by metric name, as Prometheus text.

    Metrics in ``families`` that have no series are announced, so that one can see what there may be.
    """
    lines: list[str] = []
    name = ""
    seen = set()
    for item in series:
        family = item.family
        if family.name != name:
            name = family.name
            seen.add(name)
            lines.extend(_announcement(family))
        if family.kind == "histogram":
            lines.extend(_histogram_lines(item))
        else:
            lines.append(f"{name}{_labels(family.labels, item.values)} {_number(item.cells[0])}")
    for family in families:
        if family.name not in seen:
            lines.extend(_announcement(family))
    return "\n".join(lines) + "\n" if lines else ""


def quantile(item: SeriesValue, q: float) -> float:
    """The ``q`` quantile of a histogram, linear inside its bucket as Prometheus computes it; 0 when it is empty.
    Values above the last bound count as that bound."""
    buckets, bounds = item.cells[:-1], item.family.bounds
    total = sum(buckets)
    if total <= 0:
        return 0.0
    rank, below = q * total, 0.0
    for index, (count, upper) in enumerate(zip(buckets, bounds, strict=False)):
        if below + count >= rank and count > 0:
            lower = bounds[index - 1] if index else 0.0
            return lower + (upper - lower) * max(0.0, rank - below) / count
        below += count
    return bounds[-1]


def _announcement(family: FamilyLine) -> tuple[str, str]:
    return f"# HELP {family.name} {_escape_help(family.help)}", f"# TYPE {family.name} {family.kind}"


def _histogram_lines(item: SeriesValue) -> Iterator[str]:
    family = item.family
    names = (*family.labels, "le")
    buckets = list(accumulate(item.cells[:-1]))
    for bound, count in zip((*map(_number, family.bounds), "+Inf"), buckets, strict=True):
        yield f"{family.name}_bucket{_labels(names, (*item.values, bound))} {_number(count)}"
    labels = _labels(family.labels, item.values)
    yield f"{family.name}_sum{labels} {_number(item.cells[-1])}"
    yield f"{family.name}_count{labels} {_number(buckets[-1])}"


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{_escape_label(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escape_label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
