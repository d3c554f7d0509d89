"""A live fleet over time: what is accounted, learnt and forgotten, circuits, incarnations and snapshots."""

import msgspec
import pytest
from support.routing import (
    FAST,
    NOW,
    chain_of,
    install,
    live_fleets,
    live_on,
    occupy,
    one_live,
    request,
    serve,
    snapshot,
    target,
)

from router.routing.buffers import in_memory
from router.routing.live import LiveFleet
from router.routing.types import Resolved
from twofold.model.fleet import Health, Pool, RoutingPolicy
from twofold.model.reasons import Ineligible, RejectReason


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


def test_a_pool_that_is_gone_or_empty_has_no_endpoints() -> None:
    live = one_live(snapshot([]))
    for name in ("p", "other"):
        decision = live.decide(request(pool=name), NOW)
        assert (decision.slot, decision.reason) == (None, RejectReason.NO_ENDPOINTS)
    with pytest.raises(ValueError, match="rejected"):
        live.account(request(), decision, NOW)
