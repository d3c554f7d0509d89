"""The desired state of pools: what the fleet file says, until a submitted plan says otherwise."""

from collections.abc import Iterable, Mapping

import msgspec

from controlplane.discovery.fleet_file import FleetFile, WorkerGroup, group_profile

MAX_VICTIMS = 10_000

Key = tuple[str, str, str]
"""Pool, profile and zone."""


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """Desired state of one pool x profile x zone. ``file_replicas`` is what the fleet file said when it was made."""

    pool: str
    profile: str
    replicas: int
    zone: str = ""
    victims: tuple[str, ...] = ()
    routing_share: float = 0.0
    generation: int = 1
    file_replicas: int = -1

    @property
    def key(self) -> Key:
        """What it is the desired state of."""
        return (self.pool, self.profile, self.zone)


class PlanError(ValueError):
    """A plan that cannot be accepted. ``field`` names the culprit; ``stale`` is set when its generation is too old."""

    def __init__(self, field: str, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.stale = stale


class LaunchGroup(msgspec.Struct, frozen=True, kw_only=True):
    """How to run the engines of one key."""

    pool: str
    model: str
    profile: str
    """Name as the fleet sees it."""
    group: WorkerGroup
    data_parallel_size: int = 1
    kv_events: bool = False

    @property
    def key(self) -> Key:
        """Pool, profile, zone."""
        return (self.pool, self.profile, self.group.zone)


def launch_groups(file: FleetFile) -> dict[Key, LaunchGroup]:
    """The groups of engines that a fleet file asks to run."""
    extra = file.user_profiles()
    groups = {}
    for pool in file.pools:
        for group in pool.workers:
            if not group.urls:
                profile = group_profile(group, extra)
                launch = LaunchGroup(
                    pool=pool.name,
                    model=pool.upstream_model or pool.models[0],
                    profile=profile.name,
                    group=group,
                    data_parallel_size=group.data_parallel_size or profile.data_parallel,
                    kv_events=pool.kv_events,
                )
                groups[launch.key] = launch
    return groups


def settle(groups: Mapping[Key, LaunchGroup], known: Mapping[Key, Desired]) -> dict[Key, Desired]:
    """Desired state after the fleet file was read: a plan stands unless the file's own number was changed since."""
    settled = {}
    for key, launch in groups.items():
        before = known.get(key)
        replicas = launch.group.replicas
        if before is not None and before.file_replicas == replicas:
            settled[key] = before
            continue
        settled[key] = Desired(
            pool=launch.pool,
            profile=launch.profile,
            zone=launch.group.zone,
            replicas=replicas,
            generation=before.generation + 1 if before is not None else 1,
            file_replicas=replicas,
        )
    return settled


def submit(known: Mapping[Key, Desired], plan: Iterable[Desired], max_replicas: int) -> dict[Key, Desired]:
    """Desired state after a plan; all of it is accepted or none. Raises PlanError naming the first bad field."""
    after = dict(known)
    seen: set[Key] = set()
    for index, item in enumerate(plan):
        field = f"pools[{index}]"
        before = known.get(item.key)
        if before is None:
            pools = {key[0] for key in known}
            part = "profile" if item.pool in pools else "pool"
            raise PlanError(
                f"{field}.{part}", f"no engines of {item.pool}/{item.profile}/{item.zone or '-'} can be run"
            )
        if item.key in seen:
            raise PlanError(field, "the same pool, profile and zone is named twice")
        seen.add(item.key)
        if item.replicas > max_replicas:
            raise PlanError(f"{field}.replicas", f"more than {max_replicas}")
        if not 0.0 <= item.routing_share <= 1.0:
            raise PlanError(f"{field}.routing_share", "not within 0..1")
        if len(item.victims) > MAX_VICTIMS:
            raise PlanError(f"{field}.victims", f"more than {MAX_VICTIMS}")
        if item.generation <= before.generation:
            message = f"generation {item.generation} is not above the present {before.generation}"
            raise PlanError(f"{field}.generation", message, stale=True)
        after[item.key] = msgspec.structs.replace(item, file_replicas=before.file_replicas)
    return after
