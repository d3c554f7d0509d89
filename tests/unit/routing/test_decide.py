"""Decisions on a live fleet: the price, who may be chosen, that nobody is refused without need, and what is learnt."""

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routing import FAST, PROFILES, SLOW, install, live_fleets, live_on, request, snapshot, target

from router.routing.buffers import in_memory
from router.routing.explain import render
from router.routing.live import LiveFleet
from router.routing.policies import POLICIES
from router.routing.types import Decision, RequestFeatures, Resolved
from twofold.model.fleet import EngineFacts, FleetSnapshot, Health, Pool, RoutingPolicy
from twofold.model.reasons import Ineligible, RejectReason, RouteReason, TargetRole

NOW = 1000.0
HOME_ROLES = (TargetRole.HOME_A1, TargetRole.HOME_A2, TargetRole.HOME_B1, TargetRole.HOME_B2)


def chain_of(seed: int, length: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.getrandbits(64) for _ in range(length))


def one_live(fleet: FleetSnapshot) -> LiveFleet:
    return live_fleets(fleet)[0]


def serve(live: LiveFleet, asked: RequestFeatures, now_s: float = NOW) -> Decision:
    """Decides and accounts; the request then ends at once, with its prefix left in the cache."""
    decision = live.decide(asked, now_s)
    ticket = live.account(asked, decision, now_s)
    ticket.assume_first_token(now_s)
    ticket.finish(now_s)
    return decision


def occupy(live: LiveFleet, slot: int, tokens: int, now_s: float = NOW) -> object:
    """A cold request of ``tokens`` tokens that was sent to ``slot`` and has not answered."""
    target_id = live.target(slot).target_id
    asked = request(prompt_tokens=tokens, request_id="load")
    work_s = FAST.law.prefill_work_s(tokens, 0)
    decision = Decision(
        slot, target_id, RouteReason.HOME, "load", "p", "twofold", now_s, tokens, (), 0, tokens, work_s, work_s
    )
    return live.account(asked, decision, now_s)


def test_the_price_is_the_documented_formula() -> None:
    """Computed here once more, from the profiles and what was sent."""
    live = one_live(snapshot([target(i, ("fast", "slow")[i % 2]) for i in range(6)]))
    chain = chain_of(1, 40)
    serve(live, request(chain[:30]))
    for slot in range(6):
        occupy(live, slot, 3000 * (slot + 1))
        decoding = occupy(live, slot, 500)
        decoding.first_token(NOW)
    later = NOW + 0.125
    decision = live.decide(request(chain), later)
    assert len(decision.examined) in (4, 5)
    for seen in decision.examined:
        profile = PROFILES[live.target(seen.slot).profile]
        law, batch = profile.law, profile.max_num_batched_tokens
        cached = 30 * 256 if seen.cached_tokens else 0
        uncached = 40 * 256 + 40 - cached
        assert (seen.cached_tokens, seen.uncached_tokens) == (cached, uncached)
        own = law.prefill_work_s(uncached, cached)
        reference = FAST.law.prefill_work_s(uncached, cached)
        sent_tokens = 3000 * (seen.slot + 1)
        queued_s = FAST.law.prefill_work_s(sent_tokens, 0)
        left_s = queued_s - 0.125
        step_s = law.decode_s(1, 500)
        iterations = math.ceil((uncached + sent_tokens * left_s / queued_s) / (batch - 1))
        wait = left_s + 0.5 * step_s + iterations * step_s
        margin = 0.5 * FAST.law.prefill_work_s(12_000, 0) if seen.role is TargetRole.ESCAPE else 0.0
        assert seen.own_s == pytest.approx(own, rel=1e-6)
        assert seen.own_reference_s == pytest.approx(reference, rel=1e-6)
        assert seen.wait_s == pytest.approx(wait, rel=1e-4)
        assert seen.margin_s == pytest.approx(margin)
        assert seen.price_s == pytest.approx(0.7 * reference + 0.3 * (own + wait) + margin, rel=1e-4)
    assert decision.chosen == min(decision.examined, key=lambda seen: seen.price_s)
    assert decision.predicted_ttft_s == decision.chosen.own_s + decision.chosen.wait_s
    assert any(seen.cached_tokens for seen in decision.examined)


def test_homes_are_examined_in_their_order_and_the_escape_after_them() -> None:
    live = one_live(snapshot([target(i) for i in range(30)]))
    for seed in range(200):
        decision = live.decide(request(chain_of(seed, 3)), NOW)
        homes = live.homes("p", decision.key)
        assert [seen.target_id for seen in decision.examined[:4]] == list(homes)
        assert tuple(seen.role for seen in decision.examined[:4]) == HOME_ROLES
        assert [seen.role for seen in decision.examined[4:]] in ([], [TargetRole.ESCAPE])
        assert len({seen.slot for seen in decision.examined}) == len(decision.examined) <= 6


def test_a_session_returns_to_its_cache() -> None:
    live = one_live(snapshot([target(i) for i in range(20)]))
    chain = chain_of(3, 10)
    first = serve(live, request(chain))
    again = serve(live, request(chain + chain_of(4, 5)))
    assert again.slot == first.slot
    assert again.cached_tokens == 10 * 256
    assert again.reason is RouteReason.HOME


def test_a_prompt_cached_whole_still_computes_its_last_token() -> None:
    live = one_live(snapshot([target(0)]))
    asked = request(chain_of(3, 10), prompt_tokens=2560)
    serve(live, asked)
    assert live.decide(asked, NOW).uncached_tokens == 1


def test_the_escape_must_beat_the_homes_by_the_margin() -> None:
    fleet = snapshot([target(i) for i in range(20)])
    asked = request(chain_of(5, 12))
    margin_s = 0.5 * FAST.law.prefill_work_s(12_000, 0)
    for work_tokens, expected in ((15_000, RouteReason.HOME), (60_000, RouteReason.ESCAPE)):
        live = one_live(fleet)
        for home in live.homes("p", live.decide(asked, NOW).key):
            occupy(live, next(s for s in range(20) if live.target(s).target_id == home), work_tokens)
        decision = live.decide(asked, NOW)
        assert decision.reason is expected
        escape = decision.examined[-1]
        assert escape.role is TargetRole.ESCAPE
        assert escape.margin_s == pytest.approx(margin_s)
        assert escape.wait_s < decision.examined[0].wait_s


def test_the_margin_scales_with_the_speed_of_the_reference_profile() -> None:
    """Engines k times faster see a margin k times shorter, so that time scale does not change decisions."""
    margins = []
    for factor in (1.0, 0.1):
        fleet = snapshot([target(i) for i in range(20)])
        fleet = msgspec.structs.replace(
            fleet, profiles=tuple(msgspec.structs.replace(p.scaled(factor), name=p.name) for p in fleet.profiles)
        )
        live = one_live(fleet)
        examined = next(
            d.examined for seed in range(50) if len((d := live.decide(request(chain_of(seed, 3)), NOW)).examined) == 5
        )
        margins.append(examined[-1].margin_s)
    assert margins[1] == pytest.approx(0.1 * margins[0])


def test_a_second_on_a_slow_gpu_is_cheap() -> None:
    """With both idle, recomputation is priced alike; only 30 % of the price feels the slower clock."""
    live = one_live(snapshot([target(0), target(1, "slow")]))
    fast, slow = sorted(live.decide(request(chain_of(1, 20)), NOW).examined, key=lambda seen: seen.slot)
    assert fast.own_reference_s == slow.own_reference_s
    assert slow.own_s == pytest.approx(2 * fast.own_s)
    assert slow.price_s < 1.4 * fast.price_s


def test_own_dispatches_count_at_once_in_this_relay_and_its_siblings() -> None:
    one, other = live_fleets(snapshot([target(i) for i in range(8)]), relays=2)
    asked = request(chain_of(9, 6))
    decision = one.decide(asked, NOW)
    ticket = one.account(asked, decision, NOW)
    for live in (one, other):
        seen = next(s for s in live.decide(asked, NOW).examined if s.slot == decision.slot)
        assert seen.cached_tokens == 6 * 256, "queued counts as cached"
        assert seen.wait_s > decision.chosen.wait_s
        assert live.load(decision.slot).inflight == 1
    ticket.finish(NOW)
    other.decide(asked, NOW)
    assert other.load(decision.slot).inflight == 0


def test_deciding_changes_nothing() -> None:
    buffers = in_memory(64, 1, 1 << 10)[0]
    live = live_on(snapshot([target(i) for i in range(9)]), buffers)
    serve(live, request(chain_of(1, 5)))
    views = (buffers.own.accounts, buffers.own.dirty, buffers.own.prefixes, buffers.sent)
    before = [bytes(view) for view in views]
    asked = request(chain_of(2, 7))
    decisions = {live.decide(asked, NOW) for _ in range(5)}
    assert len(decisions) == 1
    assert [bytes(view) for view in views] == before


def test_relays_that_saw_other_traffic_agree_on_the_homes_of_a_key() -> None:
    fleet = snapshot([target(i) for i in range(25)])
    shuffled = msgspec.structs.replace(fleet, targets=fleet.targets[::-1])
    one, other = one_live(fleet), one_live(shuffled)
    for seed in range(50):
        serve(one, request(chain_of(seed, 3)))
    for seed in range(500, 600):
        key = chain_of(seed, 1)[0]
        assert one.homes("p", key) == other.homes("p", key)
        assert one.decide(request((key,)), NOW).ring_version == other.decide(request((key,)), NOW).ring_version


REFUSALS = {
    "suspect": {"health": Health.SUSPECT},
    "gone": {"health": Health.GONE},
    "starting": {"health": Health.STARTING},
    "cordoned": {"cordoned": True},
    "draining": {"draining": True},
    "decode": {"role": "decode"},
    "without adapter": {"facts": EngineFacts(served_models=("m",))},
    "short context": {"facts": EngineFacts(max_model_len_tokens=100, adapters=("lora",))},
}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([None, *REFUSALS]), min_size=0, max_size=12),
    st.sets(st.integers(0, 11), max_size=12),
    st.sets(st.integers(0, 11), max_size=12),
    st.sets(st.integers(0, 11), max_size=12),
    st.sampled_from(sorted(POLICIES)),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.booleans(),
)
def test_only_eligible_targets_are_chosen_and_none_is_refused_while_there_is_one(
    kinds: list[str | None],
    excluded: set[int],
    broken: set[int],
    full: set[int],
    policy: str,
    key: int,
    lora: bool,
    fresh: bool,
) -> None:
    fleet = snapshot(
        [target(i, **REFUSALS.get(kind or "", {})) for i, kind in enumerate(kinds)],
        RoutingPolicy(name=policy),
        adapters=("lora",),
        max_inflight_per_target=2,
    )
    live = one_live(fleet)
    for slot in broken & set(range(len(kinds))):
        for _ in range(3):
            live.record_failure(slot, NOW)
    for slot in full & set(range(len(kinds))):
        for _ in range(2):
            occupy(live, slot, 100)
    chain = () if fresh else (key,)
    asked = request(
        chain,
        unique_key=key,
        adapter="lora" if lora else "",
        prompt_tokens=150,
        prompt_tokens_exact=True,
        sequence=key % 1000,
    )
    decision = live.decide(asked, NOW, frozenset(excluded))
    eligible = {
        slot
        for slot, kind in enumerate(kinds)
        if (kind is None or (kind == "without adapter" and not lora))
        and slot not in excluded
        and slot not in broken
        and slot not in full
    }
    if eligible:
        assert decision.slot in eligible
        assert decision.chosen is not None
        assert decision.chosen.ineligible is Ineligible.NONE
        assert isinstance(decision.reason, RouteReason)
        assert decision.examined
        live.account(asked, decision, NOW).finish(NOW)
    else:
        assert decision.slot is None
        assert isinstance(decision.reason, RejectReason)
        assert decision.retry_after_s >= 0
    for seen in decision.examined:
        assert (seen.ineligible is Ineligible.NONE) is (seen.slot in eligible)
    render(decision)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_small_pools_serve_to_the_last_target(size: int, policy: str) -> None:
    live = one_live(snapshot([target(i) for i in range(size)], RoutingPolicy(name=policy)))
    tried: set[int] = set()
    for attempt in range(size):
        decision = live.decide(request(chain_of(1, 2), sequence=7), NOW, frozenset(tried))
        assert decision.slot not in tried
        assert (decision.reason is RouteReason.RETRY) is (attempt > 0 and size > 1)
        tried.add(decision.slot)
    rejected = live.decide(request(chain_of(1, 2)), NOW, frozenset(tried))
    assert (rejected.slot, rejected.reason) == (None, RejectReason.NO_ENDPOINTS)


def test_the_heap_offers_the_next_best_when_all_homes_are_out() -> None:
    fleet = snapshot([target(i) for i in range(30)])
    live = one_live(fleet)
    asked = request(chain_of(2, 2))
    homes = {seen.slot for seen in live.decide(asked, NOW).examined if seen.role is not TargetRole.ESCAPE}
    for slot in range(30):
        if slot not in homes:
            occupy(live, slot, 1000 * (slot + 1))
    decision = live.decide(asked, NOW, frozenset(homes))
    assert decision.slot == min(set(range(30)) - homes)
    assert decision.examined[-1].role is TargetRole.ESCAPE


def test_saturated_pools_answer_429_and_say_when_to_come_again() -> None:
    live = one_live(snapshot([target(i) for i in range(5)], max_inflight_per_target=1))
    for slot in range(5):
        occupy(live, slot, 100)
    decision = live.decide(request(), NOW)
    assert (decision.slot, decision.reason) == (None, RejectReason.SATURATED)
    assert decision.retry_after_s >= 1


def test_shedding_starts_where_even_the_best_target_takes_too_long() -> None:
    fleet = snapshot([target(i) for i in range(3)], RoutingPolicy(shed_ttft_s=10.0))
    live = one_live(fleet)
    for slot in range(3):
        occupy(live, slot, 200_000)
    decision = live.decide(request(), NOW)
    assert (decision.slot, decision.reason) == (None, RejectReason.SATURATED)
    assert 1 <= decision.retry_after_s <= 60
    assert all(seen.predicted_ttft_s > 10 for seen in decision.examined)
    install(live, msgspec.structs.replace(fleet, policy=RoutingPolicy(shed_ttft_s=0.0)))
    assert live.decide(request(), NOW).slot is not None


def test_too_long_prompts_are_refused_by_exact_count_and_by_estimate_only_with_room_for_error() -> None:
    live = one_live(snapshot([target(i) for i in range(3)], max_model_len_tokens=1000))
    exact = live.decide(request(prompt_tokens=1001, prompt_tokens_exact=True), NOW)
    assert (exact.slot, exact.reason) == (None, RejectReason.CONTEXT_TOO_LONG)
    assert live.decide(request(prompt_tokens=1900), NOW).slot is not None
    assert live.decide(request(prompt_tokens=2100), NOW).reason is RejectReason.CONTEXT_TOO_LONG


def test_a_pool_that_is_gone_or_empty_has_no_endpoints() -> None:
    live = one_live(snapshot([]))
    for name in ("p", "other"):
        decision = live.decide(request(pool=name), NOW)
        assert (decision.slot, decision.reason) == (None, RejectReason.NO_ENDPOINTS)
    with pytest.raises(ValueError, match="rejected"):
        live.account(request(), decision, NOW)


def test_slo_is_the_requests_own_else_the_pools() -> None:
    live = one_live(snapshot([target(0)]))
    cold = request(chain_of(1, 100))
    assert not live.decide(msgspec.structs.replace(cold, slo_ttft_s=0.5), NOW).slo_ttft_met
    assert live.decide(msgspec.structs.replace(cold, slo_ttft_s=50.0), NOW).slo_ttft_met
    alone = live.decide(cold, NOW)
    assert alone.tpot_effect_s == 0
    assert alone.slo_tpot_met
    occupy(live, 0, 500).first_token(NOW)
    beside = live.decide(cold, NOW)
    assert beside.tpot_effect_s == pytest.approx(beside.own_s / 256)
    assert beside.predicted_tpot_s > alone.predicted_tpot_s
    assert not live.decide(msgspec.structs.replace(cold, slo_tpot_s=beside.predicted_tpot_s), NOW).slo_tpot_met


def test_a_pinned_rank_is_served_by_that_rank_or_not_at_all() -> None:
    ranks = [target(i, data_parallel_rank=i % 2) for i in range(6)]
    live = one_live(snapshot(ranks))
    decision = live.decide(request(data_parallel_rank=1), NOW)
    assert decision.reason is RouteReason.PINNED
    assert live.target(decision.slot).data_parallel_rank == 1
    assert live.decide(request(data_parallel_rank=7), NOW).reason is RejectReason.NO_ENDPOINTS
    plain = one_live(snapshot([target(i) for i in range(3)]))
    assert plain.decide(request(data_parallel_rank=1), NOW).slot is not None


def test_circuit_opens_after_three_failures_lets_one_probe_through_and_closes_on_success() -> None:
    one, other = live_fleets(snapshot([target(0)]), relays=2)
    for _ in range(2):
        one.record_failure(0, NOW)
    assert one.decide(request(), NOW).slot == 0
    one.record_failure(0, NOW)
    for live in (one, other):
        assert live.decide(request(), NOW + 0.9).reason is RejectReason.NO_ENDPOINTS
    probe = one.decide(request(), NOW + 1.1)
    assert probe.slot == 0
    ticket = one.account(request(), probe, NOW + 1.1)
    for live in (one, other):
        assert live.decide(request(), NOW + 1.2).slot is None, "half open: one request at a time"
    ticket.finish(NOW + 1.3, failed=True)
    one.record_failure(0, NOW + 1.3)
    assert one.decide(request(), NOW + 3.2).slot is None, "twice as long now"
    assert one.decide(request(), NOW + 3.4).slot == 0
    one.record_success(0)
    for live in (one, other):
        assert live.decide(request(), NOW + 3.4).slot == 0


def test_circuits_are_bounded_in_time_however_often_it_fails() -> None:
    live = one_live(snapshot([target(0)]))
    for _ in range(5000):
        live.record_failure(0, NOW)
    assert live.decide(request(), NOW + 59).slot is None
    assert live.decide(request(), NOW + 61).slot == 0


def test_a_new_incarnation_has_an_empty_cache_and_ends_old_requests_normally() -> None:
    fleet = snapshot([target(i) for i in range(2)])
    live = one_live(fleet)
    chain = chain_of(1, 10)
    decision = serve(live, request(chain))
    running = live.account(request(chain), live.decide(request(chain), NOW), NOW)
    slot = running.slot
    assert slot == decision.slot
    for _ in range(3):
        live.record_failure(slot, NOW)
    reborn = [msgspec.structs.replace(t, incarnation=1) if t.ordinal == slot else t for t in fleet.targets]
    install(live, msgspec.structs.replace(fleet, version=2, targets=tuple(reborn)))
    again = live.decide(request(chain), NOW)
    seen = next(s for s in again.examined if s.slot == slot)
    assert seen.cached_tokens == 0
    assert seen.ineligible is Ineligible.NONE, "the circuit was the old engine's"
    running.first_token(NOW)
    running.tokens(5)
    running.finish(NOW)
    live.decide(request(), NOW)
    assert live.load(slot).inflight == live.load(slot).kv_tokens == 0


def test_a_request_that_never_reached_its_target_leaves_no_trace_in_the_cache() -> None:
    live = one_live(snapshot([target(0)]))
    asked = request(chain_of(1, 6))
    live.account(asked, live.decide(asked, NOW), NOW).finish(NOW, failed=True)
    assert live.decide(asked, NOW).cached_tokens == 0
    ticket = live.account(asked, live.decide(asked, NOW), NOW)
    ticket.first_token(NOW + 1)
    ticket.finish(NOW + 2, failed=True)
    assert live.decide(asked, NOW + 2).cached_tokens == 6 * 256


def test_cold_long_prefills_correct_the_speed_of_a_target_within_bounds() -> None:
    live = one_live(snapshot([target(0)]))
    for seed in range(200):
        asked = request(chain_of(seed, 20))
        decision = live.decide(asked, NOW)
        plain_s = decision.predicted_ttft_s / decision.chosen.correction
        ticket = live.account(asked, decision, NOW)
        ticket.first_token(NOW + 2.0 * plain_s)
        ticket.finish(NOW + 2.0 * plain_s)
    settled = live.decide(request(chain_of(999, 20)), NOW).chosen
    assert settled.correction == pytest.approx(2.0, rel=0.02)
    assert settled.own_s == pytest.approx(2 * FAST.law.prefill_work_s(20 * 256 + 40, 0), rel=0.02)
    for _ in range(200):
        live.correct(0, 1.0, 1e9)
    assert live.decide(request(), NOW).chosen.correction == 4.0
    for _ in range(400):
        live.correct(0, 1.0, 1e-9)
    assert live.decide(request(), NOW).chosen.correction == 0.25


def test_warm_short_or_delayed_requests_and_assumed_first_tokens_correct_nothing() -> None:
    live = one_live(snapshot([target(0)]))
    chain = chain_of(1, 20)
    ticket = live.account(request(chain), live.decide(request(chain), NOW), NOW)
    assert ticket.assume_first_token_at_s > NOW
    ticket.assume_first_token(NOW + 50)
    ticket.first_token(NOW + 60)
    for asked in (request(chain), request(prompt_tokens=100)):
        warm = live.account(asked, live.decide(asked, NOW), NOW)
        warm.first_token(NOW + 60)
    occupy(live, 0, 50_000)
    behind = request(chain_of(2, 20))
    live.account(behind, live.decide(behind, NOW), NOW).first_token(NOW + 60)
    assert live.decide(request(), NOW).chosen.correction == 1.0


def test_a_snapshot_keeps_what_was_learnt_of_a_target_and_takes_over_what_changed() -> None:
    fleet = snapshot([target(i) for i in range(2)])
    live = one_live(fleet)
    for slot in (0, 1):
        for _ in range(50):
            live.correct(slot, 1.0, 1.5)
    learnt = {state.target_id: state.correction for state in live.targets()}
    assert min(learnt.values()) > 1.4
    changed = (msgspec.structs.replace(fleet.targets[0], cordoned=True), fleet.targets[1])
    install(live, msgspec.structs.replace(fleet, targets=changed))
    assert {state.target_id: state.correction for state in live.targets()} == learnt
    assert live.decide(request(), NOW).slot == 1
    install(live, snapshot(fleet.targets, max_model_len_tokens=10))
    assert live.decide(request(), NOW).reason is RejectReason.CONTEXT_TOO_LONG
    reborn = tuple(msgspec.structs.replace(t, incarnation=2) for t in fleet.targets)
    install(live, msgspec.structs.replace(fleet, targets=reborn))
    assert {state.correction for state in live.targets()} == {1.0}


def test_policies_without_ring_keys_count_no_popularity() -> None:
    fleet = snapshot([target(i) for i in range(10)], RoutingPolicy(name="round_robin"))
    live = one_live(fleet)
    for _ in range(100):
        serve(live, request(chain_of(1, 4)))
    install(live, msgspec.structs.replace(fleet, policy=RoutingPolicy()))
    assert live.decide(request(chain_of(1, 4)), NOW).key_depth == 1


def test_a_hot_system_prompt_spreads_over_the_fleet_and_sessions_stay_together() -> None:
    live = one_live(snapshot([target(i) for i in range(16)]))
    system = chain_of(0, 6)
    homes: set[int] = set()
    for session in range(1, 120):
        first = serve(live, request(system + chain_of(session, 2)))
        second = serve(live, request(system + chain_of(session, 5)))
        homes.add(first.slot)
        if session > 40:
            assert first.key_depth == 7
            assert (second.key, second.slot) == (first.key, first.slot)
    # A key inside the system prompt would hold all of them on four homes; idle, they go where it is cached already.
    assert len(homes) > 5


def test_names_resolve_to_pools_and_adapters() -> None:
    fleet = snapshot([target(0)], adapters=("lora",))
    live = one_live(fleet)
    pool = fleet.pools[0]
    assert live.resolve("m") == live.resolve("m-alias") == live.resolve("") == Resolved(pool=pool)
    assert live.resolve("lora") == Resolved(pool=pool, adapter="lora")
    assert live.resolve("nope") is None
    assert live.models() == ("m", "m-alias", "lora")
    two = msgspec.structs.replace(fleet, pools=(pool, Pool(name="q", models=("q",))))
    install(live, two)
    assert live.resolve("") is None


def test_readiness_needs_a_target_that_takes_work() -> None:
    live = LiveFleet(in_memory(64, 1, 64)[0])
    assert not live.ready
    assert live.decide(request(), NOW).reason is RejectReason.NO_ENDPOINTS
    install(live, snapshot([target(0, health=Health.SUSPECT)]))
    assert not live.ready
    install(live, snapshot([target(0)]))
    assert live.ready


def test_a_table_with_more_slots_than_the_buffers_is_refused_and_the_old_one_stays() -> None:
    live = one_live(snapshot([target(0)]))
    with pytest.raises(ValueError, match="slot"):
        install(live, snapshot([target(i) for i in range(100)]))
    assert live.decide(request(), NOW).slot == 0


def test_round_robin_takes_turns_and_passes_over_who_is_out() -> None:
    fleet = snapshot([target(i, cordoned=i == 1) for i in range(4)], RoutingPolicy(name="round_robin"))
    live = one_live(fleet)
    slots = [live.decide(request(sequence=n), NOW).slot for n in range(8)]
    assert slots == [0, 2, 2, 3, 0, 2, 2, 3]
    assert live.decide(request(sequence=0), NOW).reason is RouteReason.ROUND_ROBIN


def test_least_requests_takes_the_emptiest_and_turns_among_equals() -> None:
    live = one_live(snapshot([target(i) for i in range(4)], RoutingPolicy(name="least_requests")))
    assert {live.decide(request(sequence=n), NOW).slot for n in range(4)} == {0, 1, 2, 3}
    for slot in (0, 1, 3):
        occupy(live, slot, 10)
    decision = live.decide(request(sequence=3), NOW)
    assert (decision.slot, decision.reason) == (2, RouteReason.LEAST_REQUESTS)


def test_an_unknown_policy_name_falls_back_to_twofolds_own() -> None:
    live = one_live(snapshot([target(i) for i in range(9)], RoutingPolicy(name="from-the-future")))
    assert live.decide(request(chain_of(1, 2)), NOW).examined[0].role is TargetRole.HOME_A1


def test_slow_half_gets_its_share_of_the_work() -> None:
    """Many cold requests on a half slow fleet: work spreads over both kinds, in the direction of their speeds."""
    live = one_live(snapshot([target(i, ("fast", "slow")[i % 2]) for i in range(8)]))
    counts = {"fast": 0, "slow": 0}
    now = NOW
    for seed in range(400):
        now += 0.1
        asked = request(chain_of(seed, 16))
        decision = live.decide(asked, now)
        live.account(asked, decision, now)
        counts[live.target(decision.slot).profile] += 1
    assert counts["slow"] >= 80
    assert counts["fast"] > counts["slow"]
    assert SLOW.law.prefill_per_token_s == 2 * FAST.law.prefill_per_token_s
