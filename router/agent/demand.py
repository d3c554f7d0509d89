"""Demand and top figures of a replica, from the counters of all its processes."""

from collections import deque
from collections.abc import Mapping

import msgspec

from router.shm.counters import FamilyLine
from router.shm.exposition import SeriesValue, quantile
from twofold.model.fleet import Slo
from twofold.v1 import router_pb2 as pb

REQUESTS = "twofold_requests_total"
PROMPT_TOKENS = "twofold_prompt_tokens_total"
CACHED_TOKENS = "twofold_cached_tokens_total"
OUTPUT_EVENTS = "twofold_output_events_total"
INFLIGHT = "twofold_inflight_requests"
TTFT = "twofold_ttft_seconds"
INTER_TOKEN = "twofold_inter_token_seconds"

REJECTED_CODES = ("429", "503")
FAILED_CODES = ("500", "502", "504")
WINDOW_S = 10.0
"""Rates and percentiles of ``top`` cover this time."""


class Sample(msgspec.Struct, frozen=True):
    """All series at one moment (CLOCK_MONOTONIC)."""

    at_s: float
    series: dict[tuple[str, tuple[str, ...]], SeriesValue]


class DemandMeter:
    """Keeps the samples of the last ``WINDOW_S`` seconds; asks for one per demand interval."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self._sent: Sample | None = None

    def add(self, totals: list[SeriesValue], now_s: float) -> None:
        """Take in the sums over all processes as of ``now_s``."""
        self._samples.append(Sample(now_s, {(item.family.name, item.values): item for item in totals}))
        while len(self._samples) > 2 and now_s - self._samples[1].at_s >= WINDOW_S:
            self._samples.popleft()
        if self._sent is None:
            self._sent = self._samples[-1]

    def tick(self, slos: Mapping[str, Slo]) -> pb.DemandTick:
        """What happened since the last tick, per pool of ``slos``; then the next tick begins."""
        if not self._samples or self._sent is None:
            return pb.DemandTick()
        newest, before = self._samples[-1], self._sent
        self._sent = newest
        change = _Change(before, newest)
        tick = pb.DemandTick(interval_s=newest.at_s - before.at_s)
        for pool, slo in slos.items():
            demand = _pool_demand(change, pool, slo)
            if any(value for _, value in demand.ListFields() if not isinstance(value, str)):
                tick.pools.append(demand)
        return tick

    def top(self) -> pb.RouterTop:
        """Figures of the whole replica over the last ``WINDOW_S`` seconds."""
        if len(self._samples) < 2:
            return pb.RouterTop(inflight=round(self._inflight()))
        change = _Change(self._samples[0], self._samples[-1])
        requests = change.sum(REQUESTS)
        prompt_tokens = change.sum(PROMPT_TOKENS)
        errors = sum(change.sum(REQUESTS, code=code) for code in (*REJECTED_CODES, *FAILED_CODES))
        ttft = change.histogram(TTFT)
        return pb.RouterTop(
            inflight=round(self._inflight()),
            requests_per_s=requests / change.seconds,
            output_tokens_per_s=change.sum(OUTPUT_EVENTS) / change.seconds,
            ttft_p50_s=quantile(ttft, 0.5) if ttft else 0.0,
            ttft_p99_s=quantile(ttft, 0.99) if ttft else 0.0,
            hit_ratio=change.sum(CACHED_TOKENS) / prompt_tokens if prompt_tokens else 0.0,
            error_ratio=errors / requests if requests else 0.0,
        )

    def _inflight(self) -> float:
        if not self._samples:
            return 0.0
        return sum(item.cells[0] for (name, _), item in self._samples[-1].series.items() if name == INFLIGHT)


class _Change:
    """What two samples differ by; series that fell (a slab was replaced) count from zero."""

    def __init__(self, before: Sample, after: Sample) -> None:
        self._before = before.series
        self._after = after.series
        self.seconds = max(after.at_s - before.at_s, 1e-9)

    def sum(self, name: str, **labels: str) -> float:
        return sum(cells[0] for _, cells in self._matching(name, labels))

    def histogram(self, name: str, **labels: str) -> SeriesValue | None:
        """The change of all matching histogram series, summed."""
        total: SeriesValue | None = None
        for family, cells in self._matching(name, labels):
            if total is not None:
                cells = tuple(a + b for a, b in zip(total.cells, cells, strict=True))
            total = SeriesValue(family, (), cells)
        return total

    def _matching(self, name: str, labels: Mapping[str, str]) -> list[tuple[FamilyLine, tuple[float, ...]]]:
        found = []
        for key, item in self._after.items():
            if key[0] != name:
                continue
            values = dict(zip(item.family.labels, item.values, strict=True))
            if any(values.get(label) != value for label, value in labels.items()):
                continue
            old = self._before.get(key)
            cells = item.cells
            if old is not None and all(a >= b for a, b in zip(cells, old.cells, strict=True)):
                cells = tuple(a - b for a, b in zip(cells, old.cells, strict=True))
            found.append((item.family, cells))
        return found


def share_below(item: SeriesValue | None, bound: float) -> float:
    """Share of a histogram's values up to ``bound``, linear inside the bucket that holds it; 1 when it is empty."""
    if item is None or not sum(item.cells[:-1]):
        return 1.0
    below, lower = 0.0, 0.0
    for count, upper in zip(item.cells[:-1], item.family.bounds, strict=False):
        if bound < upper:
            below += count * max(0.0, bound - lower) / (upper - lower)
            break
        below += count
        lower = upper
    return below / sum(item.cells[:-1])


def _pool_demand(change: _Change, pool: str, slo: Slo) -> pb.PoolDemand:
    requests = change.sum(REQUESTS, pool=pool)
    rejected = sum(change.sum(REQUESTS, pool=pool, code=code) for code in REJECTED_CODES)
    failed = sum(change.sum(REQUESTS, pool=pool, code=code) for code in FAILED_CODES)
    ttft = change.histogram(TTFT, pool=pool)
    served = sum(ttft.cells[:-1]) if ttft is not None else 0.0
    tpot_share = share_below(change.histogram(INTER_TOKEN, pool=pool), slo.tpot_s)
    return pb.PoolDemand(
        pool=pool,
        requests=round(requests),
        prompt_tokens=round(change.sum(PROMPT_TOKENS, pool=pool)),
        cached_tokens=round(change.sum(CACHED_TOKENS, pool=pool)),
        output_tokens=round(change.sum(OUTPUT_EVENTS, pool=pool)),
        rejected=round(rejected),
        failed=round(failed),
        ttft_within_slo=round(served * share_below(ttft, slo.ttft_s)),
        tpot_within_slo=round(served * tpot_share),
    )
