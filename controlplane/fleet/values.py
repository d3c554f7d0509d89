"""Values the fleet state is made of."""

import enum

import msgspec

from twofold.model.fleet import EngineFacts, EngineLoad, Health, Pool
from twofold.model.reasons import TargetCondition

MAX_RANKS = 1024
MAX_LOG_ENTRIES = 100


class Source(enum.StrEnum):
    """Who declares a worker. Where two sources declare one id, the first in this order wins."""

    FILE = "file"
    PROVIDER = "provider"
    LEASE = "lease"


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as its source declares it. ``incarnation`` grows with each start of the engine, where known."""

    worker_id: str
    url: str
    pool: str
    profile: str
    data_parallel_size: int = 1
    zone: str = ""
    node: str = ""
    role: str = ""
    incarnation: int = 0
    draining: bool = False
    """Its source is about to stop it: no new work."""

    @property
    def target_ids(self) -> tuple[str, ...]:
        """Ids of its targets: its own, or one for each data-parallel rank."""
        if self.data_parallel_size <= 1:
            return (self.worker_id,)
        return tuple(f"{self.worker_id}/{rank}" for rank in range(self.data_parallel_size))


class ProbeOutcome(enum.StrEnum):
    """How a probe ended."""

    OK = "ok"
    FAILED = "failed"
    RECONFIGURING = "reconfiguring"
    """503 on every path with the message of an engine that changes its size."""


class RankSample(msgspec.Struct, frozen=True, kw_only=True):
    """What the metrics of one data-parallel rank said. Counters are cumulative; tokens unless named otherwise.

    ``router_inflight`` and ``router_unanswered`` (requests without a first token yet) are what the routers reported for
    the same target at that moment: the engine's own gauges go stale when no step runs.
    """

    rank: int
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    iterations: int = 0
    router_inflight: int = 0
    router_unanswered: int = 0

    @property
    def progress(self) -> int:
        """Grows with every step of the engine."""
        return self.iterations + self.generation_tokens + self.prompt_tokens


class FleetRules(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the health machine; seconds, or numbers of probes in a row."""

    suspect_after_probes: int = 2
    gone_after_s: float = 15.0
    start_bound_s: float = 900.0
    """A worker that never answered is given up after this."""
    readmit_probes: int = 2
    """Good probes that bring a suspect back; one more for a gone one; doubled with each flap up to the maximum."""
    readmit_probes_max: int = 16
    flap_memory_s: float = 120.0
    reconfiguring_bound_s: float = 600.0
    stall_after_s: float = 15.0
    counters_reset_shown_s: float = 60.0
    ordinal_quarantine_s: float = 30.0


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a worker's history; ``at_s`` monotonic seconds."""

    at_s: float
    target_id: str
    reason: str
    message: str


class RankRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One target of a worker. ``moved_s``: when it last made progress or had nothing to do."""

    load: EngineLoad = EngineLoad()
    progress: int = -1
    moved_s: float = 0.0
    stalled: bool = False


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known of one worker."""

    spec: WorkerSpec
    source: Source
    ranks: tuple[RankRecord, ...]
    health: Health = Health.STARTING
    since_s: float = 0.0
    """When it entered ``health``."""
    incarnation: int = 0
    probe_sequence: int = 0
    good_probes: int = 0
    failed_probes: int = 0
    last_ok_s: float | None = None
    reconfiguring_since_s: float | None = None
    counters_reset_s: float | None = None
    unreachable_by_routers: bool = False
    by_routers: bool = False
    """Router reports made it suspect."""
    flaps: int = 0
    flapped_s: float = 0.0
    facts: EngineFacts = EngineFacts()
    engine_started: int = 0
    """Start time the engine reports of itself, milliseconds since the Unix epoch; 0 while unknown."""
    conditions: tuple[TargetCondition, ...] = ()
    """Conditions of the whole worker; STALLED belongs to a rank."""
    message: str = ""

    def target_health(self, rank: int) -> Health:
        """Health of the target at ``rank``: a stalled rank is suspect on its own."""
        return Health.SUSPECT if self.ranks[rank].stalled and self.health is Health.HEALTHY else self.health

    def target_conditions(self, rank: int) -> tuple[TargetCondition, ...]:
        """Conditions of the target at ``rank``."""
        return (*self.conditions, TargetCondition.STALLED) if self.ranks[rank].stalled else self.conditions


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator ordered for a worker."""

    version: int
    cordoned: bool = False
    draining: bool = False


class RouterReport(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive failures one replica sees on one target. ``forgiven``: as many as were known when the worker was
    re-admitted; only more than that count."""

    failures: int
    forgiven: int = 0


class Consensus(msgspec.Struct, frozen=True, kw_only=True):
    """What the engines of a pool agree on, declared values first."""

    pool: Pool
    adapters: tuple[str, ...] = ()
