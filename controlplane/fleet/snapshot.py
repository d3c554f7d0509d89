"""Snapshots of the state, version by version."""

from bisect import bisect_left

from msgspec.structs import replace

from controlplane.fleet.state import FleetState
from controlplane.fleet.values import WorkerRecord
from twofold.model.fleet import FleetSnapshot, Target


class SnapshotBuilder:
    """Builds the snapshots of one epoch; work is proportional to what changed, plus one copy of the target list.

    Targets carry no engine load here: routers keep exact accounts themselves and would be woken by every probe.
    ``live`` adds the latest.
    """

    def __init__(self, epoch: int) -> None:
        self._snapshot = FleetSnapshot(epoch=epoch, version=0)
        self._targets: dict[str, tuple[Target, ...]] = {}
        self._order: list[Target] = []

    @property
    def snapshot(self) -> FleetSnapshot:
        """The last snapshot built."""
        return self._snapshot

    def build(self, state: FleetState) -> FleetSnapshot:
        """The snapshot after ``state``'s last batch: the previous one when routers need to know nothing new."""
        moved = False
        for worker_id in state.changed:
            moved |= self._replace(worker_id, state)
        before = self._snapshot
        after = replace(
            before,
            pools=tuple(state.pools[name] for name in sorted(state.pools)) if state.shared_changed else before.pools,
            profiles=tuple(state.profiles[name] for name in sorted(state.profiles))
            if state.shared_changed
            else before.profiles,
            policy=state.policy,
            targets=tuple(self._order) if moved else before.targets,
        )
        if moved or after != before:
            self._snapshot = replace(after, version=before.version + 1)
        return self._snapshot

    def _replace(self, worker_id: str, state: FleetState) -> bool:
        record = state.workers.get(worker_id)
        old = self._targets.get(worker_id, ())
        new = () if record is None else targets_of(record, state)
        if new == old:
            return False
        for target in old:
            del self._order[bisect_left(self._order, target.target_id, key=_target_id)]
        for target in new:
            self._order.insert(bisect_left(self._order, target.target_id, key=_target_id), target)
        if new:
            self._targets[worker_id] = new
        else:
            self._targets.pop(worker_id, None)
        return True


def live(state: FleetState, snapshot: FleetSnapshot) -> FleetSnapshot:
    """``snapshot`` with the latest load of every engine; for operators, not for routers."""
    targets = tuple(
        replace(target, load=record.ranks[target.data_parallel_rank or 0].load)
        if (record := state.workers.get(target.worker_id)) is not None
        else target
        for target in snapshot.targets
    )
    return replace(snapshot, targets=targets)


def targets_of(record: WorkerRecord, state: FleetState) -> tuple[Target, ...]:
    """The targets of one worker as routers see them."""
    spec, profile = record.spec, state.profiles[record.spec.profile]
    control = state.control(spec.worker_id)
    ranked = spec.data_parallel_size > 1
    share = spec.data_parallel_size if ranked and profile.data_parallel > 1 else 1
    return tuple(
        Target(
            target_id=target_id,
            worker_id=spec.worker_id,
            pool=spec.pool,
            url=spec.url,
            profile=spec.profile,
            ordinal=state.ordinals.held[target_id],
            weight_tokens_s=profile.capacity_tokens_s() / share,
            data_parallel_rank=rank if ranked else None,
            health=record.target_health(rank),
            cordoned=control.cordoned,
            draining=control.draining or spec.draining,
            conditions=record.target_conditions(rank),
            facts=record.facts,
            zone=spec.zone,
            node=spec.node,
            role=spec.role,
            incarnation=record.incarnation,
        )
        for rank, target_id in enumerate(spec.target_ids)
    )


def _target_id(target: Target) -> str:
    return target.target_id
