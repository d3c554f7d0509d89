"""Workers that register themselves: leases, the profiles they name, and what the fleet hears of both."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping

import grpc

from controlplane.core import Core
from controlplane.discovery.leases import Lease, LeaseError, Leases
from controlplane.fleet.events import SourceChanged
from controlplane.fleet.values import Source, WorkerSpec
from controlplane.rpc.errors import CallError, not_found
from controlplane.store import StoredLease
from twofold.model.profile import EngineProfile
from twofold.profiles import ProfileError, get

log = logging.getLogger(__name__)

CHECK_S = 0.5


class Registration:
    """Gives out leases and declares their workers to the fleet.

    ``profile_added`` is called when a lease named a profile that the configuration does not have yet (see
    ``profiles``), ``changed`` when there is something to store.
    """

    def __init__(
        self,
        leases: Leases,
        core: Core,
        *,
        next_version: Callable[[], int],
        user_profiles: Callable[[], Mapping[str, EngineProfile]],
        profile_added: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._leases = leases
        self._core = core
        self._next_version = next_version
        self._user_profiles = user_profiles
        self._profile_added = profile_added
        self._changed = changed
        self.profiles: dict[str, EngineProfile] = {}
        """Profiles that leases named, beside those of the fleet file."""

    def restore(self, stored: Iterable[StoredLease], now_s: float) -> None:
        """Take up the leases of an earlier life of the control plane."""
        leases = list(stored)
        self._leases.restore(leases, now_s)
        for lease in leases:
            self._know_profile(lease.profile)
        self._declare()

    async def run(self) -> None:
        """End leases that are not renewed, for ever."""
        while True:
            for worker_id in self._leases.expire(time.monotonic()):
                log.warning("lease ended without renewal", extra={"worker_id": worker_id})
            self._declare()
            await asyncio.sleep(CHECK_S)

    def register(self, spec: WorkerSpec, ttl_s: float) -> Lease:
        """Begin or renew a worker's lease. Raises CallError for an unknown pool or profile, or one id too many."""
        state = self._core.state
        if not state.config_version:
            raise CallError(grpc.StatusCode.UNAVAILABLE, "the control plane is starting")
        if spec.pool not in state.declared_pools:
            raise not_found("pool", f"there is no pool {spec.pool!r}")
        record = state.workers.get(spec.worker_id)
        if record is not None and record.source is not Source.LEASE:
            message = f"worker {spec.worker_id!r} is already declared by the {record.source.value}"
            raise CallError(grpc.StatusCode.ALREADY_EXISTS, message, field="worker_id")
        if self._know_profile(spec.profile) is None:
            raise CallError(
                grpc.StatusCode.INVALID_ARGUMENT, f"profile: unknown engine profile {spec.profile!r}", field="profile"
            )
        try:
            lease = self._leases.register(spec, ttl_s, time.monotonic())
        except LeaseError as error:
            raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
        self._declare()
        return lease

    def deregister(self, worker_id: str, lease_id: str) -> None:
        """End a lease. Raises CallError when it is not known."""
        try:
            self._leases.deregister(worker_id, lease_id)
        except LeaseError as error:
            raise not_found("lease_id", str(error)) from None
        self._declare()

    def _declare(self) -> None:
        if self._leases.changed:
            self._leases.changed = False
            workers = self._leases.workers()
            version = self._next_version()
            self._core.push(SourceChanged(at_s=time.monotonic(), source=Source.LEASE, version=version, workers=workers))
            self._changed()

    def _know_profile(self, name: str) -> EngineProfile | None:
        """The profile that a lease names, made part of the configuration when it is not yet."""
        known = self._core.state.profiles.get(name) or self.profiles.get(name)
        if known is not None:
            return known
        try:
            profile = get(name, self._user_profiles())
        except ProfileError:
            return None
        self.profiles[name] = profile
        if self._core.state.config_version:
            self._profile_added()
        return profile
