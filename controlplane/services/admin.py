"""AdminService: what routerctl asks for."""

import asyncio
import time
from typing import Any

import grpc

from controlplane.app import ControlPlane
from controlplane.convert import checked_number, event_to_proto, loads_to_proto
from controlplane.routers.hub import HubError
from controlplane.rpc.errors import CallError, invalid, not_found
from twofold import wire
from twofold.v1 import admin_pb2, fleet_pb2, router_pb2

EXPLAIN_DEADLINE_S = 3.0
TOP_DEADLINE_S = 1.0
MAX_BODY_BYTES = 4 << 20
EXPLAINED_PATHS = ("/v1/completions", "/v1/chat/completions")
MAX_HEADERS = 128


class AdminService:
    """See admin.proto."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    async def GetFleet(self, request: admin_pb2.GetFleetRequest, context: Any) -> fleet_pb2.FleetSnapshot:
        """The fleet with the latest loads."""
        return wire.snapshot_to_proto(self._control_plane.core.live_snapshot())

    async def ListRouters(self, request: admin_pb2.ListRoutersRequest, context: Any) -> admin_pb2.ListRoutersResponse:
        """Connected replicas, and those that went away just now."""
        now_s = time.monotonic()
        return admin_pb2.ListRoutersResponse(
            routers=[
                admin_pb2.RouterInfo(
                    hello=session.hello,
                    connected=session.connected,
                    last_seen_s=max(0.0, now_s - session.seen_s),
                    snapshot_epoch=session.snapshot_epoch,
                    snapshot_version=session.snapshot_version,
                    inflight=max(0, session.load.inflight),
                )
                for session in self._control_plane.hub.sessions()
            ]
        )

    async def DescribeWorker(
        self, request: admin_pb2.DescribeWorkerRequest, context: Any
    ) -> admin_pb2.DescribeWorkerResponse:
        """One worker with its history; also one that left, for as long as its history is kept."""
        core = self._control_plane.core
        worker_id = request.worker_id.partition("/")[0]
        log = core.state.logs.get(worker_id, ())
        targets = core.targets(worker_id)
        if not targets and not log:
            raise not_found("worker_id", f"there is no worker {request.worker_id[:128]!r}")
        offset_s = time.time() - time.monotonic()
        response = admin_pb2.DescribeWorkerResponse(
            targets=[wire.target_to_proto(target) for target in targets],
            events=[event_to_proto(entry, offset_s) for entry in reversed(log)],
        )
        if targets:
            response.profile.CopyFrom(wire.profile_to_proto(core.state.profiles[targets[0].profile]))
        names = {target.ordinal: target.target_id for target in targets}
        for session in self._control_plane.hub.sessions():
            response.loads.extend(loads_to_proto(session.load, names))
        return response

    async def Cordon(self, request: admin_pb2.CordonRequest, context: Any) -> admin_pb2.CordonResponse:
        """No new work."""
        draining = self._control_plane.core.state.control(request.worker_id).draining
        targets = self._control_plane.control(request.worker_id, cordoned=True, draining=draining)
        return admin_pb2.CordonResponse(targets=[wire.target_to_proto(target) for target in targets])

    async def Uncordon(self, request: admin_pb2.UncordonRequest, context: Any) -> admin_pb2.UncordonResponse:
        """Take work again; ends a drain too."""
        targets = self._control_plane.control(request.worker_id, cordoned=False, draining=False)
        return admin_pb2.UncordonResponse(targets=[wire.target_to_proto(target) for target in targets])

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainResponse:
        """No new work, and when it may be stopped."""
        targets, inflight, safe = self._control_plane.drain(request.worker_id)
        return admin_pb2.DrainResponse(
            targets=[wire.target_to_proto(target) for target in targets], inflight=inflight, safe_to_delete=safe
        )

    async def Explain(self, request: admin_pb2.ExplainRequest, context: Any) -> admin_pb2.ExplainResponse:
        """A past decision, asked of every router, or a hypothetical one, asked of one."""
        deadline_s = EXPLAIN_DEADLINE_S
        if request.deadline_s:
            deadline_s = checked_number("deadline_s", request.deadline_s, 0.1, 30.0)
        kind = request.subject.WhichOneof("subject")
        if kind is None:
            raise invalid("subject", "neither a request id nor a request")
        if kind == "request_id" and not 0 < len(request.subject.request_id) <= 256:
            raise invalid("subject.request_id", "must have 1..256 characters")
        if kind == "request":
            _check_hypothetical(request.subject.request)
        replicas = self._control_plane.hub.connected()
        if not replicas:
            raise CallError(grpc.StatusCode.UNAVAILABLE, "no router is connected")
        command = router_pb2.RouterCommand(explain=request.subject)
        asked = replicas if kind == "request_id" else replicas[:1]
        results = await self._ask(asked, command, deadline_s)
        silent = [replica_id for replica_id, result in results.items() if result is None]
        answers = [result for result in results.values() if result is not None]
        decisions = [decision for result in answers if result.code == 0 for decision in result.decisions]
        if not decisions:
            self._no_decision(kind, answers, silent)
        return admin_pb2.ExplainResponse(decisions=decisions, silent_replicas=silent)

    def _no_decision(self, kind: str, answers: list[router_pb2.CommandResult], silent: list[str]) -> None:
        if not answers:
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer from {', '.join(silent)}")
        if kind == "request_id":
            suffix = f"; no answer from {', '.join(silent)}" if silent else ""
            raise not_found("subject.request_id", f"no router remembers this request{suffix}")
        code = next((c for c in grpc.StatusCode if c.value[0] == answers[0].code), grpc.StatusCode.UNKNOWN)
        if code is grpc.StatusCode.OK:
            code = grpc.StatusCode.INTERNAL
        raise CallError(code, answers[0].message[:500] or "the router gave no decision")

    async def GetPolicy(self, request: admin_pb2.GetPolicyRequest, context: Any) -> fleet_pb2.RoutingPolicy:
        """The routing policy in force."""
        return wire.policy_to_proto(self._control_plane.core.state.policy)

    async def SetPolicy(self, request: admin_pb2.SetPolicyRequest, context: Any) -> fleet_pb2.RoutingPolicy:
        """Replace fields of it."""
        return wire.policy_to_proto(self._control_plane.set_policy(dict(request.fields)))

    async def Top(self, request: admin_pb2.TopRequest, context: Any) -> admin_pb2.TopResponse:
        """Rates of every router, and every worker's load."""
        hub = self._control_plane.hub
        results = await self._ask(
            hub.connected(), router_pb2.RouterCommand(top=router_pb2.TopCommand()), TOP_DEADLINE_S
        )
        snapshot = self._control_plane.core.live_snapshot()
        names = {target.ordinal: target.target_id for target in snapshot.targets}
        return admin_pb2.TopResponse(
            routers=[
                admin_pb2.RouterTopEntry(replica_id=replica_id, top=result.top)
                for replica_id, result in results.items()
                if result is not None and result.code == 0
            ],
            targets=[wire.target_to_proto(target) for target in snapshot.targets],
            loads=[load for session in hub.sessions() for load in loads_to_proto(session.load, names)],
        )

    async def _ask(
        self, replicas: list[str], command: router_pb2.RouterCommand, deadline_s: float
    ) -> dict[str, router_pb2.CommandResult | None]:
        """Answers by replica; None for one that gave none in time."""

        async def one(replica_id: str) -> router_pb2.CommandResult | None:
            try:
                return await self._control_plane.hub.command(replica_id, command, deadline_s)
            except (HubError, TimeoutError):
                return None

        answers = await asyncio.gather(*(one(replica_id) for replica_id in replicas))
        return dict(zip(replicas, answers, strict=True))


def _check_hypothetical(request: router_pb2.HypotheticalRequest) -> None:
    if request.path not in EXPLAINED_PATHS:
        raise invalid("subject.request.path", f"must be one of {', '.join(EXPLAINED_PATHS)}")
    if len(request.body) > MAX_BODY_BYTES:
        raise invalid("subject.request.body", f"more than {MAX_BODY_BYTES} bytes")
    if len(request.headers) > MAX_HEADERS:
        raise invalid("subject.request.headers", f"more than {MAX_HEADERS}")
