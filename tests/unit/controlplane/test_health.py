"""The health machine, transition by transition."""

from controlplane.fleet.events import RouterGone
from controlplane.fleet.reducer import reduce
from controlplane.fleet.values import FleetRules, ProbeOutcome, RankSample
from twofold.model.fleet import Health
from twofold.model.reasons import TargetCondition

from .builders import FACTS, config, failures, healthy, probe, run, source, spec


def test_a_worker_starts_and_one_good_probe_makes_it_healthy() -> None:
    state = run(config(), source(spec("a")))
    assert state.workers["a"].health is Health.STARTING
    state = reduce(state, [probe("a", 1, 1.0, ok=False)])
    assert state.workers["a"].health is Health.STARTING
    state = reduce(state, [probe("a", 2, 2.0)])
    assert state.workers["a"].health is Health.HEALTHY
    assert state.workers["a"].facts == FACTS


def test_two_failed_probes_make_it_suspect_then_gone_then_it_returns_after_good_ones() -> None:
    rules = FleetRules(gone_after_s=10)
    state = reduce(healthy("a", rules=rules), [probe("a", 2, 2.0, ok=False)])
    assert state.workers["a"].health is Health.HEALTHY
    assert TargetCondition.PROBE_FAILING in state.workers["a"].conditions
    state = reduce(state, [probe("a", 3, 3.0, ok=False)])
    assert state.workers["a"].health is Health.SUSPECT
    state = reduce(state, [probe("a", 4, 12.9, ok=False)])
    assert state.workers["a"].health is Health.SUSPECT
    state = reduce(state, [probe("a", 5, 13.0, ok=False)])
    assert state.workers["a"].health is Health.GONE
    for sequence, expected in ((6, Health.GONE), (7, Health.GONE), (8, Health.HEALTHY)):
        state = reduce(state, [probe("a", sequence, 20.0 + sequence)])
        assert state.workers["a"].health is expected
    assert state.workers["a"].conditions == ()


def test_a_failed_probe_in_between_starts_the_count_of_good_ones_anew() -> None:
    state = healthy("a")
    for sequence, ok in ((2, False), (3, False), (4, True), (5, False), (6, True)):
        state = reduce(state, [probe("a", sequence, float(sequence), ok=ok)])
    assert state.workers["a"].health is Health.SUSPECT
    assert reduce(state, [probe("a", 7, 7.0)]).workers["a"].health is Health.HEALTHY


def test_flapping_needs_more_good_probes_each_time_and_is_forgiven_later() -> None:
    state, sequence, needed = healthy("a"), 1, []
    for _ in range(3):
        for _ in range(2):
            sequence += 1
            state = reduce(state, [probe("a", sequence, float(sequence), ok=False)])
        good = 0
        while state.workers["a"].health is not Health.HEALTHY:
            sequence, good = sequence + 1, good + 1
            state = reduce(state, [probe("a", sequence, float(sequence))])
        needed.append(good)
    assert needed == [2, 4, 8]
    state = reduce(state, [probe("a", sequence + 1, sequence + 1000.0)])
    assert state.workers["a"].flaps == 0


def test_two_routers_that_fail_make_it_suspect_whatever_the_probes_say() -> None:
    state = reduce(healthy("a"), [failures("r1", 1, 2.0, {"a": 1})])
    assert state.workers["a"].health is Health.HEALTHY
    state = reduce(state, [failures("r2", 1, 2.1, {"a": 1})])
    assert state.workers["a"].health is Health.SUSPECT
    state = reduce(state, [probe("a", 2, 2.2)])
    assert TargetCondition.UNREACHABLE_BY_ROUTERS in state.workers["a"].conditions
    state = reduce(state, [probe("a", 3, 3.0)])
    assert state.workers["a"].health is Health.HEALTHY
    assert state.workers["a"].conditions == ()
    # The old failures are forgiven, a new one counts.
    state = reduce(state, [failures("r1", 2, 4.0, {"a": 2})])
    assert state.workers["a"].health is Health.HEALTHY
    state = reduce(state, [failures("r2", 2, 4.0, {"a": 2})])
    assert state.workers["a"].health is Health.SUSPECT


def test_one_router_and_one_failed_probe_are_enough_in_either_order() -> None:
    state = reduce(healthy("a"), [failures("r1", 1, 2.0, {"a": 3}), probe("a", 2, 2.1, ok=False)])
    assert state.workers["a"].health is Health.SUSPECT
    state = reduce(healthy("b"), [probe("b", 2, 2.0, ok=False), failures("r1", 1, 2.1, {"b": 3})])
    assert state.workers["b"].health is Health.SUSPECT


def test_the_same_router_on_two_ranks_is_one_router() -> None:
    state = run(config(), source(spec("a", data_parallel_size=2)), probe("a", 1, 1.0))
    state = reduce(state, [failures("r1", 1, 2.0, {"a/0": 1, "a/1": 1})])
    assert state.workers["a"].health is Health.HEALTHY


def test_reports_of_a_router_that_left_count_no_more() -> None:
    state = reduce(healthy("a"), [failures("r1", 1, 2.0, {"a": 1}), RouterGone(at_s=2.1, replica_id="r1", stream=1)])
    state = reduce(state, [failures("r2", 1, 2.2, {"a": 1})])
    assert state.workers["a"].health is Health.HEALTHY
    late = failures("r1", 2, 2.3, {"a": 9})
    assert reduce(state, [late]).workers["a"].health is Health.HEALTHY
    again = failures("r1", 1, 2.3, {"a": 1}, stream=2)
    assert reduce(state, [again]).workers["a"].health is Health.SUSPECT


def test_a_router_that_succeeds_takes_its_report_back() -> None:
    state = reduce(healthy("a"), [failures("r1", 1, 2.0, {"a": 1}), failures("r1", 2, 2.1, {"a": 0})])
    assert state.reports == {}


def test_a_hung_engine_with_good_health_is_stalled() -> None:
    """SIGSTOP of vLLM's engine core: /health and /metrics go on with old values."""
    hung = (RankSample(rank=0, running=2, iterations=50, router_inflight=2),)
    state = reduce(healthy("a"), [probe("a", 2, 2.0, ranks=hung), probe("a", 3, 17.0, ranks=hung)])
    assert not state.workers["a"].ranks[0].stalled
    state = reduce(state, [probe("a", 4, 17.5, ranks=hung)])
    record = state.workers["a"]
    assert record.health is Health.HEALTHY
    assert record.target_health(0) is Health.SUSPECT
    assert record.target_conditions(0) == (TargetCondition.STALLED,)
    moving = (RankSample(rank=0, running=2, iterations=51, router_inflight=2),)
    state = reduce(state, [probe("a", 5, 18.0, ranks=moving)])
    assert state.workers["a"].target_health(0) is Health.HEALTHY


def test_requests_that_never_got_a_first_token_prove_a_hang_even_with_idle_gauges() -> None:
    hung = (RankSample(rank=0, running=0, iterations=50, router_inflight=1, router_unanswered=1),)
    state = reduce(healthy("a"), [probe("a", 2, 2.0, ranks=hung), probe("a", 3, 20.0, ranks=hung)])
    assert state.workers["a"].ranks[0].stalled


def test_stale_gauges_of_an_idle_engine_are_no_stall() -> None:
    """After the last client hung up no step runs and num_requests_running stays at its last value."""
    idle = (RankSample(rank=0, running=1, iterations=50, router_inflight=0),)
    state = reduce(healthy("a"), [probe("a", n, 2.0 + 10 * n, ranks=idle) for n in range(2, 9)])
    assert not state.workers["a"].ranks[0].stalled


def test_a_slow_client_is_no_stall() -> None:
    """The engine is done, its answer waits in the router for a client that does not read."""
    done = (RankSample(rank=0, running=0, iterations=50, router_inflight=1, router_unanswered=0),)
    state = reduce(healthy("a"), [probe("a", n, 2.0 + 10 * n, ranks=done) for n in range(2, 9)])
    assert not state.workers["a"].ranks[0].stalled


def test_one_stalled_rank_leaves_the_other_usable() -> None:
    def ranks(moving: int) -> tuple[RankSample, ...]:
        stuck = RankSample(rank=0, running=1, iterations=9, router_inflight=1)
        return (stuck, RankSample(rank=1, running=1, iterations=moving, router_inflight=1))

    state = run(config(), source(spec("a", data_parallel_size=2)), probe("a", 1, 1.0, ranks=ranks(1)))
    state = reduce(state, [probe("a", 2, 20.0, ranks=ranks(2))])
    assert state.workers["a"].target_health(0) is Health.SUSPECT
    assert state.workers["a"].target_health(1) is Health.HEALTHY


def test_reconfiguring_is_a_state_of_its_own_and_ends_with_the_first_good_probe() -> None:
    scaling = {"ok": False, "outcome": ProbeOutcome.RECONFIGURING}
    state = healthy("a")
    for sequence in (2, 3, 4):
        state = reduce(state, [probe("a", sequence, float(sequence), **scaling)])
        assert state.workers["a"].health is Health.RECONFIGURING
    assert state.workers["a"].conditions == (TargetCondition.RECONFIGURING,)
    state = reduce(state, [failures("r1", 1, 5.0, {"a": 4}), failures("r2", 1, 5.0, {"a": 4})])
    assert state.workers["a"].health is Health.RECONFIGURING
    state = reduce(state, [probe("a", 5, 6.0)])
    assert state.workers["a"].health is Health.HEALTHY
    assert state.workers["a"].conditions == ()


def test_a_commit_that_never_ends_is_given_up() -> None:
    """The flag is not reset when the commit raises: 503 on every path for good."""
    scaling = {"ok": False, "outcome": ProbeOutcome.RECONFIGURING}
    rules = FleetRules(reconfiguring_bound_s=100, gone_after_s=10)
    state = healthy("a", rules=rules)
    for sequence, at_s in ((2, 2.0), (3, 103.0), (4, 114.0)):
        state = reduce(state, [probe("a", sequence, at_s, **scaling)])
    assert state.workers["a"].health is Health.GONE


def test_counters_that_shrink_mean_a_new_engine() -> None:
    before = (RankSample(rank=0, iterations=100, generation_tokens=500),)
    after = (RankSample(rank=0, iterations=3, generation_tokens=4),)
    state = reduce(healthy("a"), [probe("a", 2, 2.0, ranks=before)])
    old = state.workers["a"].incarnation
    state = reduce(state, [probe("a", 3, 3.0, ranks=after)])
    assert state.workers["a"].incarnation == old + 1
    assert state.workers["a"].conditions == (TargetCondition.COUNTERS_RESET,)
    assert state.workers["a"].health is Health.HEALTHY
    state = reduce(state, [probe("a", 4, 100.0, ranks=after)])
    assert state.workers["a"].conditions == ()


def test_a_later_start_time_means_a_new_engine_even_when_counters_grew() -> None:
    state = reduce(healthy("a"), [probe("a", 2, 2.0, engine_started=1_000), probe("a", 3, 3.0, engine_started=2_000)])
    assert state.workers["a"].incarnation == 2_000
    assert TargetCondition.COUNTERS_RESET in state.workers["a"].conditions


def test_a_worker_that_never_answers_is_given_up_after_the_start_bound() -> None:
    state = run(config(), source(spec("a")), rules=FleetRules(start_bound_s=50))
    state = reduce(state, [probe("a", 1, 49.0, ok=False)])
    assert state.workers["a"].health is Health.STARTING
    state = reduce(state, [probe("a", 2, 50.0, ok=False)])
    assert state.workers["a"].health is Health.GONE


def test_history_is_bounded_and_latest_last() -> None:
    state = healthy("a")
    for sequence in range(2, 400):
        state = reduce(state, [probe("a", sequence, float(sequence), ok=sequence % 5 > 1)])
    log = state.logs["a"]
    assert len(log) == 100
    assert [entry.at_s for entry in log] == sorted(entry.at_s for entry in log)
