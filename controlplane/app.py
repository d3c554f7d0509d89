"""The control plane put together: sources, probes, provider, routers and store around the one state."""

import asyncio
import contextlib
import itertools
import logging
import re
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from controlplane.config import FleetFileWatch
from controlplane.convert import changed_policy
from controlplane.core import Core
from controlplane.discovery.fleet_file import FleetFile, group_profile
from controlplane.discovery.leases import Leases
from controlplane.fleet.events import (
    ConfigChanged,
    ControlChanged,
    PolicyChanged,
    RouterFailures,
    RouterGone,
    SourceChanged,
)
from controlplane.fleet.state import FleetState
from controlplane.fleet.values import FleetRules, ProbeOutcome, Source, WorkerSpec
from controlplane.plan import Desired, Key, PlanError, launch_groups, settle, submit
from controlplane.probes.client import ProbeClient
from controlplane.probes.prober import Prober
from controlplane.providers.local import LocalProvider
from controlplane.registration import Registration
from controlplane.routers.hub import RouterHub, Session
from controlplane.rpc.errors import CallError, not_found
from controlplane.store import Persisted, Store, StoredControl, StoredPolicy
from twofold.model.fleet import Health, RoutingPolicy, Target
from twofold.model.profile import EngineProfile

log = logging.getLogger(__name__)

MAX_REPLICAS_PER_GROUP = 10_000
SAFE_AFTER_S = 0.5


class ControlPlane:
    """Everything but the sockets. ``start`` after construction, ``stop`` at the end; all calls on one event loop."""

    def __init__(
        self, file: FleetFile, path: Path, run_dir: Path, store: Store, rules: FleetRules | None = None
    ) -> None:
        self._store = store
        self._persisted = store.load()
        self._versions = itertools.count(1)
        epoch = max(self._persisted.epoch + 1, int(time.time() * 1000))
        self.started_s = time.time()
        self.core = Core(epoch, rules)
        self.hub = RouterHub(lambda: epoch, self._router_failures, self._router_gone)
        self.leases = Leases()
        self.registration = Registration(
            self.leases,
            self.core,
            next_version=lambda: next(self._versions),
            user_profiles=lambda: self._file.user_profiles(),
            profile_added=lambda: self._push_config(self._file.model_profiles(), time.monotonic()),
            changed=lambda: self._dirty.set(),
        )
        self.watch = FleetFileWatch(path, self._apply_file)
        self.provider = LocalProvider(run_dir, self._declare_local, ready=self._ready, inflight=self._inflight_worker)
        self.probe_counts: dict[ProbeOutcome, int] = dict.fromkeys(ProbeOutcome, 0)
        self.probe_seconds = 0.0
        self._probe_client: ProbeClient | None = None
        self._prober: Prober | None = None
        self._first_file = file
        self._file = file
        self._desired: dict[Key, Desired] = {item.key: item for item in self._persisted.desired}
        self._stored_policy = self._persisted.policy
        self._controls = {item.worker_id: item for item in self._persisted.controls}
        self._drained: dict[str, tuple[int, float]] = {}
        self._ordinals: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._dirty = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.store_faults = 0

    @property
    def prober(self) -> Prober | None:
        """What probes the workers; None before ``start``."""
        return self._prober

    async def start(self) -> None:
        """Take up the stored state and the world, and begin to work. Raises OSError when the state cannot be kept."""
        self._save()
        self._probe_client = ProbeClient()
        self._prober = Prober(
            self._probe_client,
            self.core.push,
            lambda worker_id: self.core.state.workers.get(worker_id),
            self._inflight_target,
            lambda: bool(self.hub.connected()),
            observe=self._observe_probe,
        )
        self.core.listeners.append(self._state_changed)
        self.core.expected_sources = {Source.FILE, Source.PROVIDER}
        now_s = time.monotonic()
        for control in self._controls.values():
            self._push_control(control, now_s)
        self.registration.restore(self._persisted.leases, now_s)
        await self.provider.start()
        self.watch.start(self._first_file)
        self._prober.start()
        self.core.start()
        self._tasks = [
            asyncio.create_task(self.registration.run(), name="leases"),
            asyncio.create_task(self._save_loop(), name="store"),
        ]

    async def stop(self, *, end_engines: bool = True) -> None:
        """Stop everything, engines last."""
        self.hub.close()
        await self.watch.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._prober is not None:
            await self._prober.stop()
        if self._probe_client is not None:
            await self._probe_client.close()
        if end_engines:
            await self.provider.stop()
        await self.core.stop()
        with contextlib.suppress(OSError):
            self._save()

    # Sources ----------------------------------------------------------------------------------------------------

    def _apply_file(self, file: FleetFile) -> None:
        groups = launch_groups(file)
        profiles = file.model_profiles()
        self._file = file
        self._desired = settle(groups, self._desired)
        stored = self._stored_policy
        if stored is not None and stored.file_policy != file.policy:
            self._stored_policy = stored = None
        now_s = time.monotonic()
        self._push_config(profiles, now_s)
        self.core.push(
            SourceChanged(at_s=now_s, source=Source.FILE, version=next(self._versions), workers=file_workers(file))
        )
        self._push_policy(stored.policy if stored is not None else file.policy, now_s)
        self.provider.set_desired(groups, self._desired, list(file.profiles))
        self._dirty.set()

    def _push_config(self, profiles: dict[str, EngineProfile], now_s: float) -> None:
        known = {**self.registration.profiles, **profiles}
        self.core.push(
            ConfigChanged(
                at_s=now_s,
                version=next(self._versions),
                pools=self._file.model_pools(),
                profiles=tuple(known[name] for name in sorted(known)),
            )
        )

    def _push_policy(self, policy: RoutingPolicy, now_s: float) -> None:
        self.core.push(PolicyChanged(at_s=now_s, version=next(self._versions), policy=policy))

    def _declare_local(self, workers: tuple[WorkerSpec, ...]) -> None:
        version = next(self._versions)
        self.core.push(SourceChanged(at_s=time.monotonic(), source=Source.PROVIDER, version=version, workers=workers))

    # What routers and probes see ----------------------------------------------------------------------------------

    def _router_failures(self, session: Session, failures: list[tuple[int, int]]) -> None:
        names = self._names
        named = tuple((names[ordinal], count) for ordinal, count in failures if ordinal in names)
        if named:
            session.failures_sequence += 1
            self.core.push(
                RouterFailures(
                    at_s=time.monotonic(),
                    replica_id=session.hello.replica_id,
                    stream=session.stream,
                    sequence=session.failures_sequence,
                    failures=named,
                )
            )
            if self._prober is not None:
                for target_id, count in named:
                    if count:
                        self._prober.probe_soon(target_id.partition("/")[0])

    def _router_gone(self, session: Session) -> None:
        self.core.push(RouterGone(at_s=time.monotonic(), replica_id=session.hello.replica_id, stream=session.stream))

    def _observe_probe(self, outcome: ProbeOutcome, seconds: float) -> None:
        self.probe_counts[outcome] += 1
        self.probe_seconds += seconds

    def _state_changed(self, state: FleetState) -> None:
        if state.changed or state.shared_changed:
            pools = state.pools
            if self._prober is not None:
                self._prober.set_workers(
                    (
                        worker_id,
                        record.spec.url,
                        pools[record.spec.pool].upstream_model or pools[record.spec.pool].models[0],
                    )
                    for worker_id, record in state.workers.items()
                )
            held = dict(state.ordinals.held)
            if held != self._ordinals:
                self._ordinals = held
                self._names = {ordinal: target_id for target_id, ordinal in held.items()}
                self.hub.keep_only(set(held.values()))

    def _inflight_target(self, target_id: str) -> tuple[int, int]:
        ordinal = self.core.state.ordinals.held.get(target_id)
        return (0, 0) if ordinal is None else self.hub.inflight(ordinal)

    def _inflight_worker(self, worker_id: str) -> int:
        record = self.core.state.workers.get(worker_id)
        return 0 if record is None else sum(self._inflight_target(target_id)[0] for target_id in record.spec.target_ids)

    def _ready(self, worker_id: str) -> bool:
        record = self.core.state.workers.get(worker_id)
        return record is not None and record.health is Health.HEALTHY

    # Operators ----------------------------------------------------------------------------------------------------

    def control(self, worker_id: str, *, cordoned: bool, draining: bool) -> list[Target]:
        """Cordon, drain or free a worker; its targets afterwards. Raises CallError for an unknown one."""
        if worker_id not in self.core.state.workers:
            raise not_found("worker_id", f"there is no worker {worker_id!r}")
        before = self.core.state.control(worker_id)
        if (before.cordoned, before.draining) != (cordoned, draining):
            version = before.version + 1
            control = StoredControl(worker_id=worker_id, version=version, cordoned=cordoned, draining=draining)
            self._controls.pop(worker_id, None)
            if cordoned or draining:
                self._controls[worker_id] = control
            self._push_control(control, time.monotonic())
            self.core.flush()
            self._persist_now()
            if draining:
                self._drained[worker_id] = (self.core.snapshot.version, time.monotonic())
            else:
                self._drained.pop(worker_id, None)
        return self.core.targets(worker_id)

    def drain(self, worker_id: str) -> tuple[list[Target], int, bool]:
        """Drain a worker: its targets, the requests still on it, whether it may be stopped. Raises CallError."""
        targets = self.control(worker_id, cordoned=self.core.state.control(worker_id).cordoned, draining=True)
        inflight = self._inflight_worker(worker_id)
        version, since_s = self._drained.get(worker_id, (0, 0.0))
        sessions = [session for session in self.hub.sessions() if session.connected]
        aware = all(
            session.snapshot_epoch == self.core.epoch and session.snapshot_version >= version for session in sessions
        )
        if not sessions:
            inflight = sum(target.load.running + target.load.waiting for target in targets)
        safe = inflight == 0 and aware and time.monotonic() - since_s >= SAFE_AFTER_S
        return targets, inflight, safe

    def set_policy(self, fields: dict[str, str]) -> RoutingPolicy:
        """Replace fields of the routing policy. Raises CallError naming a bad one."""
        policy = changed_policy(self.core.state.policy, fields)
        if policy != self.core.state.policy:
            self._push_policy(policy, time.monotonic())
            self.core.flush()
            self._stored_policy = StoredPolicy(
                version=self.core.state.policy_version, policy=policy, file_policy=self._file.policy
            )
            self._persist_now()
            log.info("policy changed", extra={"policy": policy.name})
        return policy

    def submit_plan(self, plan: list[Desired], reason: str) -> None:
        """Take over the desired state of a plan. Raises CallError naming the first bad field."""
        try:
            self._desired = submit(self._desired, plan, MAX_REPLICAS_PER_GROUP)
        except PlanError as error:
            code = grpc.StatusCode.FAILED_PRECONDITION if error.stale else grpc.StatusCode.INVALID_ARGUMENT
            raise CallError(code, f"{error.field}: {error}", field=error.field) from None
        log.info("plan accepted", extra={"pools": len(plan), "reason": reason[:500]})
        self.provider.set_desired(launch_groups(self._file), self._desired)
        self._persist_now()

    def _push_control(self, control: StoredControl, now_s: float) -> None:
        self.core.push(
            ControlChanged(
                at_s=now_s,
                worker_id=control.worker_id,
                version=control.version,
                cordoned=control.cordoned,
                draining=control.draining,
            )
        )

    # Store --------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._store.save(
            Persisted(
                epoch=self.core.epoch,
                controls=tuple(self._controls.values()),
                policy=self._stored_policy,
                desired=tuple(self._desired.values()),
                leases=self.leases.stored() or (self._persisted.leases if not self._tasks else ()),
            )
        )

    def _persist_now(self) -> None:
        """Keep an operator's change before it is answered. Raises CallError when it cannot be kept."""
        try:
            self._save()
        except OSError as error:
            self.store_faults += 1
            log.error("state cannot be kept", extra={"reason": str(error)})
            message = f"in force, but it will not survive a restart: {error.strerror}"
            raise CallError(grpc.StatusCode.DATA_LOSS, message) from None

    async def _save_loop(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                self._save()
            except OSError as error:
                self.store_faults += 1
                log.error("state cannot be kept", extra={"reason": str(error)})
            await asyncio.sleep(1.0)


def file_workers(file: FleetFile) -> tuple[WorkerSpec, ...]:
    """The existing workers that a fleet file lists by URL."""
    extra = file.user_profiles()
    specs: list[WorkerSpec] = []
    names: Counter[str] = Counter()
    for pool in file.pools:
        for group in pool.workers:
            profile = group_profile(group, extra)
            for url in group.urls:
                parts = urlsplit(url)
                host = re.sub(r"[^A-Za-z0-9.-]", "-", parts.hostname or "")[:64].strip("-")
                name = f"{pool.name[:48]}-{host}-{parts.port}"
                names[name] += 1
                specs.append(
                    WorkerSpec(
                        # Hosts that differ only in what an id cannot hold are told apart by a number.
                        worker_id=name if names[name] == 1 else f"{name}-{names[name]}",
                        url=url.rstrip("/"),
                        pool=pool.name,
                        profile=profile.name,
                        data_parallel_size=group.data_parallel_size or profile.data_parallel,
                        zone=group.zone,
                    )
                )
    return tuple(specs)
