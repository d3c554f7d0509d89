"""The ``/metrics`` page of one port: its engines' ``vllm:*`` series, its own HTTP series and those of the process."""

import gc
import platform
import resource
import time
from collections.abc import Callable, Sequence

import psutil

from emulator.server import metric_names as names
from emulator.server.exposition import Histogram, Labels, Page
from emulator.server.metrics import EngineMetrics

MAX_HANDLERS = 200
_UNMEASURED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/server_info"})


class HttpFigures:
    """Counts of the HTTP exchanges of one port, as prometheus-fastapi-instrumentator keeps them.

    An exchange counts when its answer has ended; probes and ``/metrics`` itself do not count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.created_s = time.time()
        self.requests: dict[tuple[str, str, str], list[float]] = {}
        self.sizes: dict[str, list[float]] = {}
        self.durations: dict[tuple[str, str], tuple[Histogram, float]] = {}
        self.all_durations = Histogram(names.HTTP_DURATIONS_FINE_S)

    def observe(self, handler: str, method: str, status: int, began_s: float, sizes: tuple[int, int]) -> None:
        """An exchange has ended. ``sizes``: content lengths of request and response, 0 where there was none."""
        if handler in _UNMEASURED:
            return
        took_s, now_s = self.clock() - began_s, time.time()
        self.all_durations.observe(took_s)
        key = (handler, method, f"{status // 100}xx")
        if key not in self.requests:
            if len(self.requests) >= MAX_HANDLERS:
                return
            self.requests[key] = [0, now_s]
        self.requests[key][0] += 1
        entry = self.sizes.setdefault(handler, [0, 0, 0, now_s])
        entry[0] += 1
        entry[1] += sizes[0]
        entry[2] += sizes[1]
        if (handler, method) not in self.durations:
            self.durations[handler, method] = (Histogram(names.HTTP_DURATIONS_S), now_s)
        self.durations[handler, method][0].observe(took_s)

    def render(self, page: Page) -> None:
        """The ``http_*`` families."""
        counted = list(self.requests.items())
        labels: list[Labels] = [
            (("handler", handler), ("method", method), ("status", status)) for (handler, method, status), _ in counted
        ]
        page.counter(
            "http_requests",
            names.HTTP_HELP["http_requests"],
            [(label, entry[0]) for label, (_, entry) in zip(labels, counted, strict=True)],
            [entry[1] for _, entry in counted],
        )
        for position, name in ((1, "http_request_size_bytes"), (2, "http_response_size_bytes")):
            samples = [
                ((("handler", handler),), int(entry[0]), entry[position]) for handler, entry in self.sizes.items()
            ]
            page.summary(name, names.HTTP_HELP[name], samples, [entry[3] for entry in self.sizes.values()])
        fine = "http_request_duration_highr_seconds"
        page.histogram(fine, names.HTTP_HELP[fine], [((), self.all_durations)], [self.created_s])
        coarse = "http_request_duration_seconds"
        page.histogram(
            coarse,
            names.HTTP_HELP[coarse],
            [
                ((("handler", handler), ("method", method)), histogram)
                for (handler, method), (histogram, _) in self.durations.items()
            ],
            [created_s for _, created_s in self.durations.values()],
        )


class SleepOperations:
    """Development mode's sleep-mode operations; the series appear with the first one, as in vLLM."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._operations: dict[str, tuple[Histogram, float]] = {}
        self._in_flight: dict[str, int] = {}

    def begin(self, operation: str) -> Callable[[], None]:
        """An operation ("sleep", "wake", "release_kv_cache_memory") begins; call the result when it has ended."""
        began_s = self._clock()
        if operation not in self._operations:
            self._operations[operation] = (Histogram(names.SLEEP_DURATIONS_S), time.time())
        self._in_flight[operation] = self._in_flight.get(operation, 0) + 1

        def ended() -> None:
            self._in_flight[operation] -= 1
            self._operations[operation][0].observe(self._clock() - began_s)

        return ended

    def render(self, page: Page) -> None:
        """The two families, once there has been an operation."""
        if not self._operations:
            return
        labels: list[Labels] = [(("operation", name),) for name in self._operations]
        duration, in_flight = "sleep_mode_operation_duration_seconds", "sleep_mode_operations_in_flight"
        samples = [(label, entry[0]) for label, entry in zip(labels, self._operations.values(), strict=True)]
        created = [entry[1] for entry in self._operations.values()]
        page.histogram(f"vllm:{duration}", names.HELP[duration], samples, created)
        page.gauge(
            f"vllm:{in_flight}",
            names.HELP[in_flight],
            [(label, float(count)) for label, count in zip(labels, self._in_flight.values(), strict=True)],
        )


class PortMetrics:
    """All that one port shows. ``engines``: its ranks, those that left included, as vLLM keeps their series."""

    def __init__(
        self,
        served: str,
        engines: list[EngineMetrics],
        clock: Callable[[], float],
        *,
        tool_parser: bool = False,
        max_loras: int | None = None,
    ) -> None:
        self.engines = engines
        self.http = HttpFigures(clock)
        self.sleep_operations = SleepOperations(clock)
        self.rejections = dict.fromkeys(names.ADMISSION_REASONS, 0)
        self._tool_parser_shown = tool_parser
        self._served = served
        self._max_loras = max_loras
        self._created_s = time.time()
        self._process = psutil.Process()

    def count_rejection(self, reason: str) -> None:
        """A queue limit refused a request."""
        self.rejections[reason] += 1

    def render(self) -> bytes:
        """The Prometheus text, in vLLM's order."""
        page = Page()
        self._python(page)
        self._always_zero(page, names.ESTIMATES)
        self._gauges(page)
        self._counters(page)
        for name in names.HISTOGRAMS:
            page.histogram(
                f"vllm:{name}",
                names.HELP[name],
                [(engine.labels, engine.histograms[name]) for engine in self.engines],
                [engine.created_s for engine in self.engines],
            )
        self._adapters(page)
        self._cache_config(page)
        self.http.render(page)
        self._tool_parser(page)
        self.sleep_operations.render(page)
        alone = len(self.engines) == 1
        for name, text in (("seconds", names.LATENESS_HELP), ("ratio", names.RATIO_HELP)):
            attribute = {"seconds": "lateness_s", "ratio": "lateness_ratio"}[name]
            page.histogram(
                f"twofold_emulator_step_lateness_{name}",
                text,
                [
                    (() if alone else (("engine", engine.engine),), getattr(engine, attribute))
                    for engine in self.engines
                ],
                [engine.created_s for engine in self.engines],
            )
        return page.render()

    def _python(self, page: Page) -> None:
        stats = gc.get_stats()
        for name, key in (("objects_collected", "collected"), ("objects_uncollectable", "uncollectable")):
            self._generations(page, name, [entry[key] for entry in stats])
        self._generations(page, "collections", [entry["collections"] for entry in stats])
        major, minor, patch = platform.python_version_tuple()
        version = (
            ("implementation", platform.python_implementation()),
            *(("major", major), ("minor", minor), ("patchlevel", patch), ("version", platform.python_version())),
        )
        page.gauge("python_info", names.PROCESS_HELP["python_info"], [(version, 1)])
        memory, times = self._process.memory_info(), self._process.cpu_times()
        help_of = names.PROCESS_HELP
        for gauge, value in (
            ("process_virtual_memory_bytes", memory.vms),
            ("process_resident_memory_bytes", memory.rss),
            ("process_start_time_seconds", self._process.create_time()),
        ):
            page.gauge(gauge, help_of[gauge], [((), value)])
        page.counter("process_cpu_seconds", help_of["process_cpu_seconds"], [((), times.user + times.system)])
        page.gauge("process_open_fds", help_of["process_open_fds"], [((), self._process.num_fds())])
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        page.gauge("process_max_fds", help_of["process_max_fds"], [((), limit)])

    def _generations(self, page: Page, name: str, values: Sequence[int]) -> None:
        samples = [((("generation", str(generation)),), value) for generation, value in enumerate(values)]
        page.counter(f"python_gc_{name}", names.PROCESS_HELP[f"python_gc_{name}"], samples)

    def _gauges(self, page: Page) -> None:
        for name, values in (
            ("num_requests_running", [engine.load.running for engine in self.engines]),
            ("num_requests_waiting", [engine.load.waiting for engine in self.engines]),
        ):
            self._per_engine(page, name, values)
        loads = [(engine.labels, engine.load) for engine in self.engines]
        by_reason = [((*labels, ("reason", "capacity")), load.waiting - load.deferred) for labels, load in loads]
        by_reason += [((*labels, ("reason", "deferred")), load.deferred) for labels, load in loads]
        page.gauge("vllm:num_requests_waiting_by_reason", names.HELP["num_requests_waiting_by_reason"], by_reason)
        states = [
            ((*engine.labels, ("sleep_state", state)), float(engine.sleep_level == level))
            for state, level in zip(names.SLEEP_STATES, (None, 1, 2), strict=True)
            for engine in self.engines
        ]
        page.gauge("vllm:engine_sleep_state", names.HELP["engine_sleep_state"], states)
        self._per_engine(page, "kv_cache_usage_perc", [engine.load.kv_usage for engine in self.engines])

    def _per_engine(self, page: Page, name: str, values: Sequence[float]) -> None:
        samples = [(engine.labels, value) for engine, value in zip(self.engines, values, strict=True)]
        page.gauge(f"vllm:{name}", names.HELP[name], samples)

    def _counters(self, page: Page) -> None:
        self._counter(page, "prefix_cache_queries", lambda engine: [((), engine.prefix_cache_queries)])
        self._counter(page, "prefix_cache_hits", lambda engine: [((), engine.prefix_cache_hits)])
        self._always_zero(page, names.EXTERNAL_CACHES)
        self._counter(page, "num_preemptions", lambda engine: [((), engine.preemptions)])
        self._counter(page, "prompt_tokens", lambda engine: [((), engine.prompt_tokens)])
        self._counter(
            page,
            "prompt_tokens_by_source",
            lambda engine: [
                ((("source", "local_compute"),), engine.prompt_tokens - engine.prompt_tokens_cached),
                ((("source", "local_cache_hit"),), engine.prompt_tokens_cached),
                ((("source", "external_kv_transfer"),), 0),
            ],
        )
        self._counter(page, "prompt_tokens_cached", lambda engine: [((), engine.prompt_tokens_cached)])
        self._counter(
            page,
            "prompt_tokens_cached_by_source",
            lambda engine: [
                ((("source", tier),), engine.prefix_cache_hits if tier == "device" else 0) for tier in names.CACHE_TIERS
            ],
        )
        self._counter(page, "generation_tokens", lambda engine: [((), engine.generation_tokens)])
        self._counter(
            page,
            "request_success",
            lambda engine: [((("finished_reason", name),), value) for name, value in engine.finished.items()],
        )
        rejected = [
            ((("model_name", self._served), ("reason", reason)), float(count))
            for reason, count in self.rejections.items()
        ]
        page.counter(
            "vllm:admission_rejections",
            names.HELP["admission_rejections"],
            rejected,
            [self._created_s] * len(rejected),
        )

    def _counter(
        self, page: Page, name: str, samples_of: Callable[[EngineMetrics], Sequence[tuple[Labels, float]]]
    ) -> None:
        samples, created = [], []
        for of_one_label in zip(*(samples_of(engine) for engine in self.engines), strict=True):
            for engine, (extra, value) in zip(self.engines, of_one_label, strict=True):
                samples.append(((*engine.labels, *extra), value))
                created.append(engine.created_s)
        page.counter(f"vllm:{name}", names.HELP[name], samples, created)

    def _always_zero(self, page: Page, family_names: Sequence[str]) -> None:
        for name in family_names:
            self._counter(page, name, lambda engine: [((), 0)])

    def _cache_config(self, page: Page) -> None:
        samples = []
        for engine in self.engines:
            profile, pool = engine.model.profile, engine.model.pool
            block, tokens = profile.block_size_tokens, pool.num_blocks * profile.block_size_tokens
            config = {
                **names.CACHE_CONFIG,
                "block_size": str(block),
                "enable_prefix_caching": str(engine.model.prefix_caching),
                "prefix_caching_hash_algo": engine.model.hash_algorithm.value,
                "engine": engine.engine,
                "effective_attention_block_size": str(block),
                "kv_cache_max_concurrency": str(tokens / profile.max_model_len_tokens),
                "kv_cache_size_tokens": str(tokens),
                "num_gpu_blocks": str(pool.num_blocks),
            }
            samples.append((tuple(config.items()), 1.0))
        page.gauge("vllm:cache_config_info", names.HELP["cache_config_info"], samples)

    def _adapters(self, page: Page) -> None:
        if self._max_loras is None:
            return
        most = ("max_lora", str(self._max_loras))
        seen: dict[str, float] = {}
        for engine in self.engines:
            seen |= engine.adapter_sets
        samples = [
            ((most, ("running_lora_adapters", shown), ("waiting_lora_adapters", shown)), at_s)
            for shown, at_s in seen.items()
        ]
        page.gauge("vllm:lora_requests_info", names.HELP["lora_requests_info"], samples)

    def _tool_parser(self, page: Page) -> None:
        if not self._tool_parser_shown:
            return
        samples: list[tuple[Labels, float]] = [
            ((("mode", mode), ("model_name", self._served), ("outcome", outcome), ("request_type", kind)), 0.0)
            for mode, outcome, kind in names.TOOL_PARSER_SERIES
        ]
        page.counter(
            "vllm:tool_call_parser_invocations",
            names.HELP["tool_call_parser_invocations"],
            samples,
            [self._created_s] * len(samples),
        )
