"""The state itself, and the draft that a batch of events is applied to."""

from collections.abc import Mapping

import msgspec

from controlplane.fleet.ordinals import Ordinals
from controlplane.fleet.values import (
    MAX_LOG_ENTRIES,
    Control,
    FleetRules,
    LogEntry,
    RouterReport,
    Source,
    WorkerRecord,
    WorkerSpec,
)
from twofold.model.fleet import Pool, RoutingPolicy
from twofold.model.profile import EngineProfile

MAX_LOGS = 4096
MAX_CONTROLS = 16_384
MAX_REPLICAS = 1024


class FleetState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the control plane believes. A value: reducing makes a new one, mappings are never changed in place.

    ``changed`` names the workers whose targets differ from the state before the last batch, ``load_changed`` those of
    which only the engine's load moved; ``shared_changed`` is set when pools, profiles or policy differ.
    """

    rules: FleetRules = FleetRules()
    now_s: float = 0.0
    config_version: int = 0
    declared_pools: Mapping[str, Pool] = msgspec.field(default_factory=dict)
    profiles: Mapping[str, EngineProfile] = msgspec.field(default_factory=dict)
    pools: Mapping[str, Pool] = msgspec.field(default_factory=dict)
    """Declared pools with what their engines agree on filled in."""
    policy: RoutingPolicy = RoutingPolicy()
    policy_version: int = 0
    sources: Mapping[Source, tuple[int, Mapping[str, WorkerSpec]]] = msgspec.field(default_factory=dict)
    workers: Mapping[str, WorkerRecord] = msgspec.field(default_factory=dict)
    controls: Mapping[str, Control] = msgspec.field(default_factory=dict)
    reports: Mapping[str, Mapping[str, RouterReport]] = msgspec.field(default_factory=dict)
    """Worker id -> "replica target" -> what that replica sees on that target."""
    replicas: Mapping[str, tuple[int, int]] = msgspec.field(default_factory=dict)
    """Replica -> (stream, sequence) of its last report."""
    ordinals: Ordinals = Ordinals()
    logs: Mapping[str, tuple[LogEntry, ...]] = msgspec.field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    load_changed: frozenset[str] = frozenset()
    shared_changed: bool = False

    def control(self, worker_id: str) -> Control:
        """The operator's order for a worker; none is an empty one."""
        return self.controls.get(worker_id, _NO_CONTROL)


_NO_CONTROL = Control(version=0)


class Draft:
    """Copies of a state's mappings, changed in place by one batch of events and then frozen by ``finish``."""

    def __init__(self, state: FleetState) -> None:
        self.rules = state.rules
        self.now_s = state.now_s
        self.config_version = state.config_version
        self.declared_pools = state.declared_pools
        self.profiles = state.profiles
        self.pools = state.pools
        self.policy = state.policy
        self.policy_version = state.policy_version
        self.sources = dict(state.sources)
        self.workers = dict(state.workers)
        self.controls = dict(state.controls)
        self.reports = dict(state.reports)
        self.replicas = dict(state.replicas)
        self.ordinals = state.ordinals
        self.logs = dict(state.logs)
        self.changed: set[str] = set()
        self.load_changed: set[str] = set()
        self.stale_pools: set[str] = set()
        self.members_changed = False
        self.shared_changed = False

    def log(self, worker_id: str, at_s: float, reason: str, message: str, target_id: str = "") -> None:
        """Append to the history of a worker; the oldest entry and the oldest worker give way."""
        entry = LogEntry(at_s=at_s, target_id=target_id or worker_id, reason=reason, message=message[:300])
        entries = self.logs.pop(worker_id, ())
        self.logs[worker_id] = (*entries[-(MAX_LOG_ENTRIES - 1) :], entry)
        while len(self.logs) > MAX_LOGS:
            gone = next((key for key in self.logs if key not in self.workers), next(iter(self.logs)))
            del self.logs[gone]

    def finish(self) -> FleetState:
        """The new state."""
        return FleetState(
            rules=self.rules,
            now_s=self.now_s,
            config_version=self.config_version,
            declared_pools=self.declared_pools,
            profiles=self.profiles,
            pools=self.pools,
            policy=self.policy,
            policy_version=self.policy_version,
            sources=self.sources,
            workers=self.workers,
            controls=self.controls,
            reports=self.reports,
            replicas=self.replicas,
            ordinals=self.ordinals,
            logs=self.logs,
            changed=frozenset(self.changed),
            load_changed=frozenset(self.load_changed - self.changed),
            shared_changed=self.shared_changed,
        )
