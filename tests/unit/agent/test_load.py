"""Load on its way up: what is sent when."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from router.agent.load import (
    MAX_PREFIXES_PER_TICK,
    MAX_SLOTS_PER_TICK,
    REFRESHES_PER_REPEAT,
    TICKS_PER_REFRESH,
    LoadCollector,
    SlotMap,
    Tick,
)
from router.agent.reporter import news_from_proto, tick_to_proto
from router.routing.accounts import AccountsWriter, LoadRow
from router.routing.buffers import Buffers, in_memory
from router.routing.dirty_log import DirtyLog
from router.routing.sent_prefixes import SentPrefixes
from twofold.v1 import router_pb2

SLOTS = 16
MAP = SlotMap(
    epoch=3,
    slot_of_ordinal={100 + slot: slot for slot in range(SLOTS)},
    ordinal_of_slot={slot: 100 + slot for slot in range(SLOTS)},
    salt_of_slot={slot: 7 * slot for slot in range(SLOTS)},
)


def collector(buffers: tuple[Buffers, ...]) -> LoadCollector:
    return LoadCollector([b.own for b in buffers], [b.sent for b in buffers])


def writer(buffers: Buffers) -> AccountsWriter:
    return AccountsWriter(buffers.own.accounts, DirtyLog(buffers.own.dirty))


def test_only_what_changed_goes_out_and_relays_are_summed() -> None:
    buffers = in_memory(SLOTS, relays=2)
    up = collector(buffers)
    assert up.collect(MAP) == Tick()
    entries = [writer(b).dispatch(4, 100, 200, 0.5, 1.0) for b in buffers]
    (row,) = up.collect(MAP).rows
    assert row == (104, LoadRow(inflight=2, queued_prefill_tokens=200.0, queued_prefill_s=1.0, stored_tokens=200.0))
    assert up.collect(MAP).rows == ()
    del entries


def told(up: LoadCollector, ticks: int, slots: SlotMap = MAP) -> list[tuple[int, LoadRow]]:
    """All rows of the next ticks."""
    return [row for _ in range(ticks) for row in up.collect(slots).rows]


def test_standing_load_is_repeated_now_and_then() -> None:
    buffers = in_memory(SLOTS)
    up = collector(buffers)
    out = writer(buffers[0])
    out.dispatch(4, 100, 200, 0.5, 1.0)
    out.finish(out.dispatch(5, 100, 200, 0.5, 1.0))
    assert len(told(up, 2)) == 2
    rows = told(up, TICKS_PER_REFRESH * REFRESHES_PER_REPEAT)
    assert [ordinal for ordinal, _ in rows] == [104], "once each, and not what is idle"


def test_tokens_of_running_streams_are_told_when_they_moved_far_enough() -> None:
    buffers = in_memory(SLOTS)
    up, out = collector(buffers), writer(buffers[0])
    entry = out.dispatch(4, 100, 200, 0.5, 1.0)
    out.first_token(entry, 2.0)
    told(up, TICKS_PER_REFRESH)
    out.tokens(entry, 100)
    assert told(up, TICKS_PER_REFRESH) == []
    out.tokens(entry, 500)
    ((ordinal, row),) = told(up, TICKS_PER_REFRESH)
    assert (ordinal, row.kv_tokens, row.stored_tokens) == (104, 800.0, 700.0)
    assert told(up, TICKS_PER_REFRESH) == []


def test_ordinals_of_another_table_are_told_anew() -> None:
    buffers = in_memory(SLOTS)
    up, out = collector(buffers), writer(buffers[0])
    out.dispatch(1, 10, 10, 0.1, 1.0)
    out.dispatch(2, 10, 10, 0.1, 1.0)
    assert len(told(up, 1)) == 2
    moved = SlotMap(epoch=3, slot_of_ordinal={101: 1, 777: 2}, ordinal_of_slot={1: 101, 2: 777}, salt_of_slot={})
    assert [ordinal for ordinal, _ in told(up, 1, moved)] == [777]
    other_epoch = SlotMap(epoch=4, slot_of_ordinal={1: 1, 2: 2}, ordinal_of_slot={1: 1, 2: 2}, salt_of_slot={})
    assert sorted(ordinal for ordinal, _ in told(up, 1, other_epoch)) == [1, 2]


def test_a_slot_that_became_idle_is_reported_idle() -> None:
    buffers = in_memory(SLOTS)
    up, out = collector(buffers), writer(buffers[0])
    entry = out.dispatch(4, 100, 200, 0.5, 1.0)
    up.collect(MAP)
    out.finish(entry)
    ((ordinal, row),) = up.collect(MAP).rows
    assert (ordinal, row.inflight, row.stored_tokens) == (104, 0, 100.0)


def test_a_new_stream_begins_with_everything() -> None:
    buffers = in_memory(SLOTS)
    up, out = collector(buffers), writer(buffers[0])
    for slot in (1, 2, 3):
        out.dispatch(slot, 10, 10, 0.1, 1.0)
    up.collect(MAP)
    up.restart()
    assert sorted(ordinal for ordinal, _ in up.collect(MAP).rows) == [101, 102, 103]


def test_slots_of_no_target_are_left_out() -> None:
    buffers = in_memory(SLOTS)
    up, out = collector(buffers), writer(buffers[0])
    out.dispatch(1, 10, 10, 0.1, 1.0)
    out.dispatch(2, 10, 10, 0.1, 1.0)
    SentPrefixes(buffers[0].sent).append(1, [5, 6])
    part = SlotMap(epoch=3, slot_of_ordinal={102: 2}, ordinal_of_slot={2: 102}, salt_of_slot={2: 0})
    tick = up.collect(part)
    assert [ordinal for ordinal, _ in tick.rows] == [102]
    assert tick.prefixes == ()


def test_a_reader_that_missed_changes_scans_everything() -> None:
    buffers = in_memory(SLOTS)
    up, out = collector(buffers), writer(buffers[0])
    for _ in range(6000):
        out.finish(out.dispatch(3, 1, 1, 0.001, 1.0))
    out.dispatch(9, 1, 1, 0.001, 1.0)
    assert sorted(ordinal for ordinal, _ in up.collect(MAP).rows) == [103, 109]


def test_ticks_are_bounded_and_nothing_is_lost() -> None:
    slots = MAX_SLOTS_PER_TICK + 500
    big = SlotMap(
        epoch=1,
        slot_of_ordinal={slot: slot for slot in range(slots)},
        ordinal_of_slot={slot: slot for slot in range(slots)},
        salt_of_slot=dict.fromkeys(range(slots), 0),
    )
    buffers = in_memory(slots)
    up, out = collector(buffers), writer(buffers[0])
    for slot in range(slots):
        out.dispatch(slot, 1, 1, 0.001, 1.0)
    for _ in range(500):
        SentPrefixes(buffers[0].sent).append(1, [1, 2])
    refresh = -(-slots // TICKS_PER_REFRESH)
    seen: set[int] = set()
    first = up.collect(big)
    assert len(first.rows) <= MAX_SLOTS_PER_TICK + refresh
    assert len(first.prefixes) <= MAX_PREFIXES_PER_TICK
    seen.update(ordinal for ordinal, _ in first.rows)
    assert up.pending > 0
    prefixes = len(first.prefixes)
    for _ in range(5):
        tick = up.collect(big)
        seen.update(ordinal for ordinal, _ in tick.rows)
        prefixes += len(tick.prefixes)
    assert seen == set(range(slots))
    assert prefixes == 500


counts = st.integers(0, 1000)
amounts = st.floats(0, 1e6, width=32)
load_rows = st.builds(
    LoadRow,
    inflight=counts,
    decodes=st.just(0),
    queued_prefill_tokens=amounts,
    queued_prefill_s=amounts,
    kv_tokens=amounts,
    stored_tokens=amounts,
    failures=counts,
)


@settings(deadline=None)
@given(
    rows=st.dictionaries(st.integers(0, 2**32 - 1), load_rows, max_size=20),
    prefixes=st.lists(st.tuples(st.integers(0, 1000), st.lists(st.integers(0, 2**64 - 1), max_size=5)), max_size=5),
)
def test_ticks_survive_the_wire(rows: dict[int, LoadRow], prefixes: list[tuple[int, list[int]]]) -> None:
    sent = Tick(rows=tuple(rows.items()), prefixes=tuple(prefixes))
    data = tick_to_proto(sent, 3, 1).SerializeToString()
    got = news_from_proto(router_pb2.LoadTick.FromString(data))
    assert got is not None
    assert got.rows == [(ordinal, msgspec.structs.astuple(row)) for ordinal, row in sent.rows]
    assert got.prefixes == list(sent.prefixes)
