"""Names, help texts, buckets and labels of the series that the emulator exports, as vLLM 0.32 names them."""

HELP: dict[str, str] = {
    "num_requests_running": ("Number of requests in model execution batches."),
    "num_requests_waiting": ("Number of requests waiting to be processed."),
    "kv_cache_usage_perc": ("KV-cache usage. 1 means 100 percent usage."),
    "num_requests_waiting_by_reason": (
        "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for "
        "scheduling capacity; 'deferred' = deferred by transient constraints (LoRA "
        "budget, KV transfer, blocked status). Sum of all reasons equals "
        "vllm:num_requests_waiting."
    ),
    "engine_sleep_state": (
        "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine "
        "is awake; weights_offloaded = 1 means sleep level 1; discard_all = 1 means "
        "sleep level 2."
    ),
    "prefix_cache_queries": ("Prefix cache queries, in terms of number of queried tokens."),
    "prefix_cache_hits": ("Prefix cache hits, in terms of number of cached tokens."),
    "num_preemptions": ("Cumulative number of preemption from the engine."),
    "prompt_tokens": ("Number of prefill tokens processed."),
    "prompt_tokens_by_source": ("Number of prompt tokens by source."),
    "prompt_tokens_cached": ("Number of cached prompt tokens (local + external)."),
    "generation_tokens": ("Number of generation tokens processed."),
    "request_success": ("Count of successfully processed requests."),
    "request_prompt_tokens": ("Number of prefill tokens processed."),
    "request_generation_tokens": ("Number of generation tokens processed."),
    "iteration_tokens_total": ("Histogram of number of tokens per engine_step."),
    "request_max_num_generation_tokens": ("Histogram of maximum number of requested generation tokens."),
    "request_params_n": ("Histogram of the n request parameter."),
    "request_params_max_tokens": ("Histogram of the max_tokens request parameter."),
    "time_to_first_token_seconds": ("Histogram of time to first token in seconds."),
    "inter_token_latency_seconds": ("Histogram of inter-token latency in seconds."),
    "request_time_per_output_token_seconds": ("Histogram of time_per_output_token_seconds per request."),
    "e2e_request_latency_seconds": ("Histogram of e2e request latency in seconds."),
    "request_queue_time_seconds": ("Histogram of time spent in WAITING phase for request."),
    "request_inference_time_seconds": ("Histogram of time spent in RUNNING phase for request."),
    "request_prefill_time_seconds": ("Histogram of time spent in PREFILL phase for request."),
    "request_decode_time_seconds": ("Histogram of time spent in DECODE phase for request."),
    "request_num_preemptions": ("Histogram of the number of times a request was preempted."),
    "request_prefill_kv_computed_tokens": (
        "Histogram of new KV tokens computed during prefill (excluding cached tokens)."
    ),
    "cache_config_info": ("Information of the LLMEngine CacheConfig"),
    "estimated_flops_per_gpu": (
        "Estimated number of floating point operations per GPU (for Model Flops Utilization calculations)."
    ),
    "estimated_read_bytes_per_gpu": (
        "Estimated number of bytes read from memory per GPU (for Model Flops Utilization calculations)."
    ),
    "estimated_write_bytes_per_gpu": (
        "Estimated number of bytes written to memory per GPU (for Model Flops Utilization calculations)."
    ),
    "external_prefix_cache_queries": (
        "External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of queried "
        "tokens."
    ),
    "external_prefix_cache_hits": (
        "External prefix cache hits from KV connector cross-instance cache sharing, in terms of number of cached "
        "tokens."
    ),
    "mm_cache_queries": ("Multi-modal cache queries, in terms of number of queried items."),
    "mm_cache_hits": ("Multi-modal cache hits, in terms of number of cached items."),
    "prompt_tokens_cached_by_source": (
        "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), host (offloaded to DRAM), "
        "disk, p2p (transferred from another vLLM instance) or external_unspecified. Counted at admission; sums to "
        "vllm:prefix_cache_hits + vllm:external_prefix_cache_hits."
    ),
    "admission_rejections": ("Number of admission attempts rejected by a queue limit, by reason."),
    "lora_requests_info": ("Running stats on lora requests."),
    "sleep_mode_operation_duration_seconds": ("Duration of one sleep-mode operation."),
    "sleep_mode_operations_in_flight": ("Sleep-mode operations currently awaited."),
    "tool_call_parser_invocations": (
        "Total number of ToolParser invocations. Non-streaming increments once per choice; streaming increments once "
        "per delta."
    ),
}
HTTP_HELP: dict[str, str] = {
    "http_requests": "Total number of requests by method, status and handler.",
    "http_request_size_bytes": (
        "Content length of incoming requests by handler. Only value of header is respected. Otherwise ignored. No "
        "percentile calculated. "
    ),
    "http_response_size_bytes": (
        "Content length of outgoing responses by handler. Only value of header is respected. Otherwise ignored. No "
        "percentile calculated. "
    ),
    "http_request_duration_highr_seconds": (
        "Latency with many buckets but no API specific labels. Made for more accurate percentile calculations. "
    ),
    "http_request_duration_seconds": (
        "Latency with only few buckets by handler. Made to be only used if aggregation by handler is important. "
    ),
}
PROCESS_HELP: dict[str, str] = {
    "python_gc_objects_collected": "Objects collected during gc",
    "python_gc_objects_uncollectable": "Uncollectable objects found during GC",
    "python_gc_collections": "Number of times this generation was collected",
    "python_info": "Python platform information",
    "process_virtual_memory_bytes": "Virtual memory size in bytes.",
    "process_resident_memory_bytes": "Resident memory size in bytes.",
    "process_start_time_seconds": "Start time of the process since unix epoch in seconds.",
    "process_cpu_seconds": "Total user and system CPU time spent in seconds.",
    "process_open_fds": "Number of open file descriptors.",
    "process_max_fds": "Maximum number of open file descriptors.",
}
ESTIMATES = ("estimated_flops_per_gpu", "estimated_read_bytes_per_gpu", "estimated_write_bytes_per_gpu")
EXTERNAL_CACHES = (
    "external_prefix_cache_queries",
    "external_prefix_cache_hits",
    "mm_cache_queries",
    "mm_cache_hits",
)
CACHE_TIERS = ("device", "host", "p2p", "disk", "external_unspecified")
ADMISSION_REASONS = ("max_num_queued_reqs", "max_num_queued_tokens")
TOOL_PARSER_SERIES = tuple(
    (mode, outcome, kind)
    for mode in ("streaming", "non_streaming")
    for outcome in ("tool_call", "no_tool_call")
    for kind in ("chat_completions", "responses", "other")
)
HTTP_DURATIONS_FINE_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5),
    *(10.0, 30.0, 60.0),
)
HTTP_DURATIONS_S = (0.1, 0.5, 1.0)
SLEEP_DURATIONS_S = (0.01, 0.1, 1.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CACHE_CONFIG: dict[str, str] = {
    "_block_size_resolved": "True",
    "block_size": "128",
    "cache_dtype": "auto",
    "cache_hit_alignment_tokens": "None",
    "effective_attention_block_size": "128",
    "enable_mamba_shared_prefix_checkpoint": "False",
    "enable_prefix_caching": "True",
    "engine": "0",
    "gpu_memory_utilization": "0.92",
    "hash_block_size": "None",
    "is_attention_free": "False",
    "kv_cache_dtype_skip_layers": "[]",
    "kv_cache_layout": "None",
    "kv_cache_max_concurrency": "None",
    "kv_cache_memory_bytes": "None",
    "kv_cache_size_tokens": "524288",
    "kv_offloading_backend": "native",
    "kv_offloading_size": "None",
    "kv_sharing_fast_prefill": "False",
    "mamba_block_size": "None",
    "mamba_cache_dtype": "auto",
    "mamba_cache_mode": "none",
    "mamba_page_size_padded": "None",
    "mamba_ssm_cache_dtype": "float32",
    "num_cpu_blocks": "None",
    "num_gpu_blocks": "4096",
    "num_gpu_blocks_override": "None",
    "prefix_cache_retention_interval": "0",
    "prefix_caching_hash_algo": "sha256",
    "prefix_match_unit": "None",
    "replayssm_buffer_len": "16",
    "skip_page_size_padded": "None",
    "sliding_window": "None",
    "swa_bounded_replay": "True",
    "use_kda_recoverssm": "False",
    "use_replayssm": "False",
    "user_specified_block_size": "False",
}
"""Labels of ``vllm:cache_config_info``; the engine fills in block size and block count."""

FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
TOKEN_HISTOGRAMS = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
)
"""Histograms whose buckets go 1, 2, 5, 10, ... up to the model length."""
_LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_INTER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
HISTOGRAM_BOUNDS: dict[str, tuple[float, ...]] = {
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "request_params_n": (1, 2, 5, 10, 20),
    "time_to_first_token_seconds": _FIRST_TOKEN_S,
    "inter_token_latency_seconds": _INTER_TOKEN_S,
    "request_time_per_output_token_seconds": _INTER_TOKEN_S,
    "e2e_request_latency_seconds": _LATENCY_S,
    "request_queue_time_seconds": _LATENCY_S,
    "request_inference_time_seconds": _LATENCY_S,
    "request_prefill_time_seconds": _LATENCY_S,
    "request_decode_time_seconds": _LATENCY_S,
    "request_num_preemptions": (1, 2, 3, 4, 5, 10, 20),
}
HISTOGRAMS = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_num_preemptions",
    "request_prefill_kv_computed_tokens",
)
"""All histograms, in vLLM's order."""

LATENESS_HELP = "Time from when a step's tokens were due to when the last of them was written."
RATIO_HELP = "Lateness of a step divided by the step's duration."
LATENESS_S = tuple(0.00002 * 1.5**power for power in range(36))
LATENESS_RATIO = tuple(0.005 * 1.25**power for power in range(40))


def one_two_five(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to ``longest``."""
    bounds: list[float] = []
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power > longest:
                return tuple(bounds)
            bounds.append(float(factor * power))
        power *= 10
