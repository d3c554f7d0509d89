"""The least-work heap against a plain minimum, and that it stays small and current."""

from hypothesis import given, settings
from hypothesis import strategies as st
from support.routing import chain_of, live_fleets, live_on, request, snapshot, target

from router.routing.accounts import LoadRow
from router.routing.buffers import in_memory
from router.routing.least_work import MAX_SKIPS, LeastWork
from router.routing.live import LiveFleet
from router.routing.remote import RemoteLoad, ReplicaLoad
from twofold.model.fleet import EngineFacts
from twofold.model.reasons import TargetRole


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 15), st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0])), max_size=200),
    st.sets(st.integers(0, 11), max_size=MAX_SKIPS),
)
def test_the_best_is_the_minimum_and_the_heap_is_bounded(
    size: int, updates: list[tuple[int, float]], out: set[int]
) -> None:
    work = dict.fromkeys(range(size), 1.0)
    heap = LeastWork(work.items())
    for slot, work_s in updates:
        heap.update(slot, work_s)
        if slot in work:
            work[slot] = work_s
        assert len(heap._heap) <= 2 * size + 16
        eligible = [(work[s], s) for s in work if s not in out]
        assert heap.best(lambda s: s not in out) == (min(eligible)[1] if eligible else None)
    assert len(heap) == size


def test_no_more_than_four_are_passed_over() -> None:
    heap = LeastWork((slot, float(slot)) for slot in range(20))
    asked: list[int] = []
    assert heap.best(lambda slot: asked.append(slot) or slot > MAX_SKIPS) is None
    assert asked == list(range(MAX_SKIPS + 1))
    assert heap.best(lambda slot: slot >= MAX_SKIPS) == MAX_SKIPS
    assert heap.best(lambda slot: True) == 0


def test_idle_targets_that_take_no_work_do_not_hide_the_least_loaded() -> None:
    live = live_fleets(snapshot([target(i, cordoned=i < 10) for i in range(20)]))[0]
    seen = live.decide(request(chain_of(5, 40)), 0.0).examined
    escapes = [s for s in seen if s.role is TargetRole.ESCAPE]
    assert escapes
    assert not escapes[0].ineligible


def test_an_adapter_has_a_heap_of_its_own() -> None:
    facts = EngineFacts(adapters=("lora",))
    bare = EngineFacts(served_models=("m",))
    targets = [target(i, facts=facts if i == 19 else bare) for i in range(20)]
    live = live_fleets(snapshot(targets, adapters=("lora",)))[0]
    for key in range(30):
        decision = live.decide(request((key << 58,), adapter="lora"), 0.0)
        assert decision.slot == 19


def replica(relays: int = 2) -> tuple[tuple[LiveFleet, ...], ReplicaLoad, RemoteLoad]:
    """Relays of one replica and both sides of their agent."""
    fleet = snapshot([target(i) for i in range(6)])
    buffers = in_memory(64, relays, 1 << 10)
    regions = tuple(b.own for b in buffers)
    return (
        tuple(live_on(fleet, b) for b in buffers),
        ReplicaLoad(regions, [b.sent for b in buffers]),
        RemoteLoad(regions, buffers[0].remote),
    )


def test_what_one_replica_sends_another_replica_prices() -> None:
    (one, _), outbound, _ = replica()
    (far, _), _, inbound = replica()
    chain = tuple(range(100, 140))
    decision = one.decide(request(chain), 0.0)
    ticket = one.account(request(chain), decision, 0.0)
    assert outbound.changed() == {decision.slot}
    assert outbound.changed() == set()
    inbound.set_row(decision.slot, outbound.row(decision.slot), 0.02)
    for slot, told in outbound.drain_sent():
        inbound.prefix_sent(slot, f"w{slot:04d}", 0, told, 0.02)
    seen = next(s for s in far.decide(request((*chain, 1)), 0.02).examined if s.slot == decision.slot)
    assert seen.cached_tokens == 40 * 256
    assert seen.wait_s >= one.load(decision.slot).queued_s
    ticket.finish(1.0)
    assert outbound.changed() == {decision.slot}
    inbound.set_row(decision.slot, outbound.row(decision.slot), 1.0)
    far.decide(request(), 1.0)
    assert far.load(decision.slot).inflight == 0


def test_prefixes_of_another_incarnation_are_not_believed() -> None:
    (far, _), _, inbound = replica()
    for slot in range(6):
        inbound.prefix_sent(slot, f"w{slot:04d}", 3, [5, 6, 6], 0.0)
        inbound.prefix_sent(slot, f"w{slot:04d}", 0, [5], 0.0)
    assert all(seen.cached_tokens == 0 for seen in far.decide(request((5, 6)), 0.0).examined)


def test_a_flood_of_remote_changes_keeps_the_offered_target_current() -> None:
    (live, _), _, inbound = replica()
    for round_number in range(3000):
        inbound.set_row(round_number % 6, LoadRow(inflight=1, queued_prefill_s=50.0, queued_prefill_tokens=1000), 0.0)
    inbound.set_row(4, LoadRow(), 1.0)
    decision = live.decide(request(), 1.0)
    assert decision.slot == 4
