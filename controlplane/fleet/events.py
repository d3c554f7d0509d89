"""Events of the fleet. Each carries a number that makes duplicates and late arrivals harmless."""

import msgspec

from controlplane.fleet.values import ProbeOutcome, RankSample, Source, WorkerSpec
from twofold.model.fleet import EngineFacts, Pool, RoutingPolicy
from twofold.model.profile import EngineProfile


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events; ``at_s`` is monotonic seconds of the control plane."""

    at_s: float


class ConfigChanged(Event, frozen=True, kw_only=True):
    """Pools and profiles as configured; the highest ``version`` counts."""

    version: int
    pools: tuple[Pool, ...]
    profiles: tuple[EngineProfile, ...]


class SourceChanged(Event, frozen=True, kw_only=True):
    """All workers that one source declares; the highest ``version`` of a source counts."""

    source: Source
    version: int
    workers: tuple[WorkerSpec, ...]


class ProbeResult(Event, frozen=True, kw_only=True):
    """What a probe of ``url`` found. ``sequence`` grows with each probe of the worker; ``observed_s`` is wall time.

    ``facts`` None: not asked this time. ``engine_started`` in milliseconds since the Unix epoch, 0 where unknown.
    """

    worker_id: str
    url: str
    sequence: int
    outcome: ProbeOutcome
    observed_s: float = 0.0
    facts: EngineFacts | None = None
    ranks: tuple[RankSample, ...] = ()
    engine_started: int = 0
    message: str = ""


class RouterFailures(Event, frozen=True, kw_only=True):
    """Consecutive failures that a replica sees, absolute, by target id. Ordered by (stream, sequence) per replica."""

    replica_id: str
    stream: int
    sequence: int
    failures: tuple[tuple[str, int], ...]


class RouterGone(Event, frozen=True, kw_only=True):
    """A replica left: its reports count no more."""

    replica_id: str
    stream: int


class ControlChanged(Event, frozen=True, kw_only=True):
    """An operator cordoned, drained or freed a worker; the highest ``version`` per worker counts."""

    worker_id: str
    version: int
    cordoned: bool
    draining: bool


class PolicyChanged(Event, frozen=True, kw_only=True):
    """Routing policy; the highest ``version`` counts."""

    version: int
    policy: RoutingPolicy
