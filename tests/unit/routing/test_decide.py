"""Decisions on a live fleet: the price, who may be chosen, and that nobody is refused without need."""

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routing import (
    FAST,
    NOW,
    PROFILES,
    SLOW,
    chain_of,
    install,
    occupy,
    one_live,
    request,
    serve,
    snapshot,
    target,
)

from router.routing.explain import render
from router.routing.policies import POLICIES
from router.routing.price import examine
from twofold.model.fleet import EngineFacts, Health, RoutingPolicy
from twofold.model.reasons import Ineligible, RejectReason, RouteReason, TargetRole

HOME_ROLES = (TargetRole.HOME_A1, TargetRole.HOME_A2, TargetRole.HOME_B1, TargetRole.HOME_B2)


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
        decisions = [live.decide(request(chain_of(seed, 40)), NOW) for seed in range(50)]
        examined = next(decision.examined for decision in decisions if len(decision.examined) == 5)
        margins.append(examined[-1].margin_s)
    assert margins[1] == pytest.approx(0.1 * margins[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 20_000))
def test_an_escape_that_is_not_looked_for_could_not_have_won(seed: int, chunks: int, most_tokens: int) -> None:
    rng = random.Random(seed)
    live = one_live(snapshot([target(i, ("fast", "slow")[i % 2]) for i in range(12)]))
    for slot in range(12):
        occupy(live, slot, 1 + rng.randrange(most_tokens + 1))
    asked = request(chain_of(seed, chunks))
    decision = live.decide(asked, NOW)
    if any(seen.role is TargetRole.ESCAPE for seen in decision.examined):
        return
    pool = live.pool_state("p")
    margin_s = 0.5 * pool.margin_unit_s
    homes = {seen.slot for seen in decision.examined}
    least = live.least_work(asked, pool, frozenset(), NOW)
    for state in pool.targets:
        if state.slot not in homes:
            roles = (TargetRole.ESCAPE,)
            passed = examine(live, pool, (state.slot,), roles, asked, 0.3, margin_s, frozenset(), NOW, [])
            assert least in homes or passed.price_s >= decision.chosen.price_s


def test_a_second_on_a_slow_gpu_is_cheap() -> None:
    """With both idle, recomputation is priced alike; only 30 % of the price feels the slower clock."""
    live = one_live(snapshot([target(0), target(1, "slow")]))
    fast, slow = sorted(live.decide(request(chain_of(1, 20)), NOW).examined, key=lambda seen: seen.slot)
    assert fast.own_reference_s == slow.own_reference_s
    assert slow.own_s == pytest.approx(2 * fast.own_s)
    assert slow.price_s < 1.4 * fast.price_s


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
