"""The fleet as routers see it: targets, pools, policy and the snapshot that holds them."""

import enum

import msgspec

from twofold.model.profile import EngineProfile
from twofold.model.reasons import TargetCondition


class Health(enum.StrEnum):
    """Liveness of a target as the control plane believes it."""

    STARTING = "starting"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Failing, not yet given up: no new work, running streams stay."""
    GONE = "gone"
    RECONFIGURING = "reconfiguring"
    """An MoE engine commits a new size: no new work for the moment."""


class HashAlgorithm(enum.StrEnum):
    """Block hash of an engine's prefix cache (vLLM's ``--prefix-caching-hash-algo``)."""

    SHA256 = "sha256"
    SHA256_CBOR = "sha256_cbor"
    XXHASH = "xxhash"
    XXHASH_CBOR = "xxhash_cbor"
    UNKNOWN = ""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine said of itself when probed; 0 or "" where it did not."""

    version: str = ""
    block_size_tokens: int = 0
    kv_capacity_tokens: int = 0
    max_model_len_tokens: int = 0
    hash_algorithm: HashAlgorithm = HashAlgorithm.UNKNOWN
    tokenizer_digest: str = ""
    served_models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    adapter_paths: tuple[str, ...] = ()
    """Where each of ``adapters`` was loaded from, in the same order; its path is part of the engine's block hashes."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's metrics said at ``observed_s`` (the prober's clock). Gauges go stale when no step runs."""

    observed_s: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A worker plus, where it has several, one data-parallel rank.

    ``ordinal`` is the wire index in reports of the present epoch; a router maps it to a slot of its own.
    ``weight_tokens_s`` is the capacity used for ring weights.
    """

    target_id: str
    worker_id: str
    pool: str
    url: str
    profile: str
    ordinal: int
    weight_tokens_s: float
    data_parallel_rank: int | None = None
    health: Health = Health.STARTING
    cordoned: bool = False
    draining: bool = False
    conditions: tuple[TargetCondition, ...] = ()
    facts: EngineFacts = EngineFacts()
    load: EngineLoad = EngineLoad()
    zone: str = ""
    node: str = ""
    role: str = ""
    incarnation: int = 0
    """Grows when the engine behind the URL was replaced or restarted: caches of the old one are void."""

    @property
    def takes_work(self) -> bool:
        """Whether new requests may be sent to it at all."""
        return self.health is Health.HEALTHY and not self.cordoned and not self.draining


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Latency target: TTFT and TPOT in seconds at ``percentile``."""

    ttft_s: float = 5.0
    tpot_s: float = 0.1
    percentile: float = 0.9


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """The workers that serve one base model, and the attributes every router must agree on.

    ``reference_profile`` is the speed at which recomputation is priced (own_ref) and the unit of ring weights.
    """

    name: str
    models: tuple[str, ...]
    """Names by which clients ask for it: the served name first, aliases after it."""
    upstream_model: str = ""
    adapters: tuple[str, ...] = ()
    reference_profile: str = ""
    chunk_bytes: int = 1024
    bytes_per_token: float = 4.0
    """Prompt bytes per token, to estimate prompt lengths without tokenising."""
    max_model_len_tokens: int = 0
    block_size_tokens: int = 0
    hash_algorithm: HashAlgorithm = HashAlgorithm.UNKNOWN
    tokenizer_digest: str = ""
    kv_events: bool = False
    max_inflight_per_target: int = 1024
    slo: Slo = Slo()
    tokenizer: str = ""
    """For exact prefixes of texts and chats: "builtin" (the emulator's), or the path of a tokenizer.json."""
    hash_seed: str = ""
    """PYTHONHASHSEED of the engines, which seeds their block hashes; "" when they have none."""


class RoutingPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the routing decision; the same on every router. See docs/routing.md for each."""

    name: str = "twofold"
    alpha: float = 0.3
    """Weight of time (own + wait) against recomputation at reference speed, 0..1."""
    margin_s: float = 0.5
    """Seconds of reference prefill by which the escape must beat the homes."""
    key_share: float = 1.0
    """A prefix is a ring key when its share of recent requests is at most key_share / number of targets."""
    key_half_life_s: float = 120.0
    key_min_count: float = 3.0
    shed_ttft_s: float = 120.0
    """Reject with 429 when the best target is predicted to need longer than this; 0 never sheds."""
    retry_budget_ratio: float = 0.2
    """Retries allowed per request, as a running ratio."""


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a router needs, at one moment. ``epoch`` names one life of the control plane, ``version`` counts
    its changes; both together order snapshots of one epoch. Targets are sorted by ``target_id``."""

    epoch: int
    version: int
    pools: tuple[Pool, ...] = ()
    profiles: tuple[EngineProfile, ...] = ()
    targets: tuple[Target, ...] = ()
    policy: RoutingPolicy = RoutingPolicy()
