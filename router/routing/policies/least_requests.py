"""Least requests: the target with the fewest requests in flight."""

from collections.abc import Collection

from router.routing.policies.common import choose, find_any
from router.routing.price import examine, refusal
from router.routing.state import FleetView, PoolState, TargetState
from router.routing.types import Decision, ExaminedTarget, RequestFeatures
from twofold.model.fleet import RoutingPolicy
from twofold.model.reasons import RouteReason, TargetRole

_SCAN = (TargetRole.SCAN,)


def decide(
    request: RequestFeatures,
    view: FleetView,
    pool: PoolState,
    policy: RoutingPolicy,
    now_s: float,
    exclude: Collection[int],
) -> Decision:
    """Looks at every target. Equal ones take turns by ``request.sequence``, so that idle targets are used alike."""
    targets = pool.targets
    size = len(targets)
    best: TargetState | None = None
    fewest = 0.0
    for step in range(size):
        state = targets[(request.sequence + step) % size]
        load = view.load(state.slot)
        if (best is None or load.inflight < fewest) and not refusal(state, load, request, exclude, now_s):
            best, fewest = state, load.inflight
    if best is None:
        return find_any(view, pool, request, policy, now_s, exclude, ())
    examined: list[ExaminedTarget] = []
    examine(view, pool, (best.slot,), _SCAN, request, policy.alpha, 0.0, exclude, now_s, examined)
    reason = RouteReason.RETRY if exclude else RouteReason.LEAST_REQUESTS
    return choose(view, pool, request, policy, now_s, examined, examined[0], reason)
