"""Figures of a run: records of requests, percentiles, attainment, goodput."""

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from twofold.model.fleet import Slo


class Record(msgspec.Struct, kw_only=True, gc=False):
    """One request. Times are seconds from the start of the run, 0 where it did not get so far."""

    request_id: str
    label: str
    due_s: float
    sent_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    end_s: float = 0.0
    prompt_tokens: int = 0
    """As counted here, by the built-in tokenizer."""
    usage_prompt_tokens: int = 0
    """As counted by the engine; 0 where it did not say."""
    cached_tokens: int = -1
    """As counted by the engine; -1 where it did not say."""
    output_tokens: int = 0
    verified_tokens: int = 0
    error: str = ""
    """Kind of error, "" for a complete answer."""
    violation: str = ""
    """What was wrong with the tokens of the answer."""
    target: str = ""
    """Opaque id of the worker, where the router says it."""

    @property
    def ok(self) -> bool:
        """Whether the answer came completely."""
        return not self.error

    @property
    def ttft_s(self) -> float:
        """Seconds from the moment the request was due, not from when a late generator sent it."""
        return self.first_s - self.due_s

    @property
    def e2e_s(self) -> float:
        """Seconds from due to the end of the answer."""
        return self.end_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token after the first; None with fewer than two tokens."""
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def within(self, slo: Slo) -> bool:
        """Whether the request met the latency target; a failed one did not."""
        if self.error or self.output_tokens == 0:
            return False
        tpot_s = self.tpot_s
        return self.ttft_s <= slo.ttft_s and (tpot_s is None or tpot_s <= slo.tpot_s)


class LogHistogram:
    """Counts of positive durations in buckets that grow by 2 %: quantiles within 1 %, bounded memory."""

    RATIO = 1.02
    SMALLEST_S = 1e-6
    BUCKETS = 1200

    def __init__(self) -> None:
        self._counts = [0] * self.BUCKETS
        self.count = 0
        self._scale = 1.0 / math.log(self.RATIO)

    def add(self, value_s: float) -> None:
        """Count one duration; anything under a microsecond counts as one."""
        index = int(math.log(value_s * 1e6) * self._scale) if value_s > self.SMALLEST_S else 0
        self._counts[index if index < self.BUCKETS else self.BUCKETS - 1] += 1
        self.count += 1

    def quantile(self, q: float) -> float | None:
        """Nearest-rank quantile in seconds (the middle of its bucket); None when empty."""
        if not self.count:
            return None
        rank = max(1, math.ceil(q * self.count))
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                return float(self.SMALLEST_S * self.RATIO ** (index + 0.5))
        raise AssertionError("counts and their sum disagree")


def quantile(values: Sequence[float], q: float) -> float | None:
    """Quantile with linear interpolation between ranks; None when empty."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), q)) if len(values) else None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. Ratios are 0..1, times seconds; None where nothing was measured."""

    requests: int
    completed: int
    errors: int
    errors_by_kind: dict[str, int]
    chain_violations: int
    tokens_delivered: int
    tokens_verified: int
    prompt_tokens: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p90_s: float | None
    itl_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p90_s: float | None
    e2e_p99_s: float | None
    attainment: float | None
    goodput_rps: float
    lateness_p99_s: float
    hit_ratio: float | None


def summarise(records: Sequence[Record], gaps: LogHistogram, slo: Slo) -> Figures:
    """Figures of the finished requests of a run. Errors count as missed in attainment and are in no latency."""
    good = [record for record in records if record.ok]
    begun = [record for record in good if record.output_tokens]
    ttft = [record.ttft_s for record in begun]
    e2e = [record.e2e_s for record in good]
    tpot = [value for record in begun if (value := record.tpot_s) is not None]
    sent = [record for record in records if record.sent_s]
    start_s = min((record.due_s for record in records), default=0.0)
    duration_s = max((record.end_s for record in records), default=0.0) - start_s
    within = sum(record.within(slo) for record in records)
    output_tokens = sum(record.output_tokens for record in records)
    per_s = 1.0 / duration_s if duration_s > 0 else 0.0
    reported = [record for record in good if record.cached_tokens >= 0 and record.usage_prompt_tokens > 0]
    asked = sum(record.usage_prompt_tokens for record in reported)
    return Figures(
        requests=len(records),
        completed=len(good),
        errors=len(records) - len(good),
        errors_by_kind=dict(sorted(Counter(record.error for record in records if record.error).items())),
        chain_violations=sum(bool(record.violation) for record in records),
        tokens_delivered=output_tokens,
        tokens_verified=sum(record.verified_tokens for record in records),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        duration_s=duration_s,
        requests_per_s=len(good) * per_s,
        output_tokens_per_s=output_tokens * per_s,
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p90_s=quantile(ttft, 0.9),
        ttft_p99_s=quantile(ttft, 0.99),
        itl_p50_s=gaps.quantile(0.5),
        itl_p90_s=gaps.quantile(0.9),
        itl_p99_s=gaps.quantile(0.99),
        tpot_p50_s=quantile(tpot, 0.5),
        tpot_p99_s=quantile(tpot, 0.99),
        e2e_p50_s=quantile(e2e, 0.5),
        e2e_p90_s=quantile(e2e, 0.9),
        e2e_p99_s=quantile(e2e, 0.99),
        attainment=within / len(records) if records else None,
        goodput_rps=within * per_s,
        lateness_p99_s=quantile([max(0.0, record.sent_s - record.due_s) for record in sent], 0.99) or 0.0,
        hit_ratio=sum(record.cached_tokens for record in reported) / asked if asked else None,
    )
