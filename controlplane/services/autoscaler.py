"""AutoscalerService: demand down, plans up."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from controlplane.app import ControlPlane
from controlplane.convert import checked_number, desired_from_proto, status_to_proto
from controlplane.routers.demand import difference
from controlplane.rpc.errors import invalid
from twofold import wire
from twofold.v1 import autoscaler_pb2

MAX_REASON = 4096
MAX_POOLS = 10_000


class AutoscalerService:
    """See autoscaler.proto."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    async def WatchDemand(
        self, request: autoscaler_pb2.WatchDemandRequest, context: Any
    ) -> AsyncIterator[autoscaler_pb2.Demand]:
        """What all routers saw, interval by interval. The first message comes after one interval."""
        interval_s = checked_number("interval_s", request.interval_s, 1.0, 300.0)
        book = self._control_plane.hub.demand
        before, before_s = book.totals(), time.monotonic()
        while True:
            await asyncio.sleep(interval_s)
            now, now_s = book.totals(), time.monotonic()
            snapshot = self._control_plane.core.live_snapshot()
            yield autoscaler_pb2.Demand(
                at_s=time.time(),
                interval_s=now_s - before_s,
                pools=difference(now, before),
                targets=[wire.target_to_proto(target) for target in snapshot.targets],
            )
            before, before_s = now, now_s

    async def SubmitPlan(self, request: autoscaler_pb2.Plan, context: Any) -> autoscaler_pb2.PlanStatus:
        """Replace the desired state of the pools in the plan."""
        if len(request.reason) > MAX_REASON:
            raise invalid("reason", f"longer than {MAX_REASON} characters")
        if len(request.pools) > MAX_POOLS:
            raise invalid("pools", f"more than {MAX_POOLS}")
        self._control_plane.submit_plan([desired_from_proto(pool) for pool in request.pools], request.reason)
        return self._status()

    async def GetPlan(self, request: autoscaler_pb2.GetPlanRequest, context: Any) -> autoscaler_pb2.PlanStatus:
        """What is desired and what is there."""
        return self._status()

    def _status(self) -> autoscaler_pb2.PlanStatus:
        statuses = self._control_plane.provider.status()
        return autoscaler_pb2.PlanStatus(pools=[status_to_proto(status) for status in statuses])
