"""What a relay counts. Hot-path figures are plain adds into shared memory; the agent renders them for all relays."""

from bisect import bisect_left

from router.shm.counters import CounterSlab, Histogram
from twofold.model.histogram import END_TO_END_S, INTER_TOKEN_S, OVERHEAD_S, TTFT_S

MAX_POOLS = 200
LIMITS = (
    "attempts",
    "body_bytes",
    "body_timeout",
    "buffered_bytes",
    "client_stall",
    "concurrent_connects",
    "connections",
    "event_bytes",
    "head_bytes",
    "head_timeout",
    "headers",
    "hold_response_bytes",
    "pipelined_bytes",
    "requests",
    "retry_budget",
    "worker_connections",
)
"""Bounds whose being reached is counted; most are named like the setting that sets them."""


class PoolMetrics:
    """Series of one pool, looked up once."""

    __slots__ = (
        "_above_s",
        "_cells",
        "_codes",
        "_gap",
        "_gap_cell",
        "_pool",
        "_requests",
        "_up_to_s",
        "cached_tokens",
        "decisions",
        "duration",
        "events",
        "inflight",
        "prompt_tokens",
        "ttft",
    )

    def __init__(self, metrics: "RelayMetrics", pool: str) -> None:
        self._cells = metrics.slab.cells
        self._requests = metrics.requests
        self._pool = pool
        self._codes: dict[int, int] = {}
        self.ttft = metrics.ttft.series(pool)
        self._gap = metrics.inter_token.series(pool)
        self._place(0.0)
        self.duration = metrics.duration.series(pool)
        self.inflight = metrics.inflight.cell(pool)
        self.events = metrics.output_events.cell(pool)
        self.prompt_tokens = metrics.prompt_tokens.cell(pool)
        self.cached_tokens = metrics.cached_tokens.cell(pool)
        self.decisions = metrics.decisions.cell(pool)

    def add(self, cell: int, amount: float = 1.0) -> None:
        """Add to a counter or gauge cell."""
        self._cells[cell] += amount

    def observe(self, histogram: Histogram, value_s: float) -> None:
        """Count one value."""
        cells = self._cells
        cells[histogram.base + bisect_left(histogram.bounds, value_s)] += 1.0
        cells[histogram.sum_cell] += value_s

    def dispatched(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A request was sent to the worker decided on first."""
        cells = self._cells
        cells[self.prompt_tokens] += prompt_tokens
        cells[self.cached_tokens] += cached_tokens

    def answered(self, code: int, duration_s: float) -> None:
        """A request in progress is over, with HTTP status ``code``."""
        cells = self._cells
        cells[self.inflight] -= 1.0
        duration = self.duration
        cells[duration.base + bisect_left(duration.bounds, duration_s)] += 1.0
        cells[duration.sum_cell] += duration_s
        cell = self._codes.get(code)
        if cell is None:
            cell = self._codes[code] = self._requests.cell(self._pool, str(code))
        cells[cell] += 1.0

    def output(self, events: int, gap_s: float) -> None:
        """``events`` arrived together, ``gap_s`` after those before them: each took an equal part of the gap."""
        cells = self._cells
        cells[self.events] += events
        each_s = gap_s / events
        if not self._above_s < each_s <= self._up_to_s:
            self._place(each_s)
        cells[self._gap_cell] += events
        cells[self._gap.sum_cell] += gap_s

    def _place(self, gap_s: float) -> None:
        """Go over to the bucket of ``gap_s``; the next gap most likely falls into the same."""
        gap = self._gap
        bucket = bisect_left(gap.bounds, gap_s)
        self._gap_cell = gap.base + bucket
        self._above_s = gap.bounds[bucket - 1] if bucket else float("-inf")
        self._up_to_s = gap.bounds[bucket] if bucket < len(gap.bounds) else float("inf")


class RelayMetrics:
    """All series of one relay process."""

    def __init__(self, slab: CounterSlab) -> None:
        self.slab = slab
        counter, gauge, histogram = slab.counter, slab.gauge, slab.histogram
        self.requests = counter(
            "twofold_requests_total",
            "Requests answered, by pool and HTTP status (499: the client left)",
            ("pool", "code"),
        )
        self.duration = histogram(
            "twofold_request_duration_seconds",
            "From the request's arrival to the end of its response",
            END_TO_END_S,
            ("pool",),
            max_series=MAX_POOLS,
        )
        self.ttft = histogram(
            "twofold_ttft_seconds",
            "From a streamed request's arrival to its first event",
            TTFT_S,
            ("pool",),
            max_series=MAX_POOLS,
        )
        self.inter_token = histogram(
            "twofold_inter_token_seconds",
            "Between successive events of a stream",
            INTER_TOKEN_S,
            ("pool",),
            max_series=MAX_POOLS,
        )
        self.inflight = gauge("twofold_inflight_requests", "Requests in progress", ("pool",), max_series=MAX_POOLS)
        self.output_events = counter(
            "twofold_output_events_total",
            "Output tokens delivered: events of streams, usage of other responses",
            ("pool",),
            max_series=MAX_POOLS,
        )
        self.prompt_tokens = counter(
            "twofold_prompt_tokens_total", "Prompt tokens routed, estimated from bytes", ("pool",), max_series=MAX_POOLS
        )
        self.cached_tokens = counter(
            "twofold_cached_tokens_total",
            "Prompt tokens expected in the chosen target's cache, estimated",
            ("pool",),
            max_series=MAX_POOLS,
        )
        self.decisions = counter(
            "twofold_decisions_total", "Routing decisions, retries included", ("pool",), max_series=MAX_POOLS
        )
        self._exact_prefixes = counter(
            "twofold_exact_prefixes_total",
            "Requests whose block hashes were wanted, by what became of it",
            ("pool", "outcome"),
        )
        self.decision = histogram(
            "twofold_decision_seconds", "Time to parse a request, hash its prompt and decide", OVERHEAD_S
        ).series()
        self.retries = counter(
            "twofold_retries_total", "Attempts repeated before the first byte, by cause", ("reason",)
        )
        self.rejects = counter(
            "twofold_rejects_total", "Requests answered with an error by the router", ("reason", "code")
        )
        limits = counter("twofold_limit_hits_total", "Times that a bound of a relay was reached, by bound", ("limit",))
        self._limits = {limit: limits.cell(limit) for limit in LIMITS}
        self.failures = counter("twofold_upstream_failures_total", "Attempts that failed, by kind", ("kind",))
        self.disconnects = counter(
            "twofold_client_disconnects_total", "Clients that left before the end of their response"
        ).cell()
        self.connections = gauge("twofold_client_connections", "Open client connections").cell()
        self._pools: dict[str, PoolMetrics] = {}

    def pool(self, name: str) -> PoolMetrics:
        """The series of a pool."""
        found = self._pools.get(name)
        if found is None:
            if len(self._pools) > 4 * MAX_POOLS:
                self._pools.clear()
            found = self._pools[name] = PoolMetrics(self, name)
        return found

    def reject(self, reason: str, code: int) -> None:
        """Count an error made by the router, answered with HTTP status ``code``."""
        self.slab.inc(self.rejects.cell(reason, str(code)))

    def limit_hit(self, limit: str, times: int = 1) -> None:
        """Count that one of LIMITS was reached."""
        self.slab.inc(self._limits[limit], times)

    def exact_prefix(self, pool: str, outcome: str) -> None:
        """Count a request whose block hashes were wanted."""
        self.slab.inc(self._exact_prefixes.cell(pool, outcome))

    def request(self, pool: str, code: int) -> None:
        """Count an answered request."""
        self.slab.inc(self.requests.cell(pool, str(code)))
