"""What every policy does alike: turn examined targets into a Decision, and never refuse while a target may serve."""

from collections.abc import Collection, Sequence

from router.routing.price import examine, refusal, tpot
from router.routing.state import FleetView, PoolState
from router.routing.types import Decision, ExaminedTarget, RequestFeatures
from twofold.model.fleet import RoutingPolicy
from twofold.model.reasons import Ineligible, RejectReason, RouteReason, TargetRole

MAX_LISTED = 6
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_NO_ENDPOINT_RETRY_S = 5.0


def no_pool(request: RequestFeatures, policy: RoutingPolicy, now_s: float) -> Decision:
    """The pool is not in the snapshot (any more)."""
    return Decision(
        None,
        "",
        RejectReason.NO_ENDPOINTS,
        request.request_id,
        request.pool,
        policy.name,
        now_s,
        request.prompt_tokens,
        retry_after_s=_NO_ENDPOINT_RETRY_S,
    )


def choose(
    view: FleetView,
    pool: PoolState,
    request: RequestFeatures,
    policy: RoutingPolicy,
    now_s: float,
    examined: Sequence[ExaminedTarget],
    best: ExaminedTarget,
    reason: RouteReason,
    key: int = 0,
    key_depth: int = 0,
) -> Decision:
    """The Decision for ``best``, tested against the SLO; a rejection where even it would take too long."""
    predicted_s = best.own_s + best.wait_s
    if 0 < policy.shed_ttft_s < predicted_s:
        retry_s = min(_MAX_RETRY_S, max(_MIN_RETRY_S, predicted_s - policy.shed_ttft_s))
        return _reject(pool, request, policy, now_s, examined, RejectReason.SATURATED, retry_s, key, key_depth)
    tpot_s, effect_s = tpot(pool.by_slot[best.slot], view.load(best.slot), request, best.own_s)
    slo = pool.pool.slo
    return Decision(
        best.slot,
        best.target_id,
        reason,
        request.request_id,
        request.pool,
        policy.name,
        now_s,
        request.prompt_tokens,
        tuple(examined),
        best.cached_tokens,
        best.uncached_tokens,
        best.own_s,
        predicted_s,
        tpot_s,
        effect_s,
        key,
        key_depth,
        pool.ring.version,
        predicted_s <= (request.slo_ttft_s or slo.ttft_s),
        tpot_s + effect_s <= (request.slo_tpot_s or slo.tpot_s),
    )


def find_any(
    view: FleetView,
    pool: PoolState,
    request: RequestFeatures,
    policy: RoutingPolicy,
    now_s: float,
    exclude: Collection[int],
    examined: Sequence[ExaminedTarget],
    key: int = 0,
    key_depth: int = 0,
) -> Decision:
    """The last resort: goes through the whole pool, from a place that depends on the request, takes the cheapest of
    the first eligible targets, and rejects only when there is none at all."""
    targets = pool.targets
    seen: dict[Ineligible, int] = {}
    found: list[int] = []
    start = request.unique_key % len(targets) if targets else 0
    for state in targets[start:] + targets[:start]:
        refused = refusal(state, view.load(state.slot), request, exclude, now_s)
        if refused:
            seen[refused] = seen.get(refused, 0) + 1
            continue
        found.append(state.slot)
        if len(found) == MAX_LISTED:
            break
    if found:
        last: list[ExaminedTarget] = []
        roles = (TargetRole.SCAN,) * len(found)
        examine(view, pool, found, roles, request, policy.alpha, 0.0, exclude, now_s, last)
        best = min(last, key=_price)
        reason = RouteReason.RETRY if exclude else RouteReason.ESCAPE
        if len(targets) == 1:
            reason = RouteReason.ONLY_TARGET
        return choose(view, pool, request, policy, now_s, (*examined, *last), best, reason, key, key_depth)
    # The most hopeful of the reasons counts: a full target will have room, an open circuit will close.
    if Ineligible.SATURATED in seen:
        return _reject(pool, request, policy, now_s, examined, RejectReason.SATURATED, _MIN_RETRY_S, key, key_depth)
    if targets and seen.get(Ineligible.CONTEXT_TOO_LONG, 0) == len(targets):
        return _reject(pool, request, policy, now_s, examined, RejectReason.CONTEXT_TOO_LONG, 0.0, key, key_depth)
    return _reject(
        pool, request, policy, now_s, examined, RejectReason.NO_ENDPOINTS, _NO_ENDPOINT_RETRY_S, key, key_depth
    )


def pinned(
    view: FleetView,
    pool: PoolState,
    request: RequestFeatures,
    policy: RoutingPolicy,
    now_s: float,
    exclude: Collection[int],
) -> Decision:
    """The caller named a data-parallel rank: the cheapest target of that rank."""
    slots = [state.slot for state in pool.targets if state.target.data_parallel_rank == request.data_parallel_rank]
    examined: list[ExaminedTarget] = []
    roles = (TargetRole.SCAN,) * len(slots)
    examine(view, pool, slots, roles, request, policy.alpha, 0.0, exclude, now_s, examined)
    eligible = [candidate for candidate in examined if not candidate.ineligible]
    if not eligible:
        full = any(candidate.ineligible is Ineligible.SATURATED for candidate in examined)
        reason = RejectReason.SATURATED if full else RejectReason.NO_ENDPOINTS
        return _reject(pool, request, policy, now_s, examined[:MAX_LISTED], reason, _NO_ENDPOINT_RETRY_S, 0, 0)
    eligible.sort(key=_price)
    return choose(view, pool, request, policy, now_s, eligible[:MAX_LISTED], eligible[0], RouteReason.PINNED)


def _price(candidate: ExaminedTarget) -> tuple[float, str]:
    return candidate.price_s, candidate.target_id


def _reject(
    pool: PoolState,
    request: RequestFeatures,
    policy: RoutingPolicy,
    now_s: float,
    examined: Sequence[ExaminedTarget],
    reason: RejectReason,
    retry_after_s: float,
    key: int,
    key_depth: int,
) -> Decision:
    return Decision(
        None,
        "",
        reason,
        request.request_id,
        request.pool,
        policy.name,
        now_s,
        request.prompt_tokens,
        tuple(examined),
        key=key,
        key_depth=key_depth,
        ring_version=pool.ring.version,
        retry_after_s=retry_after_s,
    )
