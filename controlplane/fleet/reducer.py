"""``reduce``: the only way the fleet state changes."""

from collections.abc import Iterable

from msgspec.structs import replace

from controlplane.fleet import health
from controlplane.fleet.conditions import agree, conditions, serves
from controlplane.fleet.events import (
    ConfigChanged,
    ControlChanged,
    Event,
    PolicyChanged,
    ProbeResult,
    RouterFailures,
    RouterGone,
    SourceChanged,
)
from controlplane.fleet.state import MAX_CONTROLS, MAX_REPLICAS, Draft, FleetState
from controlplane.fleet.values import (
    MAX_RANKS,
    Control,
    RankRecord,
    RouterReport,
    Source,
    WorkerRecord,
    WorkerSpec,
)
from twofold.model.fleet import Health

_ENDED = 1 << 62
"""Sequence of a replica's stream that is over."""
_PRECEDENCE = (Source.FILE, Source.PROVIDER, Source.LEASE)


def reduce(state: FleetState, events: Iterable[Event]) -> FleetState:
    """The state after a batch of events; ``state`` itself when there are none.

    Duplicates change nothing; late events that a newer one of the same key has overtaken change nothing.
    """
    batch = list(events)
    if not batch:
        return state
    draft = Draft(state)
    for event in batch:
        draft.now_s = max(draft.now_s, event.at_s)
        if draft.members_changed and not isinstance(event, SourceChanged | ConfigChanged):
            # What follows may be about a worker that was declared just before.
            _settle_members(draft)
        _apply(draft, event)
    if draft.members_changed:
        _settle_members(draft)
    if draft.stale_pools:
        _settle_pools(draft)
    return draft.finish()


def _apply(draft: Draft, event: Event) -> None:
    if isinstance(event, ProbeResult):
        _probe(draft, event)
    elif isinstance(event, RouterFailures):
        _failures(draft, event)
    elif isinstance(event, RouterGone):
        _router_gone(draft, event)
    elif isinstance(event, SourceChanged):
        known = draft.sources.get(event.source)
        if known is None or event.version > known[0]:
            draft.sources[event.source] = (event.version, {spec.worker_id: spec for spec in event.workers})
            draft.members_changed = True
    elif isinstance(event, ControlChanged):
        _control(draft, event)
    elif isinstance(event, ConfigChanged):
        if event.version > draft.config_version:
            draft.config_version = event.version
            draft.declared_pools = {pool.name: pool for pool in event.pools}
            draft.profiles = {profile.name: profile for profile in event.profiles}
            draft.members_changed = draft.shared_changed = True
            draft.stale_pools.update(draft.declared_pools, draft.pools)
            draft.changed.update(draft.workers)
    elif isinstance(event, PolicyChanged) and event.version > draft.policy_version:
        draft.policy_version = event.version
        draft.policy = event.policy
        draft.shared_changed = True


def _probe(draft: Draft, event: ProbeResult) -> None:
    before = draft.workers.get(event.worker_id)
    if before is None or event.sequence <= before.probe_sequence or event.url != before.spec.url:
        return
    pool = draft.pools.get(before.spec.pool)
    facts = event.facts if event.facts is not None else before.facts
    after = health.after_probe(
        before,
        event,
        draft.reports.get(event.worker_id, {}),
        draft.rules,
        model_missing=pool is not None and not serves(pool, facts),
    )
    if after.health is Health.HEALTHY and before.health is not Health.HEALTHY:
        _forgive(draft, event.worker_id)
    if after.facts != before.facts or (after.health is Health.GONE) != (before.health is Health.GONE):
        draft.stale_pools.add(before.spec.pool)
    _store(draft, before, after, event.at_s)


def _failures(draft: Draft, event: RouterFailures) -> None:
    last = draft.replicas.get(event.replica_id)
    if last is not None and (event.stream, event.sequence) <= last:
        return
    if last is None and not _room_for_replica(draft):
        return
    if last is not None and event.stream > last[0]:
        _forget_replica(draft, event.replica_id, event.at_s)
    draft.replicas[event.replica_id] = (event.stream, event.sequence)
    grown: dict[str, bool] = {}
    for target_id, failures in event.failures:
        worker_id = target_id.partition("/")[0]
        record = draft.workers.get(worker_id)
        if record is None or target_id not in record.spec.target_ids:
            continue
        reports = dict(draft.reports.get(worker_id, {}))
        key = f"{event.replica_id} {target_id}"
        before = reports.get(key)
        if failures <= 0:
            reports.pop(key, None)
        else:
            forgiven = min(before.forgiven, failures) if before is not None else 0
            reports[key] = RouterReport(failures=failures, forgiven=forgiven)
        _keep_reports(draft, worker_id, reports)
        grown[worker_id] = grown.get(worker_id, False) or failures > (before.failures if before is not None else 0)
    for worker_id, grew in grown.items():
        _settle_reports(draft, worker_id, event.at_s, grew=grew)


def _router_gone(draft: Draft, event: RouterGone) -> None:
    last = draft.replicas.get(event.replica_id)
    if last is not None and event.stream >= last[0]:
        _forget_replica(draft, event.replica_id, event.at_s)
        # Kept, so that a late report of the ended stream is not taken for news.
        draft.replicas[event.replica_id] = (event.stream, _ENDED)


def _room_for_replica(draft: Draft) -> bool:
    if len(draft.replicas) >= MAX_REPLICAS:
        ended = next((key for key, (_, sequence) in draft.replicas.items() if sequence == _ENDED), None)
        if ended is None:
            return False
        del draft.replicas[ended]
    return True


def _forget_replica(draft: Draft, replica_id: str, at_s: float) -> None:
    prefix = f"{replica_id} "
    for worker_id, reports in list(draft.reports.items()):
        kept = {key: report for key, report in reports.items() if not key.startswith(prefix)}
        if len(kept) != len(reports):
            _keep_reports(draft, worker_id, kept)
            _settle_reports(draft, worker_id, at_s, grew=False)


def _keep_reports(draft: Draft, worker_id: str, reports: dict[str, RouterReport]) -> None:
    if reports:
        draft.reports[worker_id] = reports
    else:
        draft.reports.pop(worker_id, None)


def _settle_reports(draft: Draft, worker_id: str, at_s: float, *, grew: bool) -> None:
    record = draft.workers.get(worker_id)
    if record is not None:
        after = health.after_reports(record, draft.reports.get(worker_id, {}), at_s, grew=grew)
        _store(draft, record, after, at_s)


def _forgive(draft: Draft, worker_id: str) -> None:
    reports = draft.reports.get(worker_id)
    if reports:
        draft.reports[worker_id] = {key: replace(report, forgiven=report.failures) for key, report in reports.items()}


def _control(draft: Draft, event: ControlChanged) -> None:
    before = draft.controls.get(event.worker_id)
    if before is not None and event.version <= before.version:
        return
    if before is None and len(draft.controls) >= MAX_CONTROLS:
        idle = next((key for key, old in draft.controls.items() if not (old.cordoned or old.draining)), None)
        if idle is None:
            return
        del draft.controls[idle]
    draft.controls[event.worker_id] = Control(version=event.version, cordoned=event.cordoned, draining=event.draining)
    if event.worker_id in draft.workers:
        draft.changed.add(event.worker_id)
        word = "draining" if event.draining else "cordoned" if event.cordoned else "uncordoned"
        draft.log(event.worker_id, event.at_s, word, "by an operator")


def _store(draft: Draft, before: WorkerRecord, after: WorkerRecord, at_s: float) -> None:
    """Keep a worker's new record; write its history; note what routers must hear of."""
    if after is before:
        return
    worker_id = after.spec.worker_id
    after = replace(after, conditions=conditions(after, draft.pools.get(after.spec.pool)))
    draft.workers[worker_id] = after
    if after.health is not before.health:
        draft.log(worker_id, at_s, after.health.value, after.message or f"was {before.health.value}")
    elif after.message and after.message != before.message:
        draft.log(worker_id, at_s, "probe", after.message)
    for condition in after.conditions:
        if condition not in before.conditions:
            draft.log(worker_id, at_s, condition.value, after.message or "began")
    for condition in before.conditions:
        if condition not in after.conditions:
            draft.log(worker_id, at_s, condition.value, "ended")
    stalls = [new.stalled != old.stalled for new, old in zip(after.ranks, before.ranks, strict=True)]
    for rank, turned in enumerate(stalls):
        if turned:
            word = "requests run and no iteration completes" if after.ranks[rank].stalled else "ended"
            draft.log(worker_id, at_s, "stalled", word, after.spec.target_ids[rank])
    if (
        after.health is not before.health
        or after.conditions != before.conditions
        or after.facts != before.facts
        or after.incarnation != before.incarnation
        or any(stalls)
    ):
        draft.changed.add(worker_id)
    elif any(new.load != old.load for new, old in zip(after.ranks, before.ranks, strict=True)):
        draft.load_changed.add(worker_id)


def _settle_members(draft: Draft) -> None:
    """Workers are what the sources declare, in pools and with profiles that exist."""
    draft.members_changed = False
    specs: dict[str, tuple[Source, WorkerSpec]] = {}
    for source in _PRECEDENCE:
        for worker_id, spec in draft.sources.get(source, (0, {}))[1].items():
            if worker_id not in specs and spec.pool in draft.declared_pools and spec.profile in draft.profiles:
                specs[worker_id] = (source, spec)
    for worker_id in [worker_id for worker_id in draft.workers if worker_id not in specs]:
        draft.stale_pools.add(draft.workers[worker_id].spec.pool)
        draft.log(worker_id, draft.now_s, "removed", f"no longer declared by {draft.workers[worker_id].source.value}")
        del draft.workers[worker_id]
        draft.reports.pop(worker_id, None)
        draft.changed.add(worker_id)
    for worker_id, (source, spec) in specs.items():
        before = draft.workers.get(worker_id)
        if before is not None and before.spec == spec and before.source is source:
            continue
        draft.workers[worker_id] = _joined(before, source, spec, draft.now_s)
        draft.changed.add(worker_id)
        draft.stale_pools.add(spec.pool)
        if before is not None:
            draft.stale_pools.add(before.spec.pool)
        if before is None or before.spec.url != spec.url:
            draft.log(worker_id, draft.now_s, "starting", f"declared by {source.value} at {spec.url}")
        elif draft.workers[worker_id].incarnation != before.incarnation:
            draft.log(worker_id, draft.now_s, "starting", "its engine ended or was started anew")
    targets = (target for record in draft.workers.values() for target in record.spec.target_ids)
    draft.ordinals = draft.ordinals.assign(targets, draft.now_s, draft.rules.ordinal_quarantine_s)


def _joined(before: WorkerRecord | None, source: Source, spec: WorkerSpec, now_s: float) -> WorkerRecord:
    ranks = tuple(RankRecord(moved_s=now_s) for _ in range(max(1, min(spec.data_parallel_size, MAX_RANKS))))
    fresh = WorkerRecord(spec=spec, source=source, ranks=ranks, since_s=now_s, incarnation=spec.incarnation)
    if before is None:
        return fresh
    same_engine = (
        before.spec.url == spec.url
        and before.spec.pool == spec.pool
        and before.spec.data_parallel_size == spec.data_parallel_size
        and before.spec.incarnation == spec.incarnation
    )
    if same_engine:
        return replace(before, spec=spec, source=source)
    # A new engine under an old name: nothing that was measured of the old one holds.
    return replace(
        fresh,
        incarnation=max(before.incarnation + 1, spec.incarnation),
        probe_sequence=before.probe_sequence,
        flaps=before.flaps,
        flapped_s=before.flapped_s,
    )


def _settle_pools(draft: Draft) -> None:
    """What the engines of the touched pools agree on, and the conditions that follow from it."""
    members: dict[str, list[WorkerRecord]] = {name: [] for name in draft.stale_pools}
    for record in draft.workers.values():
        if record.spec.pool in members:
            members[record.spec.pool].append(record)
    pools = {name: pool for name, pool in draft.pools.items() if name in draft.declared_pools}
    for name, records in members.items():
        declared = draft.declared_pools.get(name)
        if declared is not None:
            pools[name] = agree(declared, draft.pools.get(name), records)
    if pools != draft.pools:
        draft.shared_changed = True
    draft.pools = pools
    for name, records in members.items():
        for record in records:
            found = conditions(record, pools.get(name))
            if found != record.conditions:
                _store(draft, record, replace(record, conditions=found), draft.now_s)
