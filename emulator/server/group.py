"""The engines behind one port, one a data-parallel rank: which of them takes a request, and whether any does.

The choice among ranks is vLLM's internal load balancer (``DPLBAsyncMPClient`` of ``v1/engine/core_client.py``): lowest
``max(requests in flight, waiting + running) + 6 * waiting * max(0, KV usage - 0.5)``, where the second figure is at
most 100 ms old, and the scan for it begins one rank further each time.
"""

from collections.abc import Callable

from emulator.model import Adapter, FinishReason, Request
from emulator.server.engine import PauseMode, RealTimeEngine, Sink
from emulator.server.errors import ApiError
from emulator.server.kv_transfer import KvConnector
from emulator.server.metrics import Siblings

STATISTICS_AGE_S = 0.1
QUEUE_FULL = (
    "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
)
TOKENS_FULL = (
    "The engine has reached its prefill token backlog limit. Please try again later or on a different instance."
)


class EngineGroup:
    """The ranks of one port. ``count_rejection`` is told the limit that a refused request ran into."""

    def __init__(
        self,
        ranks: list[RealTimeEngine],
        *,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
        count_rejection: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.ranks = ranks
        self.dead = False
        self.connector: KvConnector | None = None
        """Set where other engines may pull this one's KV blocks."""
        self._max_queued_requests = max_queued_requests
        self._max_queued_tokens = max_queued_tokens
        self._count_rejection = count_rejection
        self._first = 0
        self._seen: list[tuple[int, int, float]] = []
        self._seen_s = float("-inf")

    @property
    def busy(self) -> bool:
        """Whether any rank has requests unfinished or tokens undelivered."""
        return any(rank.busy for rank in self.ranks)

    @property
    def unfinished(self) -> int:
        """Requests whose end nobody has been told."""
        return sum(rank.unfinished for rank in self.ranks)

    def check_admission(self, n: int) -> None:
        """Refuse a call of ``n`` sequences that a queue limit does not let in. Raises ApiError (503)."""
        if self._max_queued_requests is not None and self.unfinished + n > self._max_queued_requests:
            self._count_rejection("max_num_queued_reqs")
            raise ApiError(QUEUE_FULL, status=503, type_="Service Unavailable")
        limit = self._max_queued_tokens
        if limit is not None and sum(rank.prefilling_tokens for rank in self.ranks) >= limit:
            self._count_rejection("max_num_queued_tokens")
            raise ApiError(TOKENS_FULL, status=503, type_="Service Unavailable")

    def choose(self) -> RealTimeEngine:
        """The rank for a request that is not pinned to one."""
        ranks = self.ranks
        if len(ranks) == 1:
            return ranks[0]
        now_s = ranks[0].now_s
        if now_s - self._seen_s >= STATISTICS_AGE_S or len(self._seen) != len(ranks):
            loads = [rank.metrics.load for rank in ranks]
            self._seen = [(load.waiting, load.running, load.kv_usage) for load in loads]
            self._seen_s = now_s
        best, lowest = 0, float("inf")
        for offset in range(len(ranks)):
            index = (self._first + offset) % len(ranks)
            waiting, running, kv_usage = self._seen[index]
            score = max(ranks[index].unfinished, waiting + running) + 6.0 * waiting * max(0.0, kv_usage - 0.5)
            if score < lowest:
                best, lowest = index, score
        waiting, running, kv_usage = self._seen[best]
        self._seen[best] = (waiting + 1, running, kv_usage)
        self._first = (self._first + 1) % len(ranks)
        return ranks[best]

    def pause(self, mode: PauseMode, *, clear_cache: bool, done: Callable[[], None]) -> None:
        """Pause every rank; ``done`` is called once nothing runs on any."""
        left = len(self.ranks)

        def one_done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                done()

        for rank in list(self.ranks):
            rank.pause(mode, clear_cache=clear_cache, done=one_done)

    def resume(self) -> None:
        """End a pause of every rank."""
        for rank in self.ranks:
            rank.resume()

    @property
    def paused(self) -> bool:
        """Whether the first rank is paused: vLLM asks that one alone."""
        return self.ranks[0].paused

    def kill(self) -> None:
        """Every engine core dies."""
        self.dead = True
        for rank in self.ranks:
            rank.kill()


class Lane:
    """The way of one call to the engines: a rank of its own or the balancer's choice for each sequence, an adapter."""

    __slots__ = ("_adapter", "_group", "_placed", "_rank", "_siblings", "stream_interval_tokens")

    def __init__(self, group: EngineGroup, rank: int | None = None, adapter: Adapter | None = None) -> None:
        self._group = group
        self._rank = rank
        self._adapter = adapter
        self._placed: dict[str, RealTimeEngine] = {}
        self._siblings: Siblings | None = None
        self.stream_interval_tokens = group.ranks[0].stream_interval_tokens

    @property
    def now_s(self) -> float:
        """The engines' clock."""
        return self._group.ranks[0].now_s

    @property
    def connector(self) -> KvConnector | None:
        """What the engines say of blocks that others may pull; None without a connector."""
        return self._group.connector

    @property
    def adapter(self) -> Adapter | None:
        """The adapter of the call."""
        return self._adapter

    def submit(self, request: Request, sink: Sink, n: int = 1) -> None:
        """Queue a sequence. ``n``: how many its prompt has; they are to be submitted one after the other."""
        ranks = self._group.ranks
        rank = ranks[self._rank] if self._rank is not None and self._rank < len(ranks) else self._group.choose()
        if self._adapter is not None:
            request.use_adapter(self._adapter)
        if n > 1 and (self._siblings is None or not self._siblings.open):
            self._siblings = Siblings(n)
        siblings = self._siblings if n > 1 else None
        if siblings is not None:
            siblings.open -= 1
        self._placed[request.request_id] = rank
        rank.submit(request, sink, siblings)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End a sequence now; its sink hears nothing more."""
        rank = self._placed.get(request_id)
        return rank.finish(request_id, reason) if rank is not None else None

    def abort(self, request_id: str) -> bool:
        """End a sequence by the abort call: its sink gets the reason "abort". False if there is no such sequence."""
        rank = self._placed.get(request_id)
        return rank is not None and rank.abort(request_id)
