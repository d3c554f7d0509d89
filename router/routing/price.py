"""The price of a candidate: what it costs the fleet and how long the client waits (docs/routing.md)."""

from collections.abc import Collection, Iterable, Sequence
from math import ceil, inf

from router.routing.accounts import Load
from router.routing.prefix import scheduled_count
from router.routing.state import FleetView, PoolState, TargetState
from router.routing.types import ExaminedTarget, RequestFeatures
from twofold.model.reasons import Ineligible, TargetRole

TYPICAL_OUTPUT_TOKENS = 256
"""Over so many tokens the TPOT guard spreads the time that a prefill takes from the running decodes."""
_ELIGIBLE = Ineligible.NONE
_ESTIMATE_SLACK = 0.5
"""A prompt of estimated length is refused for its length only where half the estimate is already too long."""


def refusal(
    state: TargetState, load: Load, request: RequestFeatures, exclude: Collection[int], now_s: float
) -> Ineligible:
    """Why the target may not take the request; NONE where it may."""
    if state.refusal:
        return state.refusal
    if state.slot in exclude:
        return Ineligible.EXCLUDED
    if load.circuit_until_s > now_s:
        return Ineligible.CIRCUIT_OPEN
    if load.inflight >= state.max_inflight:
        return Ineligible.SATURATED
    if request.adapter and not state.has_adapter(request.adapter):
        return Ineligible.ADAPTER_MISSING
    longest = state.longest_tokens
    if request.prompt_tokens > longest:
        tokens = request.prompt_tokens if request.prompt_tokens_exact else request.prompt_tokens * _ESTIMATE_SLACK
        if tokens > longest:
            return Ineligible.CONTEXT_TOO_LONG
    return _ELIGIBLE


def examine(
    view: FleetView,
    pool: PoolState,
    slots: Iterable[int],
    roles: Sequence[TargetRole],
    request: RequestFeatures,
    alpha: float,
    margin_s: float,
    exclude: Collection[int],
    now_s: float,
    examined: list[ExaminedTarget],
    best: ExaminedTarget | None = None,
    key_depth: int = 0,
) -> ExaminedTarget | None:
    """Appends to ``examined`` the targets at ``slots`` (those that the pool has), in their ``roles``, with eligibility
    and price: ``(1 - alpha) * own_reference + alpha * (own + wait) + margin``. Returns the cheapest that is eligible,
    the first of equals; ``best`` unless one is cheaper.

    own: prefill of the uncached tokens behind the cached ones here; own_reference: the same at the pool's reference
    speed, because a second on a slow GPU is cheap; wait: queued prefill work still to do, the rest of the running
    iteration, and what the iterations needed cost besides prefill (base and decodes).
    """
    by_slot, loads = pool.by_slot, view.load
    tokens, chain, reported = request.prompt_tokens, request.chain, request.block_hashes
    # What a target holds of a prompt mostly ends before the ring key's chunk, or goes on past it.
    likely = scheduled_count(key_depth) - 1 if key_depth > 1 else 0
    particular = bool(exclude or request.adapter)
    least_s = inf if best is None else best.price_s
    for number, slot in enumerate(slots):
        role = roles[number]
        state = by_slot.get(slot)
        if state is None:
            continue
        load = loads(slot)
        if (
            particular
            or state.refusal
            or load.inflight >= state.max_inflight
            or load.circuit_until_s > now_s
            or tokens > state.longest_tokens
        ):
            # Something may stand against it: only then the reasons are gone through one by one.
            refused = refusal(state, load, request, exclude, now_s)
            if refused:
                examined.append(ExaminedTarget(slot, state.target_id, role, refused))
                continue
        cached = 0
        if reported:
            cached = _reported_tokens(view, state, request, load)
        elif chain:
            chunks = view.cached_chunks(state.salt, chain, load.stored_tokens, state.kv_capacity_tokens, likely)
            if chunks:
                # The last prompt token is always computed: its logits give the first output token.
                cached = min(int(chunks * request.chunk_tokens), tokens - 1)
        uncached = tokens - cached
        correction = state.correction
        middle = cached + uncached * 0.5
        own_s = uncached * (state.prefill_s + state.context_s * middle) * correction
        own_reference_s = uncached * (pool.reference_prefill_s + pool.reference_context_s * middle)
        decodes = load.decodes
        step_s = (state.base_s + state.decode_s * decodes + state.decode_kv_s * load.kv_tokens) * correction
        to_do, wait_s = float(uncached), 0.0
        if load.queued_s > 0.0:
            wait_s, share = load.remaining(now_s)
            to_do += load.queued_tokens * share
        room = state.batch_tokens - decodes
        if to_do <= room:
            wait_s += step_s
        else:
            wait_s += (ceil(to_do / room) if room > 1.0 else ceil(to_do)) * step_s
        if decodes:
            # An engine in the middle of a step is on average half through it.
            wait_s += 0.5 * step_s
        price_s = (1.0 - alpha) * own_reference_s + alpha * (own_s + wait_s) + margin_s
        candidate = ExaminedTarget(
            slot,
            state.target_id,
            role,
            _ELIGIBLE,
            cached,
            uncached,
            own_s,
            own_reference_s,
            wait_s,
            margin_s,
            price_s,
            correction,
        )
        examined.append(candidate)
        if price_s < least_s:
            best, least_s = candidate, price_s
    return best


def _reported_tokens(view: FleetView, state: TargetState, request: RequestFeatures, load: Load) -> int:
    """Leading prompt tokens on the target by what its engine reports, where it does; or by what is queued there, where
    that is more: the engine reports a block only once it is computed."""
    kv, slot = view.kv, state.slot
    known = kv.leading_blocks(slot, request.block_hashes) if kv is not None else -1
    # Without an exact view of the engine's cache, all that was sent within its capacity counts; with one, what is
    # queued.
    exact = kv is not None and known >= 0 and kv.is_exact(slot)
    window_tokens = load.queued_tokens if exact else state.kv_capacity_tokens
    chunks = 0
    if request.chain and window_tokens:
        chunks = view.cached_chunks(state.salt, request.chain, load.stored_tokens, window_tokens, 0)
    # Engines look whole blocks up, and never the last token: its logits give the first output token.
    known = min(known, (request.prompt_tokens - 1) // request.block_tokens)
    tokens = max(known * request.block_tokens, int(chunks * request.chunk_tokens))
    return min(max(tokens, 0), request.prompt_tokens - 1)


def tpot(state: TargetState, load: Load, request: RequestFeatures, own_s: float) -> tuple[float, float]:
    """(seconds per output token of the request beside what runs there now, seconds per output token that its prefill
    costs the running decodes, spread over TYPICAL_OUTPUT_TOKENS): the TPOT guard's figures."""
    own_tpot_s = state.correction * (
        state.base_s
        + state.decode_s * (load.decodes + 1)
        + state.decode_kv_s * (load.kv_tokens + request.prompt_tokens)
    )
    return own_tpot_s, own_s / TYPICAL_OUTPUT_TOKENS if load.decodes else 0.0
