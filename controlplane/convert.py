"""Values of the control plane to and from messages that twofold.wire does not know."""

import math
import re

import msgspec

from controlplane.discovery.fleet_file import POLICY_NAMES, valid_url
from controlplane.fleet.values import LogEntry, WorkerSpec
from controlplane.plan import Desired
from controlplane.providers.local import GroupStatus
from controlplane.routers.load import ReplicaLoad
from controlplane.rpc.errors import invalid
from twofold.model.fleet import RoutingPolicy
from twofold.v1 import admin_pb2, autoscaler_pb2, fleet_pb2

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
MAX_TEXT = 128
MAX_RANKS = 1024


def checked_name(field: str, value: str) -> str:
    """A name of the form [A-Za-z0-9._-]{1,128}. Raises CallError."""
    if not _NAME.match(value):
        raise invalid(field, "must match [A-Za-z0-9._-]{1,128}")
    return value


def checked_number(field: str, value: float, low: float, high: float) -> float:
    """A number within bounds. Raises CallError."""
    if not math.isfinite(value) or not low <= value <= high:
        raise invalid(field, f"must be within {low:g}..{high:g}")
    return value


def spec_from_register(request: fleet_pb2.RegisterRequest) -> WorkerSpec:
    """The worker that a registration declares. Raises CallError naming the field."""
    for field in ("zone", "node"):
        text = getattr(request, field)
        if len(text) > MAX_TEXT or not text.isprintable():
            raise invalid(field, f"must be printable and at most {MAX_TEXT} characters")
    if not valid_url(request.url):
        raise invalid("url", "must be http://host:port, at most 512 characters")
    if request.data_parallel_size > MAX_RANKS:
        raise invalid("data_parallel_size", f"must be at most {MAX_RANKS}")
    if request.incarnation >= 1 << 62:
        raise invalid("incarnation", "must be below 2^62")
    return WorkerSpec(
        worker_id=checked_name("worker_id", request.worker_id),
        url=request.url.rstrip("/"),
        pool=request.pool,
        profile=request.profile,
        data_parallel_size=max(1, request.data_parallel_size),
        zone=request.zone,
        node=request.node,
        incarnation=request.incarnation,
    )


_BOUNDS: dict[str, tuple[float, float]] = {
    "alpha": (0.0, 1.0),
    "margin_s": (0.0, 3600.0),
    "key_share": (0.0, 1e6),
    "key_half_life_s": (0.1, 86_400.0),
    "key_min_count": (0.0, 1e9),
    "shed_ttft_s": (0.0, 86_400.0),
    "retry_budget_ratio": (0.0, 100.0),
}


def changed_policy(policy: RoutingPolicy, fields: dict[str, str]) -> RoutingPolicy:
    """The policy with some fields replaced by values given as text. Raises CallError naming the field."""
    values: dict[str, object] = {}
    for name, text in fields.items():
        if name == "name":
            if text not in POLICY_NAMES:
                raise invalid("fields.name", f"unknown policy {text[:64]!r}; one of {', '.join(POLICY_NAMES)}")
            values[name] = text
            continue
        bounds = _BOUNDS.get(name)
        if bounds is None:
            known = ", ".join(field.name for field in msgspec.structs.fields(RoutingPolicy))
            raise invalid(f"fields.{name[:64]}", f"no such field; one of {known}")
        try:
            number = float(text)
        except ValueError:
            raise invalid(f"fields.{name}", f"{text[:64]!r} is not a number") from None
        values[name] = checked_number(f"fields.{name}", number, *bounds)
    return msgspec.structs.replace(policy, **values)


def desired_from_proto(message: autoscaler_pb2.DesiredPool) -> Desired:
    """Desired state of a message."""
    return Desired(
        pool=message.pool,
        profile=message.profile,
        replicas=message.replicas,
        zone=message.zone,
        victims=tuple(message.victims),
        routing_share=message.routing_share,
        generation=message.generation,
    )


def status_to_proto(status: GroupStatus) -> autoscaler_pb2.DesiredPoolStatus:
    """Status of a desired pool as a message."""
    desired = status.desired
    return autoscaler_pb2.DesiredPoolStatus(
        desired=autoscaler_pb2.DesiredPool(
            pool=desired.pool,
            profile=desired.profile,
            replicas=desired.replicas,
            zone=desired.zone,
            victims=desired.victims,
            routing_share=desired.routing_share,
            generation=desired.generation,
        ),
        running=status.running,
        ready=status.ready,
        restarting=status.restarting,
        message=status.message,
    )


def event_to_proto(entry: LogEntry, wall_offset_s: float) -> admin_pb2.FleetEvent:
    """A line of a worker's history as a message; ``wall_offset_s`` is wall time minus monotonic time."""
    return admin_pb2.FleetEvent(
        at_s=entry.at_s + wall_offset_s, target_id=entry.target_id, reason=entry.reason, message=entry.message
    )


def loads_to_proto(load: ReplicaLoad, targets: dict[int, str]) -> list[admin_pb2.RouterLoad]:
    """What a replica reports of the targets in ``targets`` (ordinal -> id), those that are not idle."""
    return [
        admin_pb2.RouterLoad(
            replica_id=load.replica_id,
            target_id=targets[ordinal],
            inflight=row.inflight,
            decodes=row.decodes,
            queued_prefill_tokens=row.queued_prefill_tokens,
            queued_prefill_s=row.queued_prefill_s,
        )
        for ordinal, row in load.rows()
        if ordinal in targets and (row.inflight or row.decodes or row.queued_prefill_tokens)
    ]
