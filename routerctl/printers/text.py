"""Tables and numbers as text."""

import datetime
import math
from collections.abc import Iterable, Sequence

import msgspec
from rich.cells import cell_len

NOTHING = "-"
_GAP = "   "


class Column(msgspec.Struct, frozen=True):
    """Head of a column; ``number`` columns are aligned to the right, ``wide`` ones are shown on request."""

    title: str
    number: bool = False
    wide: bool = False


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of text under columns; every row has one cell per column. ``empty`` is shown when there is no row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    empty: str = "nothing found"

    def narrowed(self, *, wide: bool) -> "Table":
        """The table without its wide columns, unless ``wide``."""
        if wide:
            return self
        keep = [index for index, column in enumerate(self.columns) if not column.wide]
        return Table(
            columns=tuple(self.columns[index] for index in keep),
            rows=tuple(tuple(row[index] for index in keep) for row in self.rows),
            empty=self.empty,
        )


def render(table: Table, *, wide: bool = False, indent: str = "") -> str:
    """The table as lines of text without trailing spaces, the last one ended."""
    table = table.narrowed(wide=wide)
    if not table.rows:
        return f"{indent}{table.empty}\n"
    lines = [tuple(column.title for column in table.columns)]
    lines += [tuple(printable(cell) or NOTHING for cell in row) for row in table.rows]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    return "".join(indent + _line(cells, table.columns, widths) + "\n" for cells in lines)


def pairs(items: Sequence[tuple[str, str]], *, indent: str = "") -> str:
    """``label: value`` lines with the values in one column."""
    width = max(len(label) for label, _ in items) + 1
    return "".join(f"{indent}{label + ':':<{width}} {printable(value) or NOTHING}\n" for label, value in items)


def printable(text: str) -> str:
    """Text from elsewhere with control and other unprintable characters escaped: it cannot steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def number(value: float) -> str:
    """A count with thousands separated."""
    return f"{value:,.0f}" if math.isfinite(value) else NOTHING


def rate(value: float) -> str:
    """A count per second, with a decimal while it is small."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def duration(value_s: float) -> str:
    """Seconds with a unit: 12 ms, 1.234 s, 5m12s, 3h04m, 2d03h."""
    if not math.isfinite(value_s):
        return NOTHING
    if value_s < 0:
        return "-" + duration(-value_s)
    if value_s == 0:
        return "0 s"
    if value_s < 0.9995:
        return f"{value_s * 1000:.3g} ms"
    if value_s < 120:
        return f"{value_s:.2f} s"
    whole = round(value_s)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def priced(value_s: float) -> str:
    """Seconds with a fixed number of decimals, for columns that are compared."""
    return f"{value_s:.4f}" if math.isfinite(value_s) else NOTHING


def share(value: float) -> str:
    """A ratio as a percentage."""
    return f"{value:.1%}" if math.isfinite(value) else NOTHING


def moment(at_s: float) -> str:
    """Wall-clock seconds as UTC time; "-" for none."""
    if not math.isfinite(at_s) or at_s <= 0:
        return NOTHING
    try:
        when = datetime.datetime.fromtimestamp(at_s, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        return NOTHING
    return when.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def age(at_s: float, now_s: float) -> str:
    """Time since a moment; "-" for none."""
    return duration(max(0.0, now_s - at_s)) if math.isfinite(at_s) and at_s > 0 else NOTHING


def listed(items: Iterable[str]) -> str:
    """Names separated by commas."""
    return ", ".join(items)


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        space = " " * (width - cell_len(cell))
        padded.append(space + cell if column.number else cell + space)
    return _GAP.join(padded).rstrip()
