"""Workers that announce themselves, for as long as they renew."""

import heapq
import secrets
from collections.abc import Iterable

import msgspec

from controlplane.fleet.values import WorkerSpec
from controlplane.store.values import StoredLease

MAX_LEASES = 16_384
MIN_TTL_S = 5.0
MAX_TTL_S = 600.0
RENEW_SHARE = 1 / 3
"""A lease is to be renewed after this share of its time, so that two renewals may be lost."""


class LeaseError(ValueError):
    """A lease that cannot be given, or is not known."""


class Lease(msgspec.Struct, kw_only=True):
    """One lease; ``until_s`` in monotonic seconds."""

    lease_id: str
    spec: WorkerSpec
    ttl_s: float
    until_s: float


class Leases:
    """All leases. Times are passed in; ``changed`` is set whenever the set of workers differs from before."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._expiries: list[tuple[float, str]] = []
        self.changed = False
        self.expired = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._leases)

    def register(self, spec: WorkerSpec, ttl_s: float, now_s: float) -> Lease:
        """Begin or renew the lease of a worker. Raises LeaseError when there are too many."""
        lease = self._leases.get(spec.worker_id)
        if lease is None:
            if len(self._leases) >= MAX_LEASES:
                self.refused += 1
                raise LeaseError(f"there are {MAX_LEASES} leases already")
            lease = Lease(lease_id=secrets.token_hex(8), spec=spec, ttl_s=ttl_s, until_s=0.0)
            self._leases[spec.worker_id] = lease
            self.changed = True
        elif lease.spec != spec:
            lease.spec = spec
            self.changed = True
        lease.ttl_s, lease.until_s = ttl_s, now_s + ttl_s
        heapq.heappush(self._expiries, (lease.until_s, spec.worker_id))
        if len(self._expiries) > 4 * len(self._leases) + 64:
            self._expiries = [(lease.until_s, worker_id) for worker_id, lease in self._leases.items()]
            heapq.heapify(self._expiries)
        return lease

    def deregister(self, worker_id: str, lease_id: str) -> None:
        """End a lease. Raises LeaseError when it is not known."""
        lease = self._leases.get(worker_id)
        if lease is None or not secrets.compare_digest(lease.lease_id, lease_id):
            raise LeaseError(f"worker {worker_id!r} has no such lease")
        del self._leases[worker_id]
        self.changed = True

    def expire(self, now_s: float) -> list[str]:
        """End the leases whose time is over; their workers."""
        gone = []
        while self._expiries and self._expiries[0][0] <= now_s:
            _, worker_id = heapq.heappop(self._expiries)
            lease = self._leases.get(worker_id)
            if lease is not None and lease.until_s <= now_s:
                del self._leases[worker_id]
                gone.append(worker_id)
                self.expired += 1
                self.changed = True
        return gone

    def next_expiry_s(self) -> float | None:
        """When ``expire`` may have something to do."""
        return self._expiries[0][0] if self._expiries else None

    def workers(self) -> tuple[WorkerSpec, ...]:
        """The registered workers, by id."""
        return tuple(self._leases[worker_id].spec for worker_id in sorted(self._leases))

    def stored(self) -> tuple[StoredLease, ...]:
        """What a restart needs."""
        return tuple(
            StoredLease(
                lease_id=lease.lease_id,
                worker_id=lease.spec.worker_id,
                url=lease.spec.url,
                pool=lease.spec.pool,
                profile=lease.spec.profile,
                data_parallel_size=lease.spec.data_parallel_size,
                zone=lease.spec.zone,
                node=lease.spec.node,
                incarnation=lease.spec.incarnation,
                ttl_s=lease.ttl_s,
            )
            for lease in self._leases.values()
        )

    def restore(self, stored: Iterable[StoredLease], now_s: float) -> None:
        """Leases of an earlier life of the control plane: they get their full time to be renewed."""
        for item in stored:
            spec = WorkerSpec(
                worker_id=item.worker_id,
                url=item.url,
                pool=item.pool,
                profile=item.profile,
                data_parallel_size=item.data_parallel_size,
                zone=item.zone,
                node=item.node,
                incarnation=item.incarnation,
            )
            lease = Lease(lease_id=item.lease_id, spec=spec, ttl_s=item.ttl_s, until_s=now_s + item.ttl_s)
            self._leases[item.worker_id] = lease
            heapq.heappush(self._expiries, (lease.until_s, item.worker_id))
            self.changed = True
