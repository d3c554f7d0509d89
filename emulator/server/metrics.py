"""The ``vllm:*`` series of one engine, and its own lateness, as Prometheus text.

Gauges are those of the last scheduler step, so they go stale on an idle or hung engine as in vLLM. Requests that a
client or an abort call ended are not counted in ``request_success``.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from emulator.model import EngineModel, FinishReason, Request, StepResult
from emulator.server import metric_names as names


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


class EngineMetrics:
    """What one engine counts beyond ``EngineModel.counters``."""

    def __init__(self, model: EngineModel, model_name: str, *, engine: str = "0") -> None:
        self._model = model
        self._labels = (("engine", engine), ("model_name", model_name))
        self._created_s = time.time()
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.finished = dict.fromkeys(names.FINISHED_REASONS, 0)
        longest = model.profile.max_model_len_tokens
        bounds = {**names.HISTOGRAM_BOUNDS, **dict.fromkeys(names.TOKEN_HISTOGRAMS, names.one_two_five(longest))}
        self._histograms = {name: Histogram(bounds[name]) for name in names.HISTOGRAMS}
        self._inter_token = self._histograms["inter_token_latency_seconds"]
        self.lateness_s = Histogram(names.LATENESS_S)
        self.lateness_ratio = Histogram(names.LATENESS_RATIO)

    def observe_step(self, result: StepResult) -> None:
        """After a scheduler step."""
        self.running = len(self._model.running) + len(result.finished)
        self.waiting = len(self._model.waiting)
        self.kv_usage = self._model.pool.usage
        self._histograms["iteration_tokens_total"].observe(result.scheduled_tokens)

    def observe_idle(self) -> None:
        """The engine ran out of work: its last step left nothing."""
        self.running = self.waiting = 0
        self.kv_usage = self._model.pool.usage

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
        if previous_s is None:
            self._histograms["time_to_first_token_seconds"].observe(max(0.0, now_s - request.arrival_s))
        else:
            self._inter_token.observe(now_s - previous_s)

    def observe_finished(self, request: Request, now_s: float, n: int) -> None:
        """The engine ended a request by itself."""
        self.finished[str(request.finish_reason or FinishReason.ABORT)] += 1
        observe = {name: histogram.observe for name, histogram in self._histograms.items()}
        first_token_s = request.first_token_s or now_s
        scheduled_s = request.first_scheduled_s or now_s
        outputs = request.output_tokens
        decode_s = max(0.0, now_s - first_token_s)
        observe["request_prompt_tokens"](request.prompt_tokens)
        observe["request_generation_tokens"](outputs)
        observe["request_max_num_generation_tokens"](outputs)
        observe["request_params_n"](n)
        observe["request_params_max_tokens"](request.max_tokens)
        observe["e2e_request_latency_seconds"](max(0.0, now_s - request.arrival_s))
        observe["request_queue_time_seconds"](max(0.0, scheduled_s - request.arrival_s))
        observe["request_inference_time_seconds"](max(0.0, now_s - scheduled_s))
        observe["request_prefill_time_seconds"](max(0.0, first_token_s - scheduled_s))
        observe["request_decode_time_seconds"](decode_s)
        observe["request_num_preemptions"](request.preemptions)
        observe["request_prefill_kv_computed_tokens"](request.prompt_tokens - (request.cached_tokens or 0))
        if outputs > 1:
            observe["request_time_per_output_token_seconds"](decode_s / (outputs - 1))

    def render(self) -> bytes:
        """The Prometheus text."""
        lines: list[str] = []
        for name, value in self._gauges().items():
            self._family(lines, name, "gauge", [((), value)])
        self._family(
            lines,
            "num_requests_waiting_by_reason",
            "gauge",
            [((("reason", "capacity"),), self.waiting), ((("reason", "deferred"),), 0)],
        )
        states = [((("sleep_state", state),), int(state == "awake")) for state in names.SLEEP_STATES]
        self._family(lines, "engine_sleep_state", "gauge", states)
        for name, samples in self._counters().items():
            self._family(lines, name, "counter", samples)
        for name, histogram in self._histograms.items():
            self._histogram(lines, f"vllm:{name}", names.HELP[name], self._labels, histogram)
        self._cache_config(lines)
        self._histogram(lines, "twofold_emulator_step_lateness_seconds", names.LATENESS_HELP, (), self.lateness_s)
        self._histogram(lines, "twofold_emulator_step_lateness_ratio", names.RATIO_HELP, (), self.lateness_ratio)
        return ("\n".join(lines) + "\n").encode()

    def _gauges(self) -> dict[str, float]:
        return {
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting,
            "kv_cache_usage_perc": self.kv_usage,
        }

    def _counters(self) -> dict[str, list[tuple[tuple[tuple[str, str], ...], float]]]:
        counters = self._model.counters
        computed = counters.prompt_tokens - counters.prompt_tokens_cached
        sources = {
            "local_compute": computed,
            "local_cache_hit": counters.prompt_tokens_cached,
            "external_kv_transfer": 0,
        }
        return {
            "prefix_cache_queries": [((), counters.prefix_cache_queries)],
            "prefix_cache_hits": [((), counters.prefix_cache_hits)],
            "num_preemptions": [((), counters.preemptions)],
            "prompt_tokens": [((), counters.prompt_tokens)],
            "prompt_tokens_by_source": [((("source", name),), value) for name, value in sources.items()],
            "prompt_tokens_cached": [((), counters.prompt_tokens_cached)],
            "generation_tokens": [((), counters.generation_tokens)],
            "request_success": [((("finished_reason", name),), value) for name, value in self.finished.items()],
        }

    def _family(
        self,
        lines: list[str],
        name: str,
        kind: str,
        samples: Iterable[tuple[tuple[tuple[str, str], ...], float]],
    ) -> None:
        full = f"vllm:{name}" + ("_total" if kind == "counter" else "")
        labelled = [(_labels((*self._labels, *extra)), value) for extra, value in samples]
        lines += [f"# HELP {full} {names.HELP[name]}", f"# TYPE {full} {kind}"]
        lines += [f"{full}{labels} {float(value)}" for labels, value in labelled]
        if kind == "counter":
            lines += [f"# HELP vllm:{name}_created {names.HELP[name]}", f"# TYPE vllm:{name}_created gauge"]
            lines += [f"vllm:{name}_created{labels} {self._created_s}" for labels, _ in labelled]

    def _histogram(
        self, lines: list[str], name: str, text: str, labels: tuple[tuple[str, str], ...], histogram: Histogram
    ) -> None:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        total = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            total += count
            le = "+Inf" if bound == float("inf") else str(float(bound))
            lines.append(f"{name}_bucket{_labels((*labels, ('le', le)))} {float(total)}")
        suffix = _labels(labels)
        lines += [f"{name}_count{suffix} {float(histogram.count)}", f"{name}_sum{suffix} {histogram.sum}"]
        lines += [f"# HELP {name}_created {text}", f"# TYPE {name}_created gauge"]
        lines.append(f"{name}_created{suffix} {self._created_s}")

    def _cache_config(self, lines: list[str]) -> None:
        profile, pool = self._model.profile, self._model.pool
        config = {
            **names.CACHE_CONFIG,
            "block_size": str(profile.block_size_tokens),
            "engine": self._labels[0][1],
            "effective_attention_block_size": str(profile.block_size_tokens),
            "kv_cache_size_tokens": str(pool.num_blocks * profile.block_size_tokens),
            "num_gpu_blocks": str(pool.num_blocks),
        }
        lines += [f"# HELP vllm:cache_config_info {names.HELP['cache_config_info']}"]
        lines += ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{_labels(tuple(config.items()))} 1.0"]


def _labels(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in sorted(labels)) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
