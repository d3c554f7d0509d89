"""Prometheus text, as the Python client library writes it: histograms, families, samples, numbers."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache

Labels = tuple[tuple[str, str], ...]
Sample = tuple[Labels, float]


class Histogram:
    """Counts per bucket, cumulative only when rendered."""

    __slots__ = ("bounds", "count", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value``."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.count += times
        self.sum += value * times

    def quantile(self, share: float) -> float:
        """Upper bound of the bucket that holds this quantile; the last finite bound at most; 0 when empty."""
        wanted = share * self.count
        seen = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if count and seen >= wanted:
                return bound
        return self.bounds[-1] if self.count else 0.0


class Page:
    """A page of metrics, family by family."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def render(self) -> bytes:
        """The text."""
        return ("\n".join(self._lines) + "\n").encode()

    def gauge(self, name: str, text: str, samples: Iterable[Sample]) -> None:
        """A family of gauges."""
        self._head(name, text, "gauge")
        self._lines += [f"{name}{shown(labels)} {number(value)}" for labels, value in samples]

    def counter(self, name: str, text: str, samples: Sequence[Sample], created_s: Sequence[float] = ()) -> None:
        """A family of counters called ``<name>_total``, and where given the creation time of each sample."""
        total = f"{name}_total"
        self._head(total, text, "counter")
        self._lines += [f"{total}{shown(labels)} {number(value)}" for labels, value in samples]
        if created_s:
            self.created(name, text, [labels for labels, _ in samples], created_s)

    def summary(
        self, name: str, text: str, samples: Sequence[tuple[Labels, int, float]], created_s: Sequence[float]
    ) -> None:
        """A family of summaries without quantiles: (labels, count, sum)."""
        self._head(name, text, "summary")
        for labels, count, total in samples:
            suffix = shown(labels)
            self._lines += [f"{name}_count{suffix} {number(count)}", f"{name}_sum{suffix} {number(total)}"]
        self.created(name, text, [labels for labels, _, _ in samples], created_s)

    def histogram(
        self, name: str, text: str, samples: Sequence[tuple[Labels, Histogram]], created_s: Sequence[float]
    ) -> None:
        """A family of histograms."""
        self._head(name, text, "histogram")
        lines = self._lines
        for labels, histogram in samples:
            total, text_of_total = 0, "0.0"
            for head, count in zip(_buckets(name, labels, histogram.bounds), histogram.counts, strict=True):
                if count:
                    total += count
                    text_of_total = number(total)
                lines.append(head + text_of_total)
            suffix = shown(labels)
            lines += [f"{name}_count{suffix} {text_of_total}", f"{name}_sum{suffix} {number(histogram.sum)}"]
        self.created(name, text, [labels for labels, _ in samples], created_s)

    def created(self, name: str, text: str, labels: Sequence[Labels], created_s: Sequence[float]) -> None:
        """The ``_created`` family that the client library adds; none without samples."""
        if labels:
            self.gauge(f"{name}_created", text, list(zip(labels, created_s, strict=True)))

    def _head(self, name: str, text: str, kind: str) -> None:
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def number(value: float) -> str:
    """A number as the client library writes it: 1.0, +Inf, 1.5e+09 from a million on."""
    if value == float("inf"):
        return "+Inf"
    text = repr(float(value))
    point = text.find(".")
    if value > 0 and point > 6 and "e" not in text:
        return f"{text[0]}.{text[1:point]}{text[point + 1 :]}".rstrip("0.") + f"e+{point - 1:02d}"
    return text


@lru_cache(maxsize=4096)
def _buckets(name: str, labels: Labels, bounds: tuple[float, ...]) -> tuple[str, ...]:
    """The lines of a histogram's buckets without their counts."""
    every = (*bounds, float("inf"))
    return tuple(f"{name}_bucket{shown((*labels, ('le', number(bound))))} " for bound in every)


@lru_cache(maxsize=16384)
def shown(labels: Labels) -> str:
    """Labels in braces, sorted by name; nothing for none."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in sorted(labels)) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
