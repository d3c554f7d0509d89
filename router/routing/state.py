"""What a relay keeps per pool and per target between snapshots, and the view of it that policies read."""

from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Protocol

from router.routing.accounts import Load
from router.routing.prefix_table import COMMON_YOUNG_SHARE, YOUNG_SHARE, target_salt
from router.routing.ring import DualRing
from router.routing.types import Chain, RequestFeatures
from twofold.model.fleet import Health, Pool, RoutingPolicy, Target
from twofold.model.profile import EngineProfile, StepLaw
from twofold.model.reasons import Ineligible

MARGIN_TOKENS_PER_S = 12_000.0
"""Uncached tokens that one second of ``RoutingPolicy.margin_s`` stands for: the prefill speed (7B on an A100) at which
the margin was measured. Priced at the pool's reference speed, so that the margin scales with the engines."""
MIN_CORRECTION, MAX_CORRECTION = 0.25, 4.0
_CORRECTION_WEIGHT = 0.1


class TargetState:
    """One target: static facts flattened for the hot path, and the online correction of its speed."""

    __slots__ = (
        "adapters",
        "base_s",
        "batch_tokens",
        "common_young_tokens",
        "context_s",
        "correction",
        "decode_kv_s",
        "decode_s",
        "kv_capacity_tokens",
        "longest_tokens",
        "max_inflight",
        "prefill_s",
        "profile",
        "refusal",
        "salt",
        "slot",
        "target",
        "target_id",
        "young_tokens",
    )

    def __init__(self, slot: int, target: Target, profile: EngineProfile, pool: Pool, correction: float = 1.0) -> None:
        law = profile.law
        self.slot = slot
        self.target = target
        self.target_id = target.target_id
        self.profile = profile
        self.base_s = law.base_s
        self.decode_s = law.decode_per_seq_s
        self.decode_kv_s = law.decode_per_kv_token_s
        self.prefill_s = law.prefill_per_token_s
        self.context_s = law.prefill_per_token_context_s
        self.batch_tokens = profile.max_num_batched_tokens
        self.kv_capacity_tokens = float(target.facts.kv_capacity_tokens or profile.kv_capacity_tokens)
        self.young_tokens = YOUNG_SHARE * self.kv_capacity_tokens
        self.common_young_tokens = COMMON_YOUNG_SHARE * self.kv_capacity_tokens
        self.longest_tokens: float = target.facts.max_model_len_tokens or pool.max_model_len_tokens or inf
        """Prompt and output together; infinite where nobody said."""
        self.max_inflight = pool.max_inflight_per_target
        self.salt = target_salt(target.target_id, target.incarnation)
        self.refusal = _static_refusal(target)
        self.correction = correction
        known = bool(target.facts.adapters or target.facts.served_models)
        self.adapters = frozenset(target.facts.adapters + target.facts.served_models) if known else None
        """Adapters it can serve; None while it has not said."""

    def has_adapter(self, adapter: str) -> bool:
        """Whether requests for ``adapter`` ("" for the base model) may go here."""
        return not adapter or self.adapters is None or adapter in self.adapters

    def idle_work_s(self, load: Load) -> float:
        """Work in seconds by which the least loaded target is found: what is queued, and a step of what decodes."""
        step_s = self.base_s + self.decode_s * load.decodes + self.decode_kv_s * load.kv_tokens
        return load.queued_s + step_s * self.correction

    def correct(self, ratio: float) -> None:
        """Takes in one observation of (observed / uncorrected predicted) prefill time: a bounded geometric EWMA."""
        pull = min(2.0, max(0.5, ratio / self.correction))
        corrected = self.correction * pull**_CORRECTION_WEIGHT
        self.correction = min(MAX_CORRECTION, max(MIN_CORRECTION, corrected))


def _static_refusal(target: Target) -> Ineligible:
    if target.health is not Health.HEALTHY:
        return Ineligible.UNHEALTHY
    if target.draining:
        return Ineligible.DRAINING
    if target.cordoned:
        return Ineligible.CORDONED
    if target.role == "decode":
        return Ineligible.UNKNOWN
    return Ineligible.NONE


class PoolState:
    """One pool: its rings, its targets in order of their ids, and its reference speed."""

    __slots__ = (
        "by_slot",
        "has_ranks",
        "margin_unit_s",
        "pool",
        "reference_context_s",
        "reference_prefill_s",
        "ring",
        "targets",
    )

    def __init__(self, pool: Pool, ring: DualRing, targets: list[TargetState], reference: StepLaw | None) -> None:
        self.pool = pool
        self.ring = ring
        self.targets = targets
        self.by_slot = {state.slot: state for state in targets}
        self.has_ranks = any(state.target.data_parallel_rank is not None for state in targets)
        if reference is None and targets:
            # Without a reference profile the fastest target's speed is the unit: any one speed for all will do.
            reference = min((state.profile.law for state in targets), key=lambda law: law.prefill_work_s(4096, 0))
        self.reference_prefill_s = reference.prefill_per_token_s if reference else 0.0
        self.reference_context_s = reference.prefill_per_token_context_s if reference else 0.0
        self.margin_unit_s = reference.prefill_work_s(MARGIN_TOKENS_PER_S, 0) if reference else 1.0
        """Price of one second of margin: MARGIN_TOKENS_PER_S tokens at reference speed."""


class KvView(Protocol):
    """What the engines themselves report of their caches (KV events), by the engines' own block hashes."""

    def leading_blocks(self, slot: int, hashes: Sequence[int]) -> int:
        """Leading blocks of a chain that the target at ``slot`` holds; -1 where nothing is known of its cache."""

    def is_exact(self, slot: int) -> bool:
        """Whether nothing is held there beyond what ``leading_blocks`` tells."""

    def last_storer(self, hashes: Sequence[int]) -> tuple[int, int] | None:
        """(slot, leading blocks) of the target that last stored the deepest block still held by any; None without."""


class FleetView(Protocol):
    """What a policy may read. Nothing here changes what a later decision sees."""

    def pool_state(self, name: str) -> PoolState | None:
        """The pool, or None when it is not in the snapshot."""

    @property
    def load(self) -> Callable[[int], Load]:
        """Load of the target at a slot, summed over the replica and the other replicas."""

    @property
    def cached_chunks(self) -> Callable[[int, Chain, float, float, int], int]:
        """Leading chunks of a chain that a target holds or has queued; see ``PrefixReader.cached_chunks``."""

    @property
    def kv(self) -> KvView | None:
        """The engines' own reports, None where there are none at all."""

    def ring_key(
        self, request: RequestFeatures, state: PoolState, policy: RoutingPolicy, now_s: float
    ) -> tuple[int, int]:
        """(ring key, chunks it covers)."""

    def least_work(
        self, request: RequestFeatures, state: PoolState, exclude: Collection[int], now_s: float
    ) -> int | None:
        """Slot of the eligible target with the least work, None when the top of the heap is ineligible."""
