"""What all requests of a relay share."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from router.http.limits import BufferBudget
from router.relay.decisions import DecisionLog
from router.relay.fleet import RelayFleet
from router.relay.retry import RetryBudget
from router.relay.settings import RelaySettings
from router.relay.upstream import UpstreamPool
from router.telemetry.metrics import RelayMetrics
from router.tokens.exact import ExactPrefixes

if TYPE_CHECKING:
    from router.relay.exchange import Exchange

log = logging.getLogger(__name__)


class RelayContext:
    """Settings, clocks, shared pools and counters of one relay process."""

    def __init__(
        self,
        settings: RelaySettings,
        fleet: RelayFleet,
        metrics: RelayMetrics,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.fleet = fleet
        self.metrics = metrics
        self.clock = clock
        self.wall_clock = wall_clock
        self.budget = BufferBudget(settings.max_buffered_bytes)
        self.retries = RetryBudget(settings.retry_burst)
        self.decisions = DecisionLog(settings.decisions_kept, wall_clock)
        self.upstream = UpstreamPool(
            max_idle_per_worker=settings.worker_connections,
            max_head_bytes=settings.max_response_head_bytes,
            idle_s=settings.worker_idle_s,
            clock=clock,
        )
        self.exact = ExactPrefixes(lambda: fleet.kv, metrics.exact_prefix)
        self.exchanges: set[Exchange] = set()
        """Requests in progress."""
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine to its end; a failure is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task failed", exc_info=error)
