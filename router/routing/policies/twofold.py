"""Twofold's policy: four home targets from two rings, the last storer, one least-work escape; the cheapest of them."""

from collections.abc import Collection

from router.routing.policies.common import choose, find_any
from router.routing.price import examine
from router.routing.state import FleetView, PoolState
from router.routing.types import Decision, ExaminedTarget, RequestFeatures
from twofold.model.fleet import RoutingPolicy
from twofold.model.reasons import RouteReason, TargetRole

_HOME_ROLES = (TargetRole.HOME_A1, TargetRole.HOME_A2, TargetRole.HOME_B1, TargetRole.HOME_B2)
_LAST_STORER, _ESCAPE = (TargetRole.LAST_STORER,), (TargetRole.ESCAPE,)


def decide(
    request: RequestFeatures,
    view: FleetView,
    pool: PoolState,
    policy: RoutingPolicy,
    now_s: float,
    exclude: Collection[int],
) -> Decision:
    """Ranks at most six targets by price, whatever the fleet's size. It never turns to load alone, not in overload
    either: that burns the cache when it is needed most (measured: docs/routing.md).

    The escape's price is at least the margin, so it is not even looked for while something cheaper than that is known.
    """
    key, key_depth = view.ring_key(request, pool, policy, now_s)
    alpha = policy.alpha
    homes = pool.ring.homes(key)
    examined: list[ExaminedTarget] = []
    best = examine(view, pool, homes, _HOME_ROLES, request, alpha, 0.0, exclude, now_s, examined, None, key_depth)
    reason = RouteReason.HOME
    if request.block_hashes and view.kv is not None:
        storer = view.kv.last_storer(request.block_hashes)
        if storer is not None and storer[0] not in homes:
            slots = storer[:1]
            last = examine(view, pool, slots, _LAST_STORER, request, alpha, 0.0, exclude, now_s, examined, best)
            if last is not best:
                best, reason = last, RouteReason.LAST_STORER
    margin_s = policy.margin_s * pool.margin_unit_s
    if best is None or best.price_s > margin_s:
        slot = view.least_work(request, pool, exclude, now_s)
        if slot is not None and all(slot != candidate.slot for candidate in examined):
            escape = examine(
                view, pool, (slot,), _ESCAPE, request, alpha, margin_s, exclude, now_s, examined, best, key_depth
            )
            if escape is not best:
                best, reason = escape, RouteReason.ESCAPE
    if best is None:
        return find_any(view, pool, request, policy, now_s, exclude, examined, key, key_depth)
    if exclude:
        reason = RouteReason.RETRY
    elif len(pool.targets) == 1:
        reason = RouteReason.ONLY_TARGET
    return choose(view, pool, request, policy, now_s, examined, best, reason, key, key_depth)
