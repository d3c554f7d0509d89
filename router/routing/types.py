"""Values that go into and come out of a routing decision."""

import enum
from typing import TypeAlias

import msgspec

from twofold.model.fleet import Pool
from twofold.model.reasons import Ineligible, RejectReason, RouteReason, TargetRole

Chain: TypeAlias = tuple[int, ...]
"""Prefix-chained 64-bit hashes of a prompt's full chunks, shallow to deep."""


class Endpoint(enum.StrEnum):
    """What a client asks for; decides how the body names its prompt."""

    COMPLETIONS = "completions"
    CHAT = "chat"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    SCORE = "score"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"


class BadRequest(Exception):
    """A request the router answers itself: HTTP ``status``, text for the client, field at fault, reason code."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        reason: RejectReason = RejectReason.BAD_REQUEST,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.reason = reason


class Resumability(msgspec.Struct, frozen=True, kw_only=True):
    """What of a request bears on continuing its stream on another engine; judged by the journal, not here."""

    n: int = 1
    has_seed: bool = False
    has_penalties: bool = False
    has_structured_output: bool = False
    has_logprobs: bool = False
    has_tools: bool = False
    has_stop: bool = False
    echo: bool = False
    beam_search: bool = False
    several_prompts: bool = False
    stateful: bool = False
    """Refers to state that one engine holds (``previous_response_id``)."""


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A request body and its headers, reduced to what routing and the relay need. Strings are bounded."""

    endpoint: Endpoint
    model: str
    """As the client wrote it; "" when absent."""
    stream: bool
    prompt: bytes
    """Canonical prompt: equal for requests that render to the same text, whatever their JSON looked like."""
    prompt_ids_count: int | None = None
    """Exact prompt length where the prompt was token ids (then 4 little-endian bytes each in ``prompt``)."""
    max_tokens: int | None = None
    priority: int = 0
    cache_salt: str = ""
    session_id: str = ""
    objective: str = ""
    fairness_id: str = ""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    data_parallel_rank: int | None = None
    return_token_ids: bool = False
    resumability: Resumability = Resumability()


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """The pool that serves a model name, and the adapter the name stands for ("" for the base model)."""

    pool: Pool
    adapter: str = ""


class RequestFeatures(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that a decision depends on besides the fleet. ``arrival_s`` is CLOCK_MONOTONIC."""

    request_id: str
    pool: str
    adapter: str = ""
    sequence: int = 0
    """Counts the requests of one relay, from an offset of its own (round robin)."""
    arrival_s: float = 0.0
    chain: Chain = ()
    chunk_tokens: float = 256.0
    block_hashes: tuple[int, ...] = ()
    """The engine's own hashes of the prompt's full KV blocks, where they are known: what its events speak of."""
    block_tokens: int = 16
    prompt_tokens: int = 1
    prompt_tokens_exact: bool = False
    unique_key: int = 0
    """Ring key for a request without a usable prefix: from its session if named, else from its id."""
    stream: bool = True
    max_tokens: int | None = None
    priority: int = 0
    session_id: str = ""
    objective: str = ""
    fairness_id: str = ""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    data_parallel_rank: int | None = None


class ExaminedTarget(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One candidate and the parts of its price. Seconds and tokens; all 0 where ``ineligible``."""

    slot: int
    target_id: str
    role: TargetRole
    ineligible: Ineligible = Ineligible.NONE
    cached_tokens: int = 0
    uncached_tokens: int = 0
    own_s: float = 0.0
    """Prefill of the uncached tokens on this target, online correction included."""
    own_reference_s: float = 0.0
    wait_s: float = 0.0
    margin_s: float = 0.0
    price_s: float = 0.0
    correction: float = 1.0
    """Observed / predicted prefill time of this target, as applied in ``own_s``."""

    @property
    def predicted_ttft_s(self) -> float:
        """Own work plus wait, seconds."""
        return self.own_s + self.wait_s


class Decision(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Where a request goes, or why nowhere. Enums and numbers only; ``explain.render`` makes text of it.

    ``slot`` is None for a rejection; then ``retry_after_s`` says when to try again.
    """

    slot: int | None
    target_id: str
    reason: RouteReason | RejectReason
    request_id: str
    pool: str
    policy: str
    at_s: float
    prompt_tokens: int
    examined: tuple[ExaminedTarget, ...] = ()
    cached_tokens: int = 0
    uncached_tokens: int = 0
    own_s: float = 0.0
    predicted_ttft_s: float = 0.0
    predicted_tpot_s: float = 0.0
    """Seconds per output token once it decodes beside what runs there now."""
    tpot_effect_s: float = 0.0
    """Seconds per output token that its prefill costs the streams already decoding there."""
    key: int = 0
    key_depth: int = 0
    """Chunks the ring key covers; 0 when the key is the request's own."""
    ring_version: str = ""
    slo_ttft_met: bool = True
    """Whether ``predicted_ttft_s`` is within the request's, else the pool's, TTFT target."""
    slo_tpot_met: bool = True
    """The TPOT guard: neither this request nor, while it prefills, the running decodes are predicted to miss TPOT."""
    retry_after_s: float = 0.0

    @property
    def chosen(self) -> ExaminedTarget | None:
        """The examined target that was chosen."""
        return next((e for e in self.examined if e.slot == self.slot), None)
