"""Load of peers: what the sum in shared memory is."""

import math

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from router.agent.load import SlotMap
from router.agent.remote import FULL_REPORT_S, MAX_PEERS, SILENT_KEPT_S, News, RemoteLoad
from router.agent.reporter import news_from_proto
from router.routing.accounts import AccountsReader, LoadRow
from router.routing.buffers import Buffers, in_memory
from router.routing.dirty_log import DirtyReader
from router.routing.prefix import DEPTH_SCHEDULE, broadcast_hashes
from router.routing.prefix_table import PrefixReader
from twofold.v1 import router_pb2

SLOTS = 16


def map_of(first: int, epoch: int = 3, slots: int = SLOTS) -> SlotMap:
    """Slot i is ordinal first + i."""
    return SlotMap(
        epoch=epoch,
        slot_of_ordinal={first + slot: slot for slot in range(slots)},
        ordinal_of_slot={slot: first + slot for slot in range(slots)},
        salt_of_slot={slot: 7 * slot for slot in range(slots)},
    )


MAP = map_of(100)


def remote(buffers: tuple[Buffers, ...]) -> tuple[RemoteLoad, AccountsReader]:
    region = buffers[0].remote
    return RemoteLoad(region, [b.own for b in buffers], peer_timeout_s=2.0), AccountsReader((region.accounts,))


def tick(**rows: LoadRow) -> News:
    """Rows by ordinal: o101=..."""
    return news({int(name[1:]): row for name, row in rows.items()})


def news(rows: dict[int, LoadRow]) -> News:
    """Rows by ordinal."""
    return News(rows=[(ordinal, msgspec.structs.astuple(row)) for ordinal, row in rows.items()])


def test_peers_are_summed_and_a_peer_that_leaves_or_falls_silent_is_subtracted() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 3, tick(o101=LoadRow(inflight=2, kv_tokens=10.0)), MAP, 0.0)
    down.receive("b", 3, tick(o101=LoadRow(inflight=3, decodes=1, kv_tokens=5.0)), MAP, 1.0)
    assert reader.row(1).inflight == 5
    assert reader.row(1).kv_tokens == 15.0
    down.forget_peer("a", 1.0)
    assert reader.row(1) == LoadRow(inflight=3, decodes=1, kv_tokens=5.0)
    assert down.expire(2.9) == []
    down.receive("b", 3, News(), MAP, 2.9)
    assert down.expire(4.8) == []
    assert down.expire(5.0) == ["b"]
    assert reader.row(1) == LoadRow()


def test_rows_of_another_epoch_and_unknown_ordinals_wait_for_their_table() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 4, tick(o201=LoadRow(inflight=2)), MAP, 0.0)
    down.receive("b", 3, tick(o101=LoadRow(inflight=1), o999=LoadRow(inflight=7)), MAP, 0.0)
    assert [reader.row(slot).inflight for slot in (1, 2)] == [1, 0]
    wider = SlotMap(
        epoch=3,
        slot_of_ordinal={**MAP.slot_of_ordinal, 999: 2},
        ordinal_of_slot={**MAP.ordinal_of_slot, 2: 999},
        salt_of_slot=MAP.salt_of_slot,
    )
    down.place(wider, {2}, 1.0)
    assert [reader.row(slot).inflight for slot in (1, 2)] == [1, 7]
    down.place(map_of(200, epoch=4), frozenset(), 2.0)
    assert [reader.row(slot).inflight for slot in (1, 2)] == [2, 0], "ordinals of the old epoch mean nothing now"


def test_a_full_message_replaces_all_rows() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 3, tick(o101=LoadRow(inflight=2), o102=LoadRow(inflight=3)), MAP, 0.0)
    down.receive("a", 3, tick(o102=LoadRow(inflight=4)), MAP, 0.0, full=True)
    assert [reader.row(slot).inflight for slot in (1, 2)] == [0, 4]
    down.receive("a", 3, tick(o101=LoadRow(inflight=1)), MAP, 0.0)
    assert [reader.row(slot).inflight for slot in (1, 2)] == [1, 4]


def test_a_silent_peer_counts_again_when_it_is_heard_of() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 3, tick(o101=LoadRow(inflight=2), o102=LoadRow(inflight=3)), MAP, 0.0)
    assert down.expire(3.0) == ["a"]
    assert not down.peers
    assert [reader.row(slot).inflight for slot in (1, 2)] == [0, 0]
    assert down.expire(3.5) == []
    down.receive("a", 3, tick(o102=LoadRow(inflight=5)), MAP, 4.0)
    assert [reader.row(slot).inflight for slot in (1, 2)] == [2, 5]
    down.expire(7.0)
    down.expire(7.0 + SILENT_KEPT_S)
    down.receive("a", 3, tick(o102=LoadRow(inflight=1)), MAP, 8.0 + SILENT_KEPT_S)
    assert [reader.row(slot).inflight for slot in (1, 2)] == [0, 1], "too long ago"


def test_a_target_that_comes_back_under_another_ordinal_keeps_its_slot_but_not_the_rows() -> None:
    down, reader = remote(in_memory(SLOTS))
    down.receive("a", 3, tick(o101=LoadRow(inflight=2, stored_tokens=10.0)), MAP, 0.0)
    moved = {ordinal: slot for ordinal, slot in MAP.slot_of_ordinal.items() if slot != 1} | {500: 1}
    table = SlotMap(
        epoch=3,
        slot_of_ordinal=moved,
        ordinal_of_slot={slot: ordinal for ordinal, slot in moved.items()},
        salt_of_slot=MAP.salt_of_slot,
    )
    down.place(table, frozenset(), 1.0)
    assert reader.row(1).inflight == 0
    down.receive("a", 3, tick(o500=LoadRow(inflight=3, stored_tokens=14.0)), table, 1.0)
    assert (reader.row(1).inflight, reader.row(1).stored_tokens) == (3, 4.0)


def test_the_number_of_peers_is_bounded() -> None:
    down, _ = remote(in_memory(SLOTS))
    for number in range(MAX_PEERS + 10):
        down.receive(f"peer-{number}", 3, News(), MAP, 0.0)
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
    sent = News(prefixes=((105, broadcast_hashes(chain)), (105, [1]), (9999, [1, 2])))
    down.receive("a", 3, sent, MAP, 5.0)
    table = PrefixReader(buffers[0].remote.prefixes)
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
    got = news_from_proto(router_pb2.LoadTick.FromString(message.SerializeToString()))
    assert got is not None
    down, reader = remote(in_memory(SLOTS))
    # Ordinals are made to hit, so that what was parsed reaches the accounts.
    hitting = tuple((100 + ordinal % SLOTS, row) for ordinal, row in got.rows)
    told = tuple((100 + ordinal % SLOTS, hashes) for ordinal, hashes in got.prefixes)
    down.receive("a", 3, News(rows=hitting, prefixes=told), MAP, 0.0)
    for slot in range(SLOTS):
        row = reader.row(slot)
        assert math.isfinite(row.queued_prefill_s + row.queued_prefill_tokens + row.kv_tokens + row.stored_tokens)
        assert 0 <= row.decodes <= row.inflight


@settings(deadline=None)
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["tick", "full", "gone", "clear", "silence"]),
            st.integers(0, 4),
            st.integers(0, SLOTS - 1),
            load_rows,
        ),
        max_size=60,
    )
)
def test_after_any_events_the_region_is_the_sum_over_the_present_peers(
    events: list[tuple[str, int, int, LoadRow]],
) -> None:
    down, reader = remote(in_memory(SLOTS))
    present: dict[int, dict[int, LoadRow]] = {}
    silent: set[int] = set()
    now_s = 0.0
    for kind, peer, slot, row in events:
        if kind in ("tick", "full"):
            down.receive(str(peer), 3, news({100 + slot: row}), MAP, now_s, full=kind == "full")
            kept = present.setdefault(peer, {}) if kind == "tick" else {}
            present[peer] = {**kept, slot: row}
            silent.discard(peer)
        elif kind == "silence":
            now_s += 5.0
            down.expire(now_s)
            silent.update(present)
        elif kind == "gone":
            down.forget_peer(str(peer), 0.0)
            present.pop(peer, None)
            silent.discard(peer)
        else:
            down.clear_slots([slot], 0.0)
            for rows in present.values():
                rows.pop(slot, None)
    for slot in range(SLOTS):
        held = [rows[slot] for peer, rows in present.items() if slot in rows and peer not in silent]
        got = reader.row(slot)
        assert got.inflight == sum(row.inflight for row in held)
        assert got.failures == sum(row.failures for row in held)
        assert abs(got.kv_tokens - sum(row.kv_tokens for row in held)) < 1e-3
