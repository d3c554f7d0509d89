"""Twofold's policy: four home targets from two rings, one least-work escape, the cheapest of them."""

from collections.abc import Collection

from router.routing.policies.common import choose, find_any
from router.routing.price import examine
from router.routing.state import FleetView, PoolState
from router.routing.types import Decision, ExaminedTarget, RequestFeatures
from twofold.model.fleet import RoutingPolicy
from twofold.model.reasons import RouteReason, TargetRole

_HOME_ROLES = (TargetRole.HOME_A1, TargetRole.HOME_A2, TargetRole.HOME_B1, TargetRole.HOME_B2)


def decide(
    request: RequestFeatures,
    view: FleetView,
    pool: PoolState,
    policy: RoutingPolicy,
    now_s: float,
    exclude: Collection[int],
) -> Decision:
    """Ranks at most five targets by price, whatever the fleet's size. It never turns to load alone, not in overload
    either: that burns the cache when it is needed most (measured: docs/routing.md)."""
    key, key_depth = view.ring_key(request, pool, policy, now_s)
    alpha, by_slot = policy.alpha, pool.by_slot
    examined: list[ExaminedTarget] = []
    best: ExaminedTarget | None = None
    eligible = 0
    homes = pool.ring.homes(key)
    for slot, role in zip(homes, _HOME_ROLES, strict=False):
        state = by_slot.get(slot)
        if state is None:
            continue
        candidate = examine(view, pool, state, role, request, alpha, 0.0, exclude, now_s)
        examined.append(candidate)
        if not candidate.ineligible:
            eligible += 1
            if best is None or candidate.price_s < best.price_s:
                best = candidate
    reason = RouteReason.HOME
    escape = view.least_work(request, pool, exclude, now_s)
    if escape is not None and escape not in homes:
        margin_s = policy.margin_s * pool.margin_unit_s
        candidate = examine(view, pool, by_slot[escape], TargetRole.ESCAPE, request, alpha, margin_s, exclude, now_s)
        examined.append(candidate)
        if not candidate.ineligible:
            eligible += 1
            if best is None or candidate.price_s < best.price_s:
                best, reason = candidate, RouteReason.ESCAPE
    if best is None:
        return find_any(view, pool, request, policy, now_s, exclude, examined, key, key_depth)
    if exclude:
        reason = RouteReason.RETRY
    elif eligible == 1 and len(pool.targets) == 1:
        reason = RouteReason.ONLY_TARGET
    return choose(view, pool, request, policy, now_s, examined, best, reason, key, key_depth)
