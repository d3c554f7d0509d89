"""Properties of the reducer: duplicates, reordering, restart, bounds."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.fleet.events import ControlChanged, Event, PolicyChanged, ProbeResult, RouterGone
from controlplane.fleet.reducer import reduce
from controlplane.fleet.snapshot import SnapshotBuilder, live, targets_of
from controlplane.fleet.state import FleetState
from controlplane.fleet.values import FleetRules, ProbeOutcome, RankSample, Source
from twofold import wire
from twofold.model.fleet import FleetSnapshot, Health, RoutingPolicy

from .builders import FACTS, config, failures, healthy, probe, run, source, spec

NAMES = ("a", "b", "c", "d")
REPLICAS = ("r1", "r2", "r3")


@st.composite
def histories(draw: st.DrawFn, length: int = 40) -> list[Event]:
    """Events as they happen: times and numbers grow."""
    events: list[Event] = [config()]
    sequences = dict.fromkeys((*NAMES, *REPLICAS), 0)
    streams = dict.fromkeys(REPLICAS, 1)
    version = 1
    for step in range(draw(st.integers(0, length))):
        at_s = float(step)
        kind = draw(st.sampled_from(("probe", "probe", "probe", "failures", "source", "control", "policy", "gone")))
        name, replica = draw(st.sampled_from(NAMES)), draw(st.sampled_from(REPLICAS))
        version += 1
        if kind == "probe":
            sequences[name] += 1
            events.append(_a_probe(draw, name, sequences[name], at_s))
        elif kind == "failures":
            sequences[replica] += 1
            counts = {name: draw(st.integers(0, 3))}
            events.append(failures(replica, sequences[replica], at_s, counts, streams[replica]))
        elif kind == "source":
            members = draw(st.lists(st.sampled_from(NAMES), unique=True))
            of = draw(st.sampled_from(list(Source)))
            events.append(source(*(spec(member) for member in members), version=version, of=of, at_s=at_s))
        elif kind == "control":
            cordoned = draw(st.booleans())
            events.append(ControlChanged(at_s=at_s, worker_id=name, version=version, cordoned=cordoned, draining=False))
        elif kind == "policy":
            policy = RoutingPolicy(alpha=draw(st.floats(0, 1)))
            events.append(PolicyChanged(at_s=at_s, version=version, policy=policy))
        else:
            events.append(RouterGone(at_s=at_s, replica_id=replica, stream=streams[replica]))
            streams[replica] += 1
    return events


def _a_probe(draw: st.DrawFn, name: str, sequence: int, at_s: float) -> ProbeResult:
    outcome = draw(st.sampled_from(list(ProbeOutcome)))
    block = draw(st.sampled_from((16, 32)))
    count = draw(st.integers(0, 9))
    rank = RankSample(
        rank=0, running=draw(st.integers(0, 2)), iterations=count, router_inflight=draw(st.integers(0, 2))
    )
    changes: dict[str, Any] = {"outcome": outcome, "ranks": (rank,)}
    if outcome is ProbeOutcome.OK:
        changes["facts"] = replace(FACTS, block_size_tokens=block)
    return probe(name, sequence, at_s, ok=outcome is ProbeOutcome.OK, **changes)


def apply(events: list[Event]) -> FleetState:
    """One batch for each event."""
    return run(*events)


def essence(state: FleetState) -> FleetState:
    """The state without what says which batch was last."""
    return replace(state, changed=frozenset(), load_changed=frozenset(), shared_changed=False)


@given(histories(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_duplicate_delivered_later_changes_nothing(events: list[Event], data: st.DataObject) -> None:
    expected = apply(events)
    # A probe of a worker that was not declared yet was dropped: its repetition is the first that counts.
    index = data.draw(st.sampled_from(_heard(events)))
    later = data.draw(st.integers(index + 1, len(events)))
    duplicated = [*events[:later], events[index], *events[later:]]
    assert essence(apply(duplicated)) == essence(expected)


def _heard(events: list[Event]) -> list[int]:
    """Indices of the events that found what they speak of."""
    state, found = FleetState(rules=FleetRules()), []
    for index, event in enumerate(events):
        if not isinstance(event, ProbeResult) or event.worker_id in state.workers:
            found.append(index)
        state = reduce(state, [event])
    return found


@given(histories(), st.data())
@settings(max_examples=100, deadline=None)
def test_an_event_overtaken_by_a_newer_one_of_its_key_is_dropped(events: list[Event], data: st.DataObject) -> None:
    """Delivering an old probe or report after a newer one equals never delivering it."""
    probes = [event for event in events if isinstance(event, ProbeResult)]
    pairs = [(x, y) for i, x in enumerate(probes) for y in probes[i + 1 :] if x.worker_id == y.worker_id]
    if not pairs:
        return
    old, new = data.draw(st.sampled_from(pairs))
    without = [event for event in events if event is not old]
    # The newer one must have found its worker, else it left no number behind.
    until = apply(without[: without.index(new)])
    if new.worker_id not in until.workers or until.workers[new.worker_id].probe_sequence >= new.sequence:
        return
    at = without.index(new) + 1
    late = [*without[:at], old, *without[at:]]
    assert essence(apply(late)) == essence(apply(without))


@given(histories())
@settings(max_examples=100, deadline=None)
def test_batches_do_not_matter_for_what_is_believed(events: list[Event]) -> None:
    """One batch or many: same health, facts and numbers. (A tie between values of a pool may fall differently.)"""
    steady = [config(), source(*(spec(name) for name in NAMES))]
    steady += [event for event in events if isinstance(event, ProbeResult)]
    one = reduce(FleetState(), steady)
    many = apply(steady)
    for name in NAMES:
        first, second = one.workers[name], many.workers[name]
        assert (first.health, first.facts, first.incarnation) == (second.health, second.facts, second.incarnation)
    assert one.ordinals == many.ordinals


@given(st.permutations(NAMES), st.permutations(NAMES))
@settings(max_examples=50, deadline=None)
def test_after_a_restart_the_world_gives_the_same_state(first: list[str], second: list[str]) -> None:
    """A new control plane that sees the same world believes the same, in whatever order it sees it."""

    def world(order: list[str]) -> FleetState:
        members = source(*(spec(name, incarnation=7) for name in order))
        events = [probe(name, 1, 1.0, engine_started=9) for name in order]
        order_given = ControlChanged(at_s=1.0, worker_id="b", version=3, cordoned=True, draining=False)
        return reduce(apply([order_given, config(), members]), events)

    builders = [SnapshotBuilder(epoch=5), SnapshotBuilder(epoch=5)]
    snapshots = [builder.build(world(order)) for builder, order in zip(builders, (first, second), strict=True)]
    assert snapshots[0] == snapshots[1]
    assert [target.cordoned for target in snapshots[0].targets] == [False, True, False, False]


@given(histories())
@settings(max_examples=100, deadline=None)
def test_the_snapshot_always_equals_one_built_from_scratch(events: list[Event]) -> None:
    """Incremental building forgets and invents nothing, and deltas lead to the same place."""
    builder, state = SnapshotBuilder(epoch=3), FleetState()
    reader = FleetSnapshot(epoch=3, version=0)
    for event in events:
        state = reduce(state, [event])
        before = builder.snapshot
        snapshot = builder.build(state)
        if snapshot.version != before.version:
            assert snapshot.version == before.version + 1
            reader = wire.apply_delta(reader, wire.diff(before, snapshot))
            assert reader == snapshot
        else:
            assert snapshot == before
    expected = sorted(
        (target for record in state.workers.values() for target in targets_of(record, state)), key=lambda t: t.target_id
    )
    assert list(builder.snapshot.targets) == expected
    assert builder.snapshot.policy == state.policy
    assert {pool.name: pool for pool in builder.snapshot.pools} == dict(state.pools)


@given(histories())
@settings(max_examples=60, deadline=None)
def test_the_old_state_is_never_changed(events: list[Event]) -> None:
    state = apply(events)
    text = repr(state)
    reduce(state, [probe(name, 1_000, 1_000.0, ok=False) for name in NAMES])
    reduce(state, [source(version=1_000), failures("r1", 1_000, 1_000.0, {"a": 5})])
    assert repr(state) == text


def test_no_events_no_new_state() -> None:
    state = healthy("a")
    assert reduce(state, []) is state


def test_a_probe_of_another_url_or_an_unknown_worker_is_dropped() -> None:
    state = healthy("a")
    assert reduce(state, [probe("a", 2, 2.0, url="http://old:1")]).workers == state.workers
    assert reduce(state, [probe("x", 2, 2.0)]).workers == state.workers


def test_where_two_sources_declare_a_worker_the_file_wins() -> None:
    from_lease = source(spec("a", zone="lease"), of=Source.LEASE)
    from_file = source(spec("a", zone="file"), of=Source.FILE)
    for order in ((from_lease, from_file), (from_file, from_lease)):
        state = run(config(), *order)
        assert (state.workers["a"].source, state.workers["a"].spec.zone) == (Source.FILE, "file")
    state = reduce(state, [source(version=2)])
    assert state.workers["a"].source is Source.LEASE


def test_workers_of_unknown_pools_and_profiles_wait_until_these_exist() -> None:
    state = run(config(), source(spec("a", pool="later"), spec("b", profile="nope")))
    assert not state.workers
    state = reduce(state, [config(2, "pool", "later")])
    assert set(state.workers) == {"a"}


def test_a_restarted_engine_starts_anew_with_a_higher_incarnation() -> None:
    state = run(config(), source(spec("a", incarnation=5)), probe("a", 1, 1.0))
    state = reduce(state, [source(spec("a", incarnation=9), version=2, at_s=2.0)])
    assert state.workers["a"].health is Health.STARTING
    assert state.workers["a"].incarnation == 9
    assert state.logs["a"][-1].reason == "starting"
    state = reduce(state, [source(spec("a", incarnation=1), version=3, at_s=3.0)])
    assert state.workers["a"].incarnation == 10


def test_draining_by_the_source_keeps_health_and_takes_no_work() -> None:
    state = reduce(healthy("a"), [source(spec("a", draining=True), version=2, at_s=2.0)])
    target = targets_of(state.workers["a"], state)[0]
    assert (target.health, target.draining, target.takes_work) == (Health.HEALTHY, True, False)


def test_ordinals_are_small_and_rest_before_they_are_used_again() -> None:
    state = run(config(), source(spec("a"), spec("b"), spec("c")))
    assert dict(state.ordinals.held) == {"a": 0, "b": 1, "c": 2}
    state = reduce(state, [source(spec("a"), spec("c"), version=2, at_s=10.0)])
    state = reduce(state, [source(spec("a"), spec("c"), spec("d"), version=3, at_s=20.0)])
    assert state.ordinals.held["d"] == 3
    state = reduce(state, [source(spec("a"), spec("c"), spec("d"), spec("e"), version=4, at_s=50.0)])
    assert state.ordinals.held["e"] == 1


def test_load_alone_makes_no_version() -> None:
    builder = SnapshotBuilder(epoch=1)
    state = healthy("a")
    builder.build(replace(state, changed=frozenset({"a"}), shared_changed=True))
    version = builder.snapshot.version
    state = reduce(state, [probe("a", 2, 2.0, facts=None, ranks=(RankSample(rank=0, running=7, iterations=1),))])
    assert state.load_changed == {"a"}
    assert builder.build(state).version == version
    assert builder.snapshot.targets[0].load.running == 0
    assert live(state, builder.snapshot).targets[0].load.running == 7


def test_weights_come_from_the_profile() -> None:
    state = healthy("a")
    target = targets_of(state.workers["a"], state)[0]
    assert target.weight_tokens_s == state.profiles[target.profile].capacity_tokens_s()


def test_histories_of_workers_that_left_are_bounded() -> None:
    state = run(config())
    for version in range(2, 5000):
        state = reduce(state, [source(spec(f"w{version}"), version=version, at_s=float(version))])
    assert len(state.logs) <= 4096
    assert "w4999" in state.logs
    assert len(state.ordinals.held) == 1
