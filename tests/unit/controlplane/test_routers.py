"""Load of replicas, passed on and merged; demand."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.routers.demand import DemandBook, difference
from controlplane.routers.load import MAX_ENTRIES, LoadError, ReplicaLoad
from twofold.v1 import router_pb2

FLOATS = ("queued_prefill_tokens", "queued_prefill_s", "kv_tokens", "stored_tokens")
COUNTS = ("inflight", "decodes", "failures")


def tick(sequence: int, rows: dict[int, int], epoch: int = 1, **changes: Any) -> router_pb2.LoadTick:
    """A tick in which every column of an ordinal has the same value."""
    made = router_pb2.LoadTick(epoch=epoch, sequence=sequence, ordinals=list(rows))
    for name in (*FLOATS, *COUNTS):
        getattr(made, name).extend(rows.values())
    for name, value in changes.items():
        del getattr(made, name)[:]
        getattr(made, name).extend(value)
    return made


def known(messages: list[bytes]) -> dict[int, tuple[float, ...]]:
    """What a reader knows after PeerLoad messages."""
    rows: dict[int, tuple[float, ...]] = {}
    for message in messages:
        load = router_pb2.ReportResponse.FromString(message).peers[0].load
        for index, ordinal in enumerate(load.ordinals):
            rows[ordinal] = tuple(getattr(load, name)[index] for name in (*FLOATS, *COUNTS))
    return rows


@given(
    st.lists(st.dictionaries(st.integers(0, 5), st.integers(0, 9), max_size=4), min_size=1, max_size=150),
    st.sets(st.integers(0, 149)),
)
@settings(max_examples=60, deadline=None)
def test_a_reader_that_reads_only_now_and_then_knows_the_same_in_the_end(
    ticks: list[dict[int, int]], moments: set[int]
) -> None:
    load, at = ReplicaLoad("r1"), 0
    messages, expected = [], {}
    for sequence, rows in enumerate(ticks):
        load.apply(tick(sequence, rows))
        expected.update({ordinal: (value,) * 7 for ordinal, value in rows.items()})
        if sequence in moments or sequence == len(ticks) - 1:
            messages.append(load.since(at))
            at = load.serial
    assert known(messages) == expected
    assert load.inflight == sum(values[0] for values in expected.values())


def test_the_last_tick_goes_on_as_it_came_and_is_encoded_once() -> None:
    load = ReplicaLoad("r1")
    sent = tick(3, {1: 2})
    sent.prefixes.add(ordinal=1, hashes=[7, 8])
    load.apply(sent)
    message = router_pb2.ReportResponse.FromString(load.since(0))
    assert (message.peers[0].replica_id, message.peers[0].load) == ("r1", sent)
    assert load.since(0) is load.since(0)


def test_failures_are_told_when_they_change() -> None:
    load = ReplicaLoad("r1")
    assert load.apply(tick(1, {1: 0, 2: 3})) == [(2, 3)]
    assert load.apply(tick(2, {1: 1, 2: 3})) == [(1, 1)]
    assert load.apply(tick(3, {2: 0})) == [(2, 0)]


def test_repeated_and_late_ticks_change_nothing() -> None:
    load = ReplicaLoad("r1")
    load.apply(tick(5, {1: 5}))
    serial = load.serial
    assert load.apply(tick(5, {1: 9})) == []
    assert load.apply(tick(4, {1: 9})) == []
    assert (load.serial, load.row(1).inflight) == (serial, 5)


def test_targets_that_are_no_more_are_forgotten() -> None:
    load = ReplicaLoad("r1")
    load.apply(tick(1, {1: 2, 2: 3}))
    load.keep_only({2})
    assert (load.row(1).inflight, load.row(2).inflight, load.inflight) == (0, 3, 3)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"inflight": [1]}, "load.inflight"),
        ({"failures": [1, 2, 3]}, "load.failures"),
        ({"kv_tokens": [float("nan"), 1.0]}, "load"),
        ({"queued_prefill_s": [-1.0, 1.0]}, "load"),
        ({"ordinals": [1, 1 << 30]}, "load.ordinals"),
    ],
)
def test_ticks_that_no_router_would_send_are_refused(changes: dict[str, Any], field: str) -> None:
    load = ReplicaLoad("r1")
    with pytest.raises(LoadError) as caught:
        load.apply(tick(1, {1: 2, 2: 3}, **changes))
    assert caught.value.field == field
    assert (load.serial, load.inflight) == (0, 0)


def test_a_tick_is_bounded() -> None:
    with pytest.raises(LoadError, match="more than"):
        ReplicaLoad("r1").apply(tick(1, dict.fromkeys(range(MAX_ENTRIES + 1), 0)))


def test_demand_is_summed_and_read_as_differences() -> None:
    book = DemandBook()
    first = router_pb2.DemandTick(interval_s=1, pools=[router_pb2.PoolDemand(pool="p", requests=3, prompt_tokens=100)])
    book.add(first)
    before = book.totals()
    book.add(first)
    book.add(router_pb2.DemandTick(interval_s=1, pools=[router_pb2.PoolDemand(pool="q", rejected=2)]))
    news = {pool.pool: pool for pool in difference(book.totals(), before)}
    assert (news["p"].requests, news["p"].prompt_tokens, news["q"].rejected) == (3, 100, 2)
    assert difference(book.totals(), book.totals())[0].requests == 0


@pytest.mark.parametrize(
    "bad",
    [
        router_pb2.DemandTick(interval_s=float("nan")),
        router_pb2.DemandTick(interval_s=-1),
        router_pb2.DemandTick(pools=[router_pb2.PoolDemand(pool="")]),
        router_pb2.DemandTick(pools=[router_pb2.PoolDemand(pool="x" * 200)]),
        router_pb2.DemandTick(pools=[router_pb2.PoolDemand(pool="p")] * 1025),
    ],
)
def test_demand_that_no_router_would_send_is_refused(bad: router_pb2.DemandTick) -> None:
    with pytest.raises(LoadError):
        DemandBook().add(bad)
