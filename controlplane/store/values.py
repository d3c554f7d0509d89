"""The stored values."""

import msgspec

from controlplane.plan import Desired
from twofold.model.fleet import RoutingPolicy


class StoredControl(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's order for a worker."""

    worker_id: str
    version: int
    cordoned: bool = False
    draining: bool = False


class StoredPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A policy set by an operator; it holds until the fleet file's own policy is changed from ``file_policy``."""

    version: int
    policy: RoutingPolicy
    file_policy: RoutingPolicy


class StoredLease(msgspec.Struct, frozen=True, kw_only=True):
    """A registered worker."""

    lease_id: str
    worker_id: str
    url: str
    pool: str
    profile: str
    data_parallel_size: int
    zone: str
    node: str
    incarnation: int
    ttl_s: float


class Persisted(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. ``epoch`` is the last epoch used."""

    epoch: int = 0
    controls: tuple[StoredControl, ...] = ()
    policy: StoredPolicy | None = None
    desired: tuple[Desired, ...] = ()
    leases: tuple[StoredLease, ...] = ()
