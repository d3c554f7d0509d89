"""Engine profile: how fast one engine of a given GPU type, parallel size and set of flags is."""

import math

import msgspec


class StepLaw(msgspec.Struct, frozen=True, kw_only=True):
    """Time of one engine step as a function of what the step holds.

    ``step_s = base_s + decode_per_seq_s * decodes + decode_per_kv_token_s * decode_context_tokens
    + sum over prefill chunks of (prefill_per_seq_s + prefill_per_token_s * n
    + prefill_per_token_context_s * n * (context + n / 2))``

    The last term is attention: every new token reads all tokens before it. ``prefill_per_seq_s`` is what a prompt costs
    whatever its length; it shows where steps are short.
    """

    base_s: float
    decode_per_seq_s: float
    decode_per_kv_token_s: float
    prefill_per_token_s: float
    prefill_per_token_context_s: float
    prefill_per_seq_s: float = 0.0

    def decode_s(self, decodes: int, context_tokens: float) -> float:
        """Seconds of a step of ``decodes`` running sequences with ``context_tokens`` in all, base included."""
        return self.base_s + self.decode_per_seq_s * decodes + self.decode_per_kv_token_s * context_tokens

    def prefill_work_s(self, new_tokens: float, context_tokens: float) -> float:
        """Seconds of prefill for ``new_tokens`` behind ``context_tokens`` already computed; no base, no decodes, and
        without ``prefill_per_seq_s``, so that it may be cut into pieces."""
        return new_tokens * (
            self.prefill_per_token_s + self.prefill_per_token_context_s * (context_tokens + new_tokens / 2)
        )

    def scaled(self, factor: float) -> "StepLaw":
        """The law of an engine on which every step takes ``factor`` times as long (time scale, online correction)."""
        return StepLaw(
            base_s=self.base_s * factor,
            decode_per_seq_s=self.decode_per_seq_s * factor,
            decode_per_kv_token_s=self.decode_per_kv_token_s * factor,
            prefill_per_token_s=self.prefill_per_token_s * factor,
            prefill_per_token_context_s=self.prefill_per_token_context_s * factor,
            prefill_per_seq_s=self.prefill_per_seq_s * factor,
        )


class EngineProfile(msgspec.Struct, frozen=True, kw_only=True):
    """GPU type x parallel sizes x engine flags, with its speed.

    ``name`` is the key everywhere ("h100-8b-tp1"). ``source`` says where the constants come from.
    ``request_overhead_s`` and ``request_overhead_per_token_s`` (of the whole prompt, cached or not) are what the API
    server adds to the time to first token of a request, beside the steps of the engine, and
    ``request_overhead_busy_s`` what it adds where the request meets running ones. ``step_jitter``: how far the time
    between two tokens scatters around the law, as the standard deviation of its logarithm (0.1: about 10 %).
    """

    name: str
    gpu: str
    model_class: str
    law: StepLaw
    kv_capacity_tokens: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    block_size_tokens: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len_tokens: int = 131_072
    usd_per_hour: float | None = None
    source: str = ""
    request_overhead_s: float = 0.0
    request_overhead_per_token_s: float = 0.0
    request_overhead_busy_s: float = 0.0
    step_jitter: float = 0.0

    def prefill_s(self, uncached_tokens: float, cached_tokens: float) -> float:
        """Seconds to prefill ``uncached_tokens`` behind ``cached_tokens`` on an otherwise idle engine (own)."""
        if uncached_tokens <= 0:
            return self.law.base_s
        steps = math.ceil(uncached_tokens / self.max_num_batched_tokens)
        fixed_s = self.law.base_s + self.law.prefill_per_seq_s
        return steps * fixed_s + self.law.prefill_work_s(uncached_tokens, cached_tokens)

    def overhead_s(self, prompt_tokens: float, *, busy: bool = False) -> float:
        """Seconds that a request spends outside the engine's steps before its first token arrives.

        ``busy``: other requests run already.
        """
        idle_s = self.request_overhead_s + self.request_overhead_per_token_s * prompt_tokens
        return idle_s + self.request_overhead_busy_s if busy else idle_s

    def ttft_s(self, uncached_tokens: float, cached_tokens: float) -> float:
        """Time to first token in seconds on an otherwise idle engine, as a client beside it sees it."""
        return self.overhead_s(uncached_tokens + cached_tokens) + self.prefill_s(uncached_tokens, cached_tokens)

    def capacity_tokens_s(self) -> float:
        """Prefill throughput in tokens/s on 4k-token prompts: the ring weight and the unit of capacity."""
        tokens = 4096
        return tokens / self.prefill_s(tokens, 0)

    def scaled(self, factor: float) -> "EngineProfile":
        """This profile with everything ``factor`` times as long."""
        return msgspec.structs.replace(
            self,
            law=self.law.scaled(factor),
            request_overhead_s=self.request_overhead_s * factor,
            request_overhead_per_token_s=self.request_overhead_per_token_s * factor,
            request_overhead_busy_s=self.request_overhead_busy_s * factor,
        )
