"""The scheduler and the step: vLLM V1's ``v1/core/sched/scheduler.py`` as a function of time."""

import enum

import msgspec

from emulator.model.blocks import BlockPool, KvEvent
from emulator.model.hashing import CheapHashing, EngineHashing, Hashing
from emulator.model.jitter import factor
from emulator.model.request import FinishReason, Request, Status
from emulator.model.waiting import SchedulingPolicy, WaitingQueue
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import HashAlgorithm
from twofold.model.profile import EngineProfile


class Counters(msgspec.Struct, kw_only=True):
    """Totals since the start, with the meaning of the ``vllm:*`` series of the same name."""

    steps: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    busy_s: float = 0.0


class Pause(enum.IntEnum):
    """vLLM's pause states: everything runs; nothing new is admitted; nothing is scheduled at all."""

    NONE = 0
    NEW = 1
    ALL = 2


class Load(msgspec.Struct, frozen=True):
    """What the scheduler's gauges show. ``waiting`` counts the ``deferred`` ones too."""

    running: int = 0
    waiting: int = 0
    deferred: int = 0
    kv_usage: float = 0.0


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step does. ``tokens`` become visible ``duration_s`` after the step began, and so does ``load``.

    ``tokens``: (request, new token id), one per request that sampled; if its ``finish_reason`` is set it has ended.
    ``admitted``: requests scheduled for the first time; ``resumed``: those scheduled again after a preemption.
    ``load``: the engine at the end of the step, without what came in while it ran. ``prefix_cache_queries`` and
    ``prefix_cache_hits``: tokens looked up and found by ``admitted``. ``events``: KV events, where they are recorded.
    """

    duration_s: float
    tokens: list[tuple[Request, int]]
    admitted: list[Request]
    resumed: list[Request]
    preempted: list[Request]
    finished: list[Request]
    scheduled_tokens: int
    decodes: int
    load: Load
    prefix_cache_queries: int
    prefix_cache_hits: int
    events: list[KvEvent]


class EngineModel:
    """One engine: ``add`` and ``abort`` requests, call ``step`` while ``has_work``.

    Scheduling as in vLLM V1: running requests first, in list order, within the token budget; then waiting ones, but
    only if nothing was preempted; the first waiting request that does not fit stops admission; a prompt is admitted
    only if all of its blocks fit, though chunked prefill computes it piece by piece; a running request without a block
    preempts (recomputes) the last running request, or with the priority policy that of greatest (priority, arrival).
    A step runs at most ``max_loras`` different adapters: waiting requests of further ones are skipped.
    With a ``hasher`` blocks bear the names that vLLM gives them, else cheap ones.

    Raises ValueError if the longest request would not fit the KV cache.
    """

    def __init__(
        self,
        profile: EngineProfile,
        *,
        policy: SchedulingPolicy = SchedulingPolicy.FCFS,
        record_events: bool = False,
        prefix_caching: bool = True,
        max_loras: int = 1,
        hasher: BlockHasher | None = None,
    ) -> None:
        num_blocks = profile.kv_capacity_tokens // profile.block_size_tokens
        usable_tokens = (num_blocks - 1) * profile.block_size_tokens
        if profile.max_model_len_tokens > usable_tokens:
            longest = profile.max_model_len_tokens
            raise ValueError(f"the model length of {longest} tokens exceeds the KV cache of {usable_tokens} tokens")
        self.profile = profile
        self.pool = BlockPool(num_blocks, profile.block_size_tokens, record_events=record_events)
        self.waiting = WaitingQueue(policy)
        self.running: list[Request] = []
        self.counters = Counters()
        self._policy = policy
        self.prefix_caching = prefix_caching
        self._max_loras = max_loras
        size = profile.block_size_tokens
        self.hash_algorithm = hasher.algorithm if hasher is not None else HashAlgorithm.SHA256
        """What ``/metrics`` says of the names of blocks."""
        self._hashing: Hashing = EngineHashing(hasher) if hasher is not None else CheapHashing(size)
        self._requests: dict[str, Request] = {}
        self.paused = Pause.NONE

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        if self.paused is Pause.NONE:
            return bool(self.running) or len(self.waiting) > 0
        return self.paused is Pause.NEW and bool(self.running)

    @property
    def load(self) -> Load:
        """The engine as it stands."""
        return Load(len(self.running), len(self.waiting), self.waiting.num_deferred, self.pool.usage)

    def idle_until_s(self, now_s: float) -> float | None:
        """When the next request is ready, where nothing can run before; None where a step does something now."""
        if self.running or self.paused is not Pause.NONE:
            return None
        request = self.waiting.peek()
        return request.ready_s if request is not None and request.ready_s > now_s else None

    def get(self, request_id: str) -> Request | None:
        """The unfinished request with this id."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an id in use or a prompt that leaves no room for output."""
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if request.prompt_tokens >= self.profile.max_model_len_tokens:
            raise ValueError("the prompt leaves no room for output")
        self._requests[request.request_id] = request
        if self.prefix_caching:
            self._hashing.extend(request)
        self.waiting.append(request)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End an unfinished request from outside (abort, stop string); its blocks are free at once. None if unknown."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._release(request)
            request.status = Status.FINISHED
        else:
            request.status = Status.FINISHED
            self.waiting.dropped(request)
        request.finish_reason = reason
        return request

    def unfinished(self) -> list[Request]:
        """All requests that run or wait."""
        return list(self._requests.values())

    def reset_prefix_cache(self, *, preempt: bool = False) -> bool:
        """Forget all cached blocks. False while requests hold blocks, unless those are to be preempted first."""
        if preempt:
            for request in reversed(self.running[:]):
                self._preempt(request)
        return self.pool.clear_cache()

    def step(self, now_s: float) -> StepResult:
        """Schedule one batch at ``now_s`` and run it; state is that of ``now_s + duration_s`` when this returns."""
        scheduled: list[Request] = []
        counters = self.counters
        queries, hits = counters.prefix_cache_queries, counters.prefix_cache_hits
        budget, preempted = self._schedule_running(scheduled)
        admitted: list[Request] = []
        resumed: list[Request] = []
        if not preempted and self.paused is Pause.NONE and len(self.waiting):
            budget = self._schedule_waiting(budget, now_s, scheduled, admitted, resumed)
        duration_s, decodes = self._duration(scheduled)
        if self.profile.step_jitter:
            duration_s *= factor(self.profile.step_jitter, counters.steps, now_s)
        tokens, finished = self._execute(scheduled, now_s + duration_s)
        counters.steps += 1
        counters.busy_s += duration_s
        return StepResult(
            duration_s=duration_s,
            tokens=tokens,
            admitted=admitted,
            resumed=resumed,
            preempted=preempted,
            finished=finished,
            scheduled_tokens=self.profile.max_num_batched_tokens - budget,
            decodes=decodes,
            load=self.load,
            prefix_cache_queries=counters.prefix_cache_queries - queries,
            prefix_cache_hits=counters.prefix_cache_hits - hits,
            events=self.pool.drain_events(),
        )

    def _schedule_running(self, scheduled: list[Request]) -> tuple[int, list[Request]]:
        budget = self.profile.max_num_batched_tokens
        block_size = self.profile.block_size_tokens
        preempted: list[Request] = []
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            new_tokens = min(len(request.ids) - request.computed_tokens, budget)
            needed = -(-(request.computed_tokens + new_tokens) // block_size) - len(request.blocks)
            while needed > self.pool.num_free:
                victim = self._victim()
                if victim in scheduled:
                    scheduled.remove(victim)
                    budget += victim.scheduled_tokens
                    index -= 1
                self._preempt(victim)
                preempted.append(victim)
                if victim is request:
                    break
            if request.status is not Status.RUNNING:
                break
            self._assign(request, needed, new_tokens)
            budget -= new_tokens
            scheduled.append(request)
            index += 1
        return budget, preempted

    def _schedule_waiting(
        self,
        budget: int,
        now_s: float,
        scheduled: list[Request],
        admitted: list[Request],
        resumed: list[Request],
    ) -> int:
        block_size = self.profile.block_size_tokens
        adapters = {request.adapter.adapter_id for request in scheduled if request.adapter is not None}
        while budget > 0 and len(self.running) < self.profile.max_num_seqs:
            request = self.waiting.peek()
            if request is None or request.ready_s > now_s:
                break
            adapter = request.adapter
            if adapter is not None and len(adapters) >= self._max_loras and adapter.adapter_id not in adapters:
                self.waiting.skip()
                continue
            total = len(request.ids)
            limit = (total - 1) // block_size if self.prefix_caching and request.read_cache else 0
            hit = self.pool.find(request.hashes, limit)
            whole = -(-total // block_size) - len(hit)
            if whole + self.pool.num_unreferenced(hit) > self.pool.num_free:
                break
            self.waiting.pop()
            self.pool.touch(hit)
            local = len(hit) * block_size
            cached = max(local, min(request.remote_tokens // block_size, limit) * block_size)
            request.remote_tokens = 0  # handed over once: after a preemption they are gone
            request.blocks = hit
            request.stored_blocks = len(hit)
            request.computed_tokens = cached
            if request.cached_tokens is None:
                self._count_admission(request, cached, local)
                request.first_scheduled_s = now_s
                admitted.append(request)
            else:
                resumed.append(request)
            if adapter is not None:
                adapters.add(adapter.adapter_id)
            request.status = Status.RUNNING
            self.running.append(request)
            new_tokens = min(total - cached, budget)
            self._assign(request, -(-(cached + new_tokens) // block_size) - len(hit), new_tokens)
            budget -= new_tokens
            scheduled.append(request)
        self.waiting.restore()
        return budget

    def _count_admission(self, request: Request, cached: int, local: int) -> None:
        request.cached_tokens = cached
        counters = self.counters
        counters.prefix_cache_queries += request.prompt_tokens if self.prefix_caching and request.read_cache else 0
        counters.prefix_cache_hits += local

    def _assign(self, request: Request, needed: int, new_tokens: int) -> None:
        if needed > 0:
            request.blocks += self.pool.allocate(needed)
        request.scheduled_tokens = new_tokens
        full = (request.computed_tokens + new_tokens) // self.profile.block_size_tokens
        if self.prefix_caching and full > request.stored_blocks:
            self._hashing.extend(request)
            self.pool.store(
                request.blocks,
                request.hashes,
                request.stored_blocks,
                full,
                request.ids,
                adapter=request.adapter,
                cache_salt=request.cache_salt,
            )
            request.stored_blocks = full

    def _victim(self) -> Request:
        if self._policy is SchedulingPolicy.PRIORITY:
            return max(self.running, key=lambda request: (request.priority, request.arrival_s))
        return self.running[-1]

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        if self.prefix_caching:
            self._hashing.extend(request)
        request.status = Status.PREEMPTED
        request.computed_tokens = 0
        request.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.give_back(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.last_blocks, request.blocks = request.blocks, []
        request.stored_blocks = 0

    def _duration(self, scheduled: list[Request]) -> tuple[float, int]:
        if not scheduled:
            return 0.0, 0
        law = self.profile.law
        decodes = context = 0
        prefill_s = 0.0
        for request in scheduled:
            if request.scheduled_tokens == 1 and request.computed_tokens >= request.prompt_tokens:
                decodes += 1
                context += request.computed_tokens
            else:
                prefill_s += law.prefill_per_seq_s
                prefill_s += law.prefill_work_s(request.scheduled_tokens, request.computed_tokens)
        return law.decode_s(decodes, context) + prefill_s, decodes

    def _execute(self, scheduled: list[Request], end_s: float) -> tuple[list[tuple[Request, int]], list[Request]]:
        max_model_len = self.profile.max_model_len_tokens
        counters = self.counters
        tokens: list[tuple[Request, int]] = []
        finished: list[Request] = []
        for request in scheduled:
            request.computed_tokens += request.scheduled_tokens
            if request.computed_tokens < len(request.ids):
                continue
            tokens.append((request, request.produce(max_model_len)))
            if request.first_token_s is None:
                request.first_token_s = end_s
                counters.prompt_tokens += request.prompt_tokens
                counters.prompt_tokens_cached += request.cached_tokens or 0
            request.last_token_s = end_s
            if request.finish_reason is not None:
                finished.append(request)
        counters.generation_tokens += len(tokens)
        if finished:
            for request in finished:
                self._release(request)
                request.status = Status.FINISHED
                del self._requests[request.request_id]
            self.running = [request for request in self.running if request.status is Status.RUNNING]
        return tokens, finished
