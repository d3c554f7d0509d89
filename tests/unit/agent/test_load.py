"""Load on its way up and down: what is sent when, and what the sum over peers is."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from router.agent.load import (
    FULL_REPORT_S,
    MAX_PEERS,
    MAX_PREFIXES_PER_TICK,
    MAX_SLOTS_PER_TICK,
    TICKS_PER_REFRESH,
    LoadCollector,
    RemoteLoad,
    SlotMap,
    Tick,
)
from router.agent.reporter import tick_from_proto, tick_to_proto
from router.routing.accounts import AccountsReader, AccountsWriter, LoadRow
from router.routing.buffers import Buffers, in_memory
from router.routing.dirty_log import DirtyLog, DirtyReader
from router.routing.prefix import DEPTH_SCHEDULE, broadcast_hashes
from router.routing.prefix_table import PrefixReader
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


def test_standing_load_is_repeated_within_a_second_of_ticks() -> None:
    buffers = in_memory(SLOTS)
    up = collector(buffers)
    writer(buffers[0]).dispatch(4, 100, 200, 0.5, 1.0)
    assert len(up.collect(MAP).rows) == 1
    rows = [row for _ in range(TICKS_PER_REFRESH + 1) for row in up.collect(MAP).rows]
    assert {ordinal for ordinal, _ in rows} == {104}


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


def remote(buffers: tuple[Buffers, ...]) -> tuple[RemoteLoad, AccountsReader]:
    region = buffers[0].remote
    return RemoteLoad(region, [b.own for b in buffers], peer_timeout_s=2.0), AccountsReader((region.accounts,))


def tick(**rows: LoadRow) -> Tick:
    return Tick(rows=tuple((int(name[1:]), row) for name, row in rows.items()))


def test_peers_are_summed_and_a_peer_that_leaves_or_falls_silent_is_subtracted() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 3, tick(o101=LoadRow(inflight=2, kv_tokens=10.0)), MAP, 0.0)
    down.receive("b", 3, tick(o101=LoadRow(inflight=3, decodes=1, kv_tokens=5.0)), MAP, 1.0)
    assert reader.row(1).inflight == 5
    assert reader.row(1).kv_tokens == 15.0
    down.forget_peer("a", 1.0)
    assert reader.row(1) == LoadRow(inflight=3, decodes=1, kv_tokens=5.0)
    assert down.expire(2.9) == []
    down.receive("b", 3, Tick(), MAP, 2.9)
    assert down.expire(4.8) == []
    assert down.expire(5.0) == ["b"]
    assert reader.row(1) == LoadRow()


def test_ticks_of_another_epoch_and_unknown_ordinals_are_dropped() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 4, tick(o101=LoadRow(inflight=2)), MAP, 0.0)
    down.receive("a", 3, tick(o9999=LoadRow(inflight=2)), MAP, 0.0)
    assert down.dropped_ticks == 1
    assert all(reader.row(slot) == LoadRow() for slot in range(SLOTS))


def test_the_number_of_peers_is_bounded() -> None:
    down, _ = remote(in_memory(SLOTS))
    for number in range(MAX_PEERS + 10):
        down.receive(f"peer-{number}", 3, Tick(), MAP, 0.0)
    assert len(down.peers) == MAX_PEERS
    assert down.dropped_ticks == 10


def test_changes_are_marked_for_the_relays() -> None:
    buffers = in_memory(SLOTS)
    down, _ = remote(buffers)
    seen = DirtyReader(buffers[0].remote.dirty)
    down.receive("a", 3, tick(o101=LoadRow(inflight=2)), MAP, 0.0)
    assert list(seen.take(10) or ()) == [1]
    down.forget_peer("a", 1.0)
    assert list(seen.take(10) or ()) == [1]


def test_the_stored_clock_neither_jumps_nor_goes_back() -> None:
    buffers = in_memory(SLOTS)
    down, reader = remote(buffers)
    late = FULL_REPORT_S + 1.0

    def stored() -> float:
        return reader.row(1).stored_tokens

    down.receive("a", 3, tick(o101=LoadRow(stored_tokens=1e6)), MAP, 0.0)
    assert stored() == 0, "history before it was heard of"
    down.receive("a", 3, tick(o101=LoadRow(stored_tokens=1e6 + 50)), MAP, 0.1)
    assert stored() == 50
    down.receive("a", 3, tick(o102=LoadRow(stored_tokens=30)), MAP, late)
    assert reader.row(2).stored_tokens == 30, "a slot it began to use later is news"
    down.receive("a", 3, tick(o101=LoadRow(stored_tokens=7)), MAP, late)
    assert stored() == 57, "it started again and counts from zero"
    down.forget_peer("a", late)
    assert stored() == 57
    again, reader = remote(buffers)
    again.recover(late)
    assert stored() == 57
    again.receive("a", 3, tick(o101=LoadRow(stored_tokens=1e6)), MAP, late)
    assert stored() == 57


def test_recovery_forgets_work_of_peers_until_they_report() -> None:
    buffers = in_memory(SLOTS)
    first, reader = remote(buffers)
    first.receive("a", 3, tick(o101=LoadRow(inflight=9)), MAP, 0.0)
    second, reader = remote(buffers)
    second.recover(1.0)
    assert reader.row(1).inflight == 0


def test_a_slot_given_to_another_target_starts_from_nothing() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 3, tick(o101=LoadRow(inflight=2, stored_tokens=4.0)), MAP, 0.0)
    down.receive("a", 3, tick(o101=LoadRow(inflight=2, stored_tokens=9.0)), MAP, 0.0)
    down.clear_slots([1], 1.0)
    assert reader.row(1) == LoadRow()


def test_prefixes_of_peers_are_found_by_the_routing_core() -> None:
    buffers = in_memory(SLOTS)
    down, _ = remote(buffers)
    chain = tuple(range(1000, 1000 + DEPTH_SCHEDULE[9]))
    sent = Tick(prefixes=((105, broadcast_hashes(chain)), (105, [1]), (9999, [1, 2])))
    down.receive("a", 3, sent, MAP, 5.0)
    table = PrefixReader((buffers[0].remote.prefixes,))
    assert table.cached_chunks(MAP.salt_of_slot[5], chain, 0.0, 1e6) == len(chain)
    assert table.cached_chunks(MAP.salt_of_slot[6], chain, 0.0, 1e6) == 0


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
    assert tick_from_proto(router_pb2.LoadTick.FromString(data)) == sent


uint32s = st.integers(0, 2**32 - 1)
any_floats = st.floats(width=32)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(uint32s, uint32s, uint32s, any_floats, any_floats, any_floats, any_floats, uint32s), max_size=20
    ),
    prefixes=st.lists(st.tuples(uint32s, st.lists(st.integers(0, 2**64 - 1), max_size=200)), max_size=3),
)
def test_whatever_a_peer_says_leaves_finite_accounts(
    rows: list[tuple[int, int, int, float, float, float, float, int]], prefixes: list[tuple[int, list[int]]]
) -> None:
    columns = list(zip(*rows, strict=True)) if rows else [()] * 8
    names = ("ordinals", "inflight", "decodes", "queued_prefill_tokens", "queued_prefill_s", "kv_tokens")
    message = router_pb2.LoadTick(
        epoch=3,
        **dict(zip((*names, "stored_tokens", "failures"), columns, strict=True)),
        prefixes=[router_pb2.SentPrefix(ordinal=ordinal, hashes=hashes) for ordinal, hashes in prefixes],
    )
    got = tick_from_proto(router_pb2.LoadTick.FromString(message.SerializeToString()))
    assert got is not None
    down, reader = remote(in_memory(SLOTS))
    # Ordinals are made to hit, so that what was parsed reaches the accounts.
    hitting = tuple((100 + ordinal % SLOTS, row) for ordinal, row in got.rows)
    told = tuple((100 + ordinal % SLOTS, hashes) for ordinal, hashes in got.prefixes)
    down.receive("a", 3, Tick(rows=hitting, prefixes=told), MAP, 0.0)
    for slot in range(SLOTS):
        row = reader.row(slot)
        assert math.isfinite(row.queued_prefill_s + row.queued_prefill_tokens + row.kv_tokens + row.stored_tokens)
        assert 0 <= row.decodes <= row.inflight


@settings(deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["tick", "gone", "clear"]), st.integers(0, 4), st.integers(0, SLOTS - 1), load_rows),
        max_size=60,
    )
)
def test_after_any_events_the_region_is_the_sum_over_the_present_peers(
    events: list[tuple[str, int, int, LoadRow]],
) -> None:
    down, reader = remote(in_memory(SLOTS))
    present: dict[int, dict[int, LoadRow]] = {}
    for kind, peer, slot, row in events:
        if kind == "tick":
            down.receive(str(peer), 3, Tick(rows=((100 + slot, row),)), MAP, 0.0)
            present.setdefault(peer, {})[slot] = row
        elif kind == "gone":
            down.forget_peer(str(peer), 0.0)
            present.pop(peer, None)
        else:
            down.clear_slots([slot], 0.0)
            for rows in present.values():
                rows.pop(slot, None)
    for slot in range(SLOTS):
        held = [rows[slot] for rows in present.values() if slot in rows]
        got = reader.row(slot)
        assert got.inflight == sum(row.inflight for row in held)
        assert got.failures == sum(row.failures for row in held)
        assert abs(got.kv_tokens - sum(row.kv_tokens for row in held)) < 1e-3
