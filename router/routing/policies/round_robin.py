"""Round robin: each relay takes the targets in turn."""

from collections.abc import Collection

from router.routing.policies.common import choose, find_any
from router.routing.price import examine, refusal
from router.routing.state import FleetView, PoolState
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
    """The target whose turn ``request.sequence`` is, or the next eligible one after it."""
    targets = pool.targets
    size = len(targets)
    for step in range(size):
        state = targets[(request.sequence + step) % size]
        if refusal(state, view.load(state.slot), request, exclude, now_s):
            continue
        examined: list[ExaminedTarget] = []
        examine(view, pool, (state.slot,), _SCAN, request, policy.alpha, 0.0, exclude, now_s, examined)
        reason = RouteReason.RETRY if exclude else RouteReason.ROUND_ROBIN
        return choose(view, pool, request, policy, now_s, examined, examined[0], reason)
    return find_any(view, pool, request, policy, now_s, exclude, ())
