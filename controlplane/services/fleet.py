"""FleetService: the fleet to routers, leases to workers."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from controlplane.app import ControlPlane
from controlplane.convert import checked_name, checked_number, spec_from_register
from controlplane.discovery.leases import MAX_TTL_S, MIN_TTL_S, RENEW_SHARE
from twofold.v1 import fleet_pb2


class FleetService:
    """See fleet.proto."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    async def Watch(self, request: fleet_pb2.WatchRequest, context: Any) -> AsyncIterator[bytes]:
        """Snapshot, deltas, keepalives."""
        replica_id = checked_name("replica_id", request.replica_id)
        core, hub = self._control_plane.core, self._control_plane.hub
        async with aclosing(core.feed.read(request.epoch, request.version)) as messages:
            async for message in messages:
                yield message
                current = core.feed.current
                if current is not None and message:
                    hub.saw_snapshot(replica_id, current.epoch, current.version)

    async def Register(self, request: fleet_pb2.RegisterRequest, context: Any) -> fleet_pb2.RegisterResponse:
        """Begin or renew a lease."""
        spec = spec_from_register(request)
        ttl_s = checked_number("lease_ttl_s", request.lease_ttl_s, MIN_TTL_S, MAX_TTL_S)
        lease = self._control_plane.registration.register(spec, ttl_s)
        return fleet_pb2.RegisterResponse(lease_id=lease.lease_id, renew_within_s=ttl_s * RENEW_SHARE)

    async def Deregister(self, request: fleet_pb2.DeregisterRequest, context: Any) -> fleet_pb2.DeregisterResponse:
        """End a lease."""
        self._control_plane.registration.deregister(request.worker_id, request.lease_id)
        return fleet_pb2.DeregisterResponse()
