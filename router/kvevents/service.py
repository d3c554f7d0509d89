"""The agent's side of KV events: finds the engines' sources, starts and feeds the subscriber, keeps to the budgets."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from router.kvevents.plan import (
    REST_S,
    PoolPlan,
    PoolState,
    RateBudget,
    feed_specs,
    plan_pools,
    pools_with_events,
)
from router.kvevents.source import Source, SourceError, parse_sources
from router.kvevents.store import IndexStore
from router.kvevents.subscriber import FeedStatus, Subscriber, totals
from router.routing.table import RoutingTable
from router.shm.counters import FamilyLine
from router.shm.exposition import SeriesValue
from router.shm.files import SharedMemoryError
from twofold.model.fleet import Health

log = logging.getLogger(__name__)

TURN_S = 1.0
RETRY_S = 5.0
ASK_AGAIN_S = 60.0
"""A worker that says it publishes nothing is asked again after this time, as is one that does."""
REQUEST_TIMEOUT_S = 3.0
MAX_ANSWER_BYTES = 1 << 20
MAX_LISTED = 50


class _Worker(msgspec.Struct, kw_only=True):
    """What is known of one worker's sources."""

    url: str
    incarnation: int
    sources: Mapping[int, Source] = {}
    due_s: float = 0.0
    problem: str = ""
    asking: bool = False


class KvEvents:
    """Runs beside the agent's other jobs; ``set_table`` whenever a routing table is published."""

    def __init__(
        self,
        directory: Path,
        slots: int,
        *,
        max_blocks: int,
        max_blocks_per_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = IndexStore(directory, slots, max_blocks)
        self._max_blocks = max_blocks
        self._budget = RateBudget(max_blocks_per_s)
        self._clock = clock
        self._table: RoutingTable | None = None
        self._wake = asyncio.Event()
        self._workers: dict[str, _Worker] = {}
        self._resting: dict[str, float] = {}
        self._plans: list[PoolPlan] = []
        self._subscriber: Subscriber | None = None
        self._start_due_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    def set_table(self, table: RoutingTable) -> None:
        """The routing table in force."""
        self._table = table
        self._wake.set()

    async def run(self) -> None:
        """Follow the engines' events, for ever."""
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TURN_S if self._workers or self._tasks else None):
                        await self._wake.wait()
                self._wake.clear()
                self._turn()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._session is not None:
                await self._session.close()
            if self._subscriber is not None:
                await asyncio.to_thread(self._subscriber.stop)
                self._store.remove()

    def _turn(self) -> None:
        table = self._table
        if table is None or not (pools_with_events(table) or self._subscriber):
            return
        now_s = self._clock()
        subscriber = self._subscriber
        if subscriber is not None:
            if subscriber.failure is not None:
                # A new one begins with what the engines' buffers still hold.
                log.error("following KV events anew")
                self._subscriber = subscriber = None
                self._start_due_s = now_s + RETRY_S
            else:
                self._rest(self._budget.observe(subscriber.status(), now_s), now_s)
        self._know_workers(table)
        before = {plan.pool: plan.state for plan in self._plans}
        self._plans = plan_pools(table, self._resting, now_s, self._max_blocks)
        for plan in self._plans:
            if before.get(plan.pool) is not plan.state:
                level = logging.INFO if plan.state is PoolState.FOLLOWED else logging.WARNING
                extra = {"pool": plan.pool, "state": plan.state.value, "blocks": plan.capacity_blocks}
                log.log(level, "KV events of a pool", extra=extra)
        self._ask_workers(now_s)
        if subscriber is None and now_s >= self._start_due_s:
            subscriber = self._start()
        if subscriber is not None:
            sources = {worker_id: worker.sources for worker_id, worker in self._workers.items()}
            subscriber.follow(feed_specs(table, self._plans, sources))

    def _start(self) -> Subscriber | None:
        followed = [plan for plan in self._plans if plan.state is PoolState.FOLLOWED and plan.targets]
        if not followed:
            return None
        try:
            index = self._store.create(sum(plan.capacity_blocks for plan in followed))
        except SharedMemoryError as error:
            log.error("no index of cached blocks", extra={"cause": str(error)})
            return None
        self._subscriber = Subscriber(index, grow=self._store.grow)
        self._subscriber.start()
        return self._subscriber

    def _rest(self, pool: str | None, now_s: float) -> None:
        if pool is not None:
            self._resting[pool] = now_s + REST_S
        self._resting = {name: until_s for name, until_s in self._resting.items() if until_s > now_s}

    def _know_workers(self, table: RoutingTable) -> None:
        pools = {pool.name for pool in pools_with_events(table)}
        known = self._workers
        self._workers = {}
        for target in table.snapshot.targets:
            if target.pool not in pools or target.health is Health.GONE:
                continue
            worker = known.get(target.worker_id)
            if worker is None or (worker.url, worker.incarnation) != (target.url, target.incarnation):
                worker = _Worker(url=target.url, incarnation=target.incarnation)
            self._workers[target.worker_id] = worker

    def _ask_workers(self, now_s: float) -> None:
        for worker in self._workers.values():
            if worker.due_s > now_s or worker.asking:
                continue
            worker.asking = True
            task = asyncio.get_running_loop().create_task(self._ask(worker), name="kv-event-sources")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, worker: _Worker) -> None:
        try:
            worker.sources = parse_sources(await self._get(worker.url.rstrip("/") + "/kv_event_sources"), worker.url)
            worker.problem = "" if worker.sources else "publishes no KV events"
            worker.due_s = self._clock() + ASK_AGAIN_S
        except (aiohttp.ClientError, OSError, TimeoutError, SourceError, ValueError) as error:
            # What it said before holds on: an engine that is slow to answer may publish all the same.
            problem = f"{type(error).__name__}: {error}"[:200]
            if problem != worker.problem:
                log.warning("KV event sources unknown", extra={"url": worker.url, "cause": problem})
            worker.problem = problem
            worker.due_s = self._clock() + RETRY_S
        finally:
            worker.asking = False
        self._wake.set()

    async def _get(self, url: str) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
                connector=aiohttp.TCPConnector(limit=64, force_close=True),
                headers={"accept-encoding": "identity"},
                auto_decompress=False,
            )
        async with self._session.get(url, allow_redirects=False) as reply:
            body = await reply.content.read(MAX_ANSWER_BYTES)
            if reply.status != 200:
                raise SourceError(f"/kv_event_sources answered {reply.status}")
            return body

    @property
    def _statuses(self) -> tuple[FeedStatus, ...]:
        return self._subscriber.status() if self._subscriber is not None else ()

    def state(self) -> dict[str, Any]:
        """For ``/debug/state``: budgets, pools, and every target without an exact view (at most MAX_LISTED)."""
        statuses, subscriber = self._statuses, self._subscriber
        index = subscriber.index if subscriber is not None else None
        return {
            "pools": {
                plan.pool: {
                    "state": plan.state.value,
                    "targets": plan.targets,
                    "capacity_blocks": plan.capacity_blocks,
                    "blocks_per_s": round(self._budget.rates.get(plan.pool, 0.0), 1),
                }
                for plan in self._plans
            },
            "index": {
                "blocks": index.blocks,
                "distinct_blocks": index.distinct_blocks,
                "capacity_blocks": index.capacity,
                "max_blocks": self._max_blocks,
                "holes": index.holes,
            }
            if index is not None
            else None,
            "targets": dict(Counter(status.state.value for status in statuses)),
            "not_exact": [
                {
                    "target_id": status.target_id,
                    "state": status.state.value,
                    "next_sequence": status.next_sequence,
                    "pending": status.pending,
                }
                for status in statuses
                if status.state.value != "exact"
            ][:MAX_LISTED],
            "problems": {worker_id: worker.problem for worker_id, worker in self._workers.items() if worker.problem},
        }

    def series(self) -> list[SeriesValue]:
        """For ``/metrics``."""
        subscriber, statuses = self._subscriber, self._statuses
        found: list[SeriesValue] = []

        def add(name: str, kind: str, text: str, value: float, **labels: str) -> None:
            found.append(SeriesValue(FamilyLine(name, kind, text, tuple(labels)), tuple(labels.values()), (value,)))

        for plan in self._plans:
            text = "Whether the KV events of a pool are followed; by state, and why not"
            add("twofold_kv_events_pool", "gauge", text, 1.0, pool=plan.pool, state=plan.state.value)
        if subscriber is None:
            return found
        for (pool, state), count in sorted(Counter((s.pool, s.state.value) for s in statuses).items()):
            text = "Targets by what is known of their caches"
            add("twofold_kv_events_targets", "gauge", text, float(count), pool=pool, state=state)
        for name, value in totals(statuses).items():
            add(f"twofold_kv_events_{name}_total", "counter", _HELP[name], float(value))
        index = subscriber.index
        add("twofold_kv_index_blocks", "gauge", "Cached blocks known", float(index.blocks))
        add("twofold_kv_index_capacity_blocks", "gauge", "Cached blocks that there is room for", float(index.capacity))
        add("twofold_kv_index_holes", "gauge", "Blocks known whose predecessor is not", float(index.holes))
        text = "Removals of blocks that were not known"
        add("twofold_kv_index_unknown_removals_total", "counter", text, float(index.unknown_removals))
        add("twofold_kv_events_cpu_seconds_total", "counter", "CPU time of the subscriber", subscriber.cpu_s)
        return found


_HELP = {
    "batches": "Batches of KV events taken in",
    "blocks": "Blocks stored and removed by KV events",
    "duplicates": "Batches that had been seen before",
    "gaps": "Gaps in the streams of KV events",
    "garbage": "Messages that were no KV events",
    "healed": "Times that waiting batches found their predecessors",
    "ignored": "Events of other media or cache groups",
    "restarts": "Restarts of engines seen in their events",
    "verified": "Chains whose block hashes were computed again",
}
