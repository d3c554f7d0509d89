"""What was measured, and what an engine says about itself."""

import msgspec


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine tells over HTTP. 0 or "" where it does not say."""

    model: str
    version: str = ""
    max_model_len_tokens: int = 0
    block_size_tokens: int = 0
    kv_capacity_tokens: int = 0
    max_num_batched_tokens: int = 0
    max_num_seqs: int = 0
    prefix_caching: bool = True
    has_metrics: bool = False
    engines: int = 1
    """Data-parallel ranks behind the URL."""


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of one ``/metrics`` page that a measurement needs; sums over all engines of the page.

    Times are totals in seconds. ``step_tokens``: (upper bound, steps with at most so many tokens).
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    finished: int = 0
    prefill_total_s: float = 0.0
    prefill_count: int = 0
    decode_total_s: float = 0.0
    decode_count: int = 0
    preemptions: int = 0
    step_tokens: tuple[tuple[float, int], ...] = ()


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One streamed answer: when it was sent, and when each event with a token came, in seconds of one clock."""

    sent_s: float
    events_s: tuple[float, ...]
    tokens: int
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.events_s[0] - self.sent_s

    @property
    def merged(self) -> bool:
        """Whether some events carried more than one token."""
        return len(self.events_s) < self.tokens


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """Time to first token of one prompt on an engine without other work.

    ``prefill_s``: the part that the engine itself counts as prefill; None where it does not tell.
    """

    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    prefill_s: float | None = None

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.prompt_tokens - self.cached_tokens


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """Mean seconds of the steps of ``sequences`` streams side by side, each behind ``context_tokens``.

    A mean over all of their steps, and the law is linear, so what the steps held on average says all: ``decodes``
    sequences with ``kv_tokens`` of context together, ``prompts`` prompts of ``prompt_tokens`` and ``attention`` (token
    pairs). 0 for ``decodes``: exactly ``sequences``, ``context_tokens`` each. ``gap_p50_s`` and ``gap_p90_s``:
    quantiles of the time between two tokens at the client while all streams decoded; 0 where they hardly overlapped.
    """

    sequences: int
    context_tokens: float
    step_s: float
    decodes: float = 0.0
    kv_tokens: float = 0.0
    gap_p50_s: float = 0.0
    gap_p90_s: float = 0.0
    prompts: float = 0.0
    prompt_tokens: float = 0.0
    attention: float = 0.0


class Mixed(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step in which ``sequences`` decode and a prompt of ``new_tokens`` is computed.

    ``ttft_s``: of that prompt, where ``step_s`` is what the engine counted as its prefill; else None.
    """

    sequences: int
    context_tokens: float
    new_tokens: int
    step_s: float
    ttft_s: float | None = None


class Measurements(msgspec.Struct, frozen=True, kw_only=True):
    """All repeats of all points of one run."""

    first_tokens: tuple[FirstToken, ...] = ()
    decodes: tuple[Decode, ...] = ()
    mixed: tuple[Mixed, ...] = ()
