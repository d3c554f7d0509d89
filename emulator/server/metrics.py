"""What one engine counts for its ``vllm:*`` series, at the moments at which vLLM counts it.

Gauges are those of the last scheduler step that ended, so they go stale on an idle or hung engine. Tokens count when
they reach the front end. Requests that a client or an abort call ended are not counted in ``request_success``; those
that the engine itself aborted (pause, sleep, a rank that leaves) are.
"""

import time

from emulator.model import EngineModel, FinishReason, Load, Request, StepResult
from emulator.server import metric_names as names
from emulator.server.exposition import Histogram, Labels

MAX_ADAPTER_SETS = 1000
"""Label sets of ``vllm:lora_requests_info`` kept, where vLLM keeps all: each set of adapters ever seen is one."""


class Siblings:
    """The choices of one prompt with ``n`` above 1: vLLM counts ``n`` and the longest output once all have ended.

    ``open``: choices still to be submitted; ``left``: those still to end.
    """

    __slots__ = ("left", "longest", "n", "open")

    def __init__(self, n: int) -> None:
        self.n = self.left = self.open = n
        self.longest = 0


class EngineMetrics:
    """The figures of one engine. ``served``: the name that its series carry."""

    def __init__(self, model: EngineModel, served: str, *, engine: str = "0") -> None:
        self.model = model
        self.served = served
        self.engine = engine
        self.sleep_level: int | None = None
        self.lateness_s = Histogram(names.LATENESS_S)
        self.lateness_ratio = Histogram(names.LATENESS_RATIO)
        self.load = Load()
        self.reset()

    @property
    def labels(self) -> Labels:
        """The labels of every series of this engine."""
        return (("engine", self.engine), ("model_name", self.served))

    def reset(self) -> None:
        """Start all counters anew, as vLLM does when elastic EP grows. Gauges stay."""
        self.created_s = time.time()
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.generation_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.preemptions = 0
        self.finished = dict.fromkeys(names.FINISHED_REASONS, 0)
        longest = self.model.profile.max_model_len_tokens
        bounds = {**names.HISTOGRAM_BOUNDS, **dict.fromkeys(names.TOKEN_HISTOGRAMS, names.one_two_five(longest))}
        self.histograms = {name: Histogram(bounds[name]) for name in names.HISTOGRAMS}
        self.adapter_sets: dict[str, float] = {}
        self._inter_token = self.histograms["inter_token_latency_seconds"]
        self._first_token = self.histograms["time_to_first_token_seconds"]
        self._iteration = self.histograms["iteration_tokens_total"]
        self._iteration_prompt_tokens = 0
        self._adapters: dict[str, int] = {}

    def observe_step(self, result: StepResult) -> None:
        """A scheduler step has ended."""
        self.load = result.load
        self.prefix_cache_queries += result.prefix_cache_queries
        self.prefix_cache_hits += result.prefix_cache_hits
        if result.resumed:
            self.preemptions += len(result.resumed)
        if self._adapters or self.adapter_sets:
            self._note_adapters()

    def observe_iteration(self, delivered: int) -> None:
        """``delivered`` tokens of one step have reached the front end."""
        self.generation_tokens += delivered
        self._iteration.observe(self._iteration_prompt_tokens + delivered)
        self._iteration_prompt_tokens = 0

    def observe_lateness(self, late_s: float, step_s: float) -> None:
        """The last token of a step of ``step_s`` was written ``late_s`` after it was due."""
        self.lateness_s.observe(late_s)
        self.lateness_ratio.observe(late_s / step_s if step_s > 0 else 0.0)

    def reset_lateness(self) -> None:
        """Forget the lateness seen so far."""
        self.lateness_s = Histogram(names.LATENESS_S)
        self.lateness_ratio = Histogram(names.LATENESS_RATIO)

    def observe_token(self, request: Request, now_s: float, previous_s: float | None) -> None:
        """A token was delivered; ``previous_s`` is when the one before was, None for the first."""
        if previous_s is not None:
            self._inter_token.observe(now_s - previous_s)
            return
        cached = request.cached_tokens or 0
        self._first_token.observe(max(0.0, now_s - request.arrival_s))
        self.prompt_tokens += request.prompt_tokens
        self.prompt_tokens_cached += cached
        self._iteration_prompt_tokens += request.prompt_tokens - cached
        if request.adapter is not None:
            self._adapters[request.adapter.name] = self._adapters.get(request.adapter.name, 0) + 1

    def observe_finished(self, request: Request, now_s: float, siblings: Siblings | None = None) -> None:
        """The engine ended a request by itself."""
        self.forget(request)
        self.finished[str(request.finish_reason or FinishReason.ABORT)] += 1
        observe = {name: histogram.observe for name, histogram in self.histograms.items()}
        first_token_s = request.first_token_s or now_s
        scheduled_s = request.first_scheduled_s or now_s
        outputs = request.output_tokens
        decode_s = max(0.0, now_s - first_token_s)
        observe["request_prompt_tokens"](request.prompt_tokens)
        observe["request_generation_tokens"](outputs)
        observe["request_params_max_tokens"](request.max_tokens)
        observe["e2e_request_latency_seconds"](max(0.0, now_s - request.arrival_s))
        observe["request_queue_time_seconds"](max(0.0, scheduled_s - request.arrival_s))
        observe["request_inference_time_seconds"](max(0.0, now_s - scheduled_s))
        observe["request_prefill_time_seconds"](max(0.0, first_token_s - scheduled_s))
        observe["request_decode_time_seconds"](decode_s)
        observe["request_num_preemptions"](request.preemptions)
        observe["request_prefill_kv_computed_tokens"](request.prompt_tokens - (request.cached_tokens or 0))
        observe["request_time_per_output_token_seconds"](decode_s / (outputs - 1) if outputs > 1 else 0.0)
        family = siblings or Siblings(1)
        family.left -= 1
        family.longest = max(family.longest, outputs)
        if family.left == 0:
            observe["request_params_n"](family.n)
            observe["request_max_num_generation_tokens"](family.longest)

    def forget(self, request: Request) -> None:
        """A request has ended in whatever way: its adapter is in use once less."""
        if request.adapter is None or request.first_token_s is None:
            return
        name = request.adapter.name
        left = self._adapters.get(name, 0) - 1
        if left > 0:
            self._adapters[name] = left
        else:
            self._adapters.pop(name, None)

    def _note_adapters(self) -> None:
        shown = ",".join(self._adapters)
        if shown in self.adapter_sets or len(self.adapter_sets) < MAX_ADAPTER_SETS:
            self.adapter_sets[shown] = time.time()
