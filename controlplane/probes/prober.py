"""When which worker is probed: often while something is unsure, rarely while routers report that all is well."""

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from controlplane.fleet.events import ProbeResult
from controlplane.fleet.values import ProbeOutcome, RankSample, WorkerRecord
from controlplane.probes.client import Finding, ProbeClient, samples
from twofold.model.fleet import EngineFacts, Health
from twofold.runtime.monitor import WindowMax

log = logging.getLogger(__name__)

JITTER = 0.2
FACTS_EVERY_S = 60.0
MAX_CONCURRENT = 512
MAX_PER_S = 500.0
"""Workers in one state (see Intervals) are probed at most this often together; where they are more, each less often."""


class Intervals(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds between two probes of a worker."""

    unsure: float = 0.5
    """Starting, suspect, or the last probe failed."""
    unreported: float = 1.0
    """Healthy, but no router says so; or reconfiguring, or not moving while it has work."""
    reported: float = 5.0
    """Healthy, and routers report what they see of it."""
    gone: float = 5.0


class Plan(msgspec.Struct, kw_only=True):
    """One worker's place in the schedule."""

    worker_id: str
    url: str
    model: str
    due_s: float
    sequence: int = 0
    entry: int = 0
    """Number of its valid heap entry; older entries of the worker are stale."""
    running: bool = False
    state: str = ""
    """Field of Intervals that it was scheduled by last."""
    facts_s: float = -1e18
    facts: EngineFacts | None = None
    engine_started: int = 0


_INTERVALS = Intervals()


class Prober:
    """Probes every worker given by ``set_workers`` and hands each result to ``report``.

    ``record`` returns what is known of a worker; ``inflight(target_id)`` what routers have on it: (in flight,
    unanswered); ``routers_report`` whether any router reports at all. At most one probe per worker is in flight.
    """

    def __init__(
        self,
        client: ProbeClient,
        report: Callable[[ProbeResult], None],
        record: Callable[[str], WorkerRecord | None],
        inflight: Callable[[str], tuple[int, int]],
        routers_report: Callable[[], bool],
        *,
        observe: Callable[[ProbeOutcome, float], None] | None = None,
        intervals: Intervals = _INTERVALS,
    ) -> None:
        self._intervals = intervals
        self._client = client
        self._report = report
        self._record = record
        self._inflight = inflight
        self._routers_report = routers_report
        self._observe = observe
        self._plans: dict[str, Plan] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._entries = itertools.count(1)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._states: Counter[str] = Counter()
        self._random = random.Random()
        self._loop_task: asyncio.Task[None] | None = None
        self.deferred = 0
        """Times that due probes had to wait because too many were under way."""
        self.late_max = WindowMax()

    @property
    def running(self) -> int:
        """Probes under way."""
        return len(self._tasks)

    def start(self) -> None:
        """Begin probing."""
        self._loop_task = asyncio.create_task(self._run(), name="prober")

    async def stop(self) -> None:
        """Stop, cancelling probes in flight."""
        tasks = [*self._tasks, *([self._loop_task] if self._loop_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def set_workers(self, workers: Iterable[tuple[str, str, str]]) -> None:
        """Probe exactly these (worker id, url, upstream model) from now on; new ones at once."""
        wanted = {worker_id: (url, model) for worker_id, url, model in workers}
        for worker_id in [worker_id for worker_id in self._plans if worker_id not in wanted]:
            self._enter_state(self._plans.pop(worker_id), "")
        now_s = time.monotonic()
        spread_s = max(JITTER, (len(wanted) - len(self._plans)) / MAX_PER_S)
        for worker_id, (url, model) in wanted.items():
            plan = self._plans.get(worker_id)
            if plan is None:
                # The sequence starts at the clock so that a worker that comes back is not taken for its former self.
                sequence = time.monotonic_ns()
                plan = Plan(worker_id=worker_id, url=url, model=model, due_s=now_s, sequence=sequence)
                self._plans[worker_id] = plan
                self._enter_state(plan, "unsure")
                self._schedule(plan, now_s + self._random.uniform(0, spread_s))
            elif (plan.url, plan.model) != (url, model):
                plan.url, plan.model, plan.facts = url, model, None
                self._schedule(plan, now_s)

    def probe_soon(self, worker_id: str) -> None:
        """Probe a worker at once, for example because a router failed to use it."""
        plan = self._plans.get(worker_id)
        now_s = time.monotonic()
        if plan is not None and not plan.running and plan.due_s > now_s:
            self._schedule(plan, now_s)

    def _schedule(self, plan: Plan, due_s: float) -> None:
        plan.due_s = due_s
        plan.entry = next(self._entries)
        heapq.heappush(self._heap, (due_s, plan.entry, plan.worker_id))
        if self._heap[0][1] == plan.entry:
            self._wake.set()

    async def _run(self) -> None:
        while True:
            now_s = time.monotonic()
            while self._heap and self._heap[0][0] <= now_s and len(self._tasks) < MAX_CONCURRENT:
                _, entry, worker_id = heapq.heappop(self._heap)
                plan = self._plans.get(worker_id)
                if plan is not None and plan.entry == entry and not plan.running:
                    plan.running = True
                    self.late_max.add(now_s - plan.due_s, now_s)
                    task = asyncio.create_task(self._probe(plan), name=f"probe-{worker_id}")
                    self._tasks.add(task)
                    task.add_done_callback(self._done)
            self._wake.clear()
            wait_s = max(0.0, self._heap[0][0] - now_s) if self._heap else None
            if wait_s == 0.0 and len(self._tasks) >= MAX_CONCURRENT:
                self.deferred += 1
                wait_s = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()

    def _done(self, task: "asyncio.Task[None]") -> None:
        if len(self._tasks) >= MAX_CONCURRENT:
            self._wake.set()
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a probe broke", exc_info=task.exception(), extra={"task": task.get_name()})

    async def _probe(self, plan: Plan) -> None:
        begun_s = time.monotonic()
        url = plan.url
        try:
            stale = plan.facts is None or begun_s - plan.facts_s > FACTS_EVERY_S
            finding = await self._client.probe(url, None if stale else plan.facts, plan.model)
            if finding.outcome is ProbeOutcome.OK:
                started = _started(finding)
                if finding.facts is None and started > plan.engine_started:
                    # Another engine sits behind the URL: ask it anew before it is believed to be the old one.
                    finding = await self._client.probe(url, None, plan.model)
            self._finish(plan, url, finding, begun_s)
        finally:
            plan.running = False
            if self._plans.get(plan.worker_id) is plan:
                interval_s = self._interval_s(plan)
                self._schedule(plan, time.monotonic() + interval_s * self._random.uniform(1 - JITTER, 1 + JITTER))

    def _finish(self, plan: Plan, url: str, finding: Finding, begun_s: float) -> None:
        now_s = time.monotonic()
        if self._observe is not None:
            self._observe(finding.outcome, now_s - begun_s)
        if self._plans.get(plan.worker_id) is not plan or plan.url != url:
            return
        plan.sequence += 1
        if finding.facts is not None:
            plan.facts, plan.facts_s = finding.facts, now_s
        if finding.outcome is ProbeOutcome.FAILED:
            plan.facts = None
        plan.engine_started = _started(finding) or plan.engine_started
        ranks: tuple[RankSample, ...] = ()
        record = self._record(plan.worker_id)
        if finding.readings is not None and record is not None:
            ids = record.spec.target_ids
            ranks = samples(finding.readings, lambda rank: self._inflight(ids[rank]) if rank < len(ids) else (0, 0))
        self._report(
            ProbeResult(
                at_s=now_s,
                worker_id=plan.worker_id,
                url=url,
                sequence=plan.sequence,
                outcome=finding.outcome,
                observed_s=time.time(),
                facts=finding.facts,
                ranks=ranks,
                engine_started=_started(finding),
                message=finding.message,
            )
        )

    def _interval_s(self, plan: Plan) -> float:
        """Seconds to its next probe."""
        state = self._state(plan.worker_id)
        self._enter_state(plan, state)
        wanted_s: float = getattr(self._intervals, state)
        return max(wanted_s, self._states[state] / MAX_PER_S)

    def _enter_state(self, plan: Plan, state: str) -> None:
        self._states[plan.state] -= 1
        self._states[state] += 1
        plan.state = state

    def _state(self, worker_id: str) -> str:
        record = self._record(worker_id)
        if record is None or record.health in (Health.STARTING, Health.SUSPECT) or record.failed_probes:
            return "unsure"
        if record.health is Health.GONE:
            return "gone"
        stands_still = any(rank.moved_s < (record.last_ok_s or 0) for rank in record.ranks)
        if record.health is Health.RECONFIGURING or stands_still:
            return "unreported"
        return "reported" if self._routers_report() else "unreported"


def _started(finding: Finding) -> int:
    return int(finding.readings.engine_started_s * 1000) if finding.readings is not None else 0
