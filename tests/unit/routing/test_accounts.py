"""The books: exact, back to zero, seen by all, dated well; and the logs that spread the news."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing import dirty_log, sent_prefixes
from router.routing.accounts import (
    AccountsReader,
    AccountsWriter,
    Load,
    LoadRow,
    quantise_s,
    region_bytes,
)
from router.routing.dirty_log import DirtyLog, DirtyReader
from router.routing.sent_prefixes import SentPrefixes, SentPrefixReader

SLOTS = 5


class Books:
    """Two writers and what everybody sums."""

    def __init__(self) -> None:
        self.regions = tuple(memoryview(bytearray(region_bytes(SLOTS))) for _ in range(2))
        self.logs = tuple(memoryview(bytearray(dirty_log.region_bytes(64))) for _ in range(2))
        self.writers = tuple(
            AccountsWriter(region, DirtyLog(log)) for region, log in zip(self.regions, self.logs, strict=True)
        )
        self.reader = AccountsReader(self.regions)


STEP = st.tuples(
    st.integers(0, 1),  # writer
    st.integers(0, SLOTS - 1),
    st.integers(0, 200_000),  # uncached tokens
    st.floats(0, 500, allow_nan=False),  # seconds of work
    st.sampled_from(["dispatch", "first", "tokens", "finish"]),
    st.integers(0, 1000),  # picks an open request
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=80))
def test_accounts_are_exactly_zero_after_any_interleaving(steps: list[tuple[int, int, int, float, str, int]]) -> None:
    books = Books()
    entries = []
    for now, (writer, slot, tokens, work, action, pick) in enumerate(steps):
        if action == "dispatch" or not entries:
            entries.append((writer, books.writers[writer].dispatch(slot, tokens, tokens + 10, work, float(now))))
            continue
        owner, entry = entries[pick % len(entries)]
        if action == "first":
            books.writers[owner].first_token(entry, float(now))
        elif action == "tokens":
            books.writers[owner].tokens(entry, 7)
        else:
            books.writers[owner].finish(entry)
            books.writers[owner].finish(entry)
        check_sums(books, [e for _, e in entries])
    for owner, entry in entries:
        books.writers[owner].finish(entry)
        books.writers[owner].first_token(entry, 1e6)
        books.writers[owner].tokens(entry, 3)
    for slot in range(SLOTS):
        load = books.reader.load(slot)
        assert load.inflight == load.decodes == load.queued_requests == load.queued_tokens == 0
        assert load.queued_s == load.kv_tokens == load.head_sent_s == load.head_work_s == 0
        assert load.remaining(1e9) == (0.0, 0.0)


def check_sums(books: Books, entries: list) -> None:
    for slot in range(SLOTS):
        load = books.reader.load(slot)
        here = [entry for entry in entries if entry.slot == slot and not entry.done]
        queued = [entry for entry in here if not entry.decoding]
        assert load.inflight == len(here)
        assert load.decodes == len(here) - len(queued)
        assert load.queued_requests == len(queued)
        assert load.queued_tokens == sum(entry.uncached_tokens for entry in queued)
        assert load.queued_s == sum(entry.work_s for entry in queued)
        assert load.kv_tokens == sum(entry.kv_tokens for entry in here)
        if queued:
            assert load.head_sent_s == min(entry.sent_s for entry in queued)


def test_what_one_relay_dispatches_the_other_sees_at_once() -> None:
    books = Books()
    books.writers[0].dispatch(3, 1000, 1500, 0.5, 10.0)
    assert books.reader.load(3).queued_s == 0.5
    books.writers[1].dispatch(3, 2000, 2500, 0.25, 11.0)
    load = books.reader.load(3)
    assert (load.inflight, load.queued_s, load.queued_tokens, load.head_sent_s, load.head_work_s) == (
        2,
        0.75,
        3000,
        10.0,
        0.5,
    )


def test_work_left_shrinks_with_time_and_never_below_what_waits_behind_the_head() -> None:
    load = Load(queued_requests=2, queued_tokens=300, queued_s=3.0, head_sent_s=10.0, head_work_s=1.0)
    assert load.remaining(10.0) == (3.0, 1.0)
    assert load.remaining(10.5)[0] == pytest.approx(2.5)
    assert load.remaining(11.0)[0] == pytest.approx(2.0)
    assert load.remaining(9.0) == (3.0, 1.0)


def test_a_late_head_looks_worse_by_the_second_up_to_a_bound() -> None:
    load = Load(queued_requests=1, queued_tokens=100, queued_s=1.0, head_sent_s=10.0, head_work_s=1.0)
    waits = [load.remaining(at)[0] for at in (11.0, 13.0, 21.0, 1e6)]
    assert waits == [0.0, 2.0, 10.0, 60.0]


def test_a_first_token_starts_the_clock_of_the_next_in_line() -> None:
    books = Books()
    writer = books.writers[0]
    first = writer.dispatch(0, 100, 100, 2.0, 0.0)
    writer.dispatch(0, 100, 100, 4.0, 0.5)
    assert books.reader.load(0).remaining(1.0)[0] == pytest.approx(5.0)
    writer.first_token(first, 3.0)
    assert books.reader.load(0).remaining(4.0)[0] == pytest.approx(3.0)


def test_requests_that_overtake_leave_the_head_right() -> None:
    books = Books()
    writer = books.writers[0]
    first, second, third = (writer.dispatch(0, 100, 100, work, work) for work in (1.0, 2.0, 4.0))
    writer.finish(second)
    assert books.reader.load(0).head_work_s == 1.0
    writer.first_token(first, 5.0)
    assert books.reader.load(0).head_work_s == 4.0
    writer.finish(third)
    assert books.reader.load(0).head_work_s == 0.0


def test_a_remote_row_is_replaced_whole_and_dated_by_what_changed() -> None:
    books = Books()
    writer = books.writers[1]
    writer.set_remote(2, LoadRow(inflight=3, decodes=1, queued_prefill_tokens=200, queued_prefill_s=2.0), 100.0)
    load = books.reader.load(2)
    assert (load.queued_requests, load.head_work_s, load.head_sent_s) == (2, 1.0, 100.0)
    assert load.remaining(100.5)[0] == pytest.approx(1.5)
    writer.set_remote(2, LoadRow(inflight=3, decodes=2, queued_prefill_tokens=100, queued_prefill_s=1.0), 101.0)
    assert books.reader.load(2).remaining(101.25)[0] == pytest.approx(0.75)
    writer.set_remote(2, LoadRow(), 102.0)
    assert books.reader.row(2) == LoadRow()


def test_the_row_that_travels_says_what_the_accounts_hold() -> None:
    books = Books()
    entry = books.writers[0].dispatch(1, 100, 150, 0.5, 1.0)
    books.writers[0].dispatch(1, 50, 60, 0.25, 1.0)
    books.writers[0].first_token(entry, 2.0)
    books.writers[0].tokens(entry, 5)
    books.writers[1].set_circuit(1, 2, 9.0)
    assert books.reader.row(1) == LoadRow(
        inflight=2,
        decodes=1,
        queued_prefill_tokens=50,
        queued_prefill_s=0.25,
        kv_tokens=155,
        stored_tokens=155,
        failures=2,
    )
    assert books.reader.load(1).circuit_until_s == 9.0


@given(st.floats(0, 1e6, allow_nan=False))
def test_quantised_seconds_are_near_and_exact_to_add(seconds: float) -> None:
    assert abs(quantise_s(seconds) - seconds) <= 2**-20
    assert (quantise_s(seconds) * 2**20).is_integer()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 63), max_size=40), max_size=20), st.integers(1, 40))
def test_a_reader_learns_of_every_change_or_that_it_missed_some(bursts: list[list[int]], limit: int) -> None:
    region = memoryview(bytearray(dirty_log.region_bytes(16)))
    log, reader = DirtyLog(region), DirtyReader(region)
    unseen: list[int] = []
    for burst in bursts:
        for slot in burst:
            log.mark(slot)
        unseen += burst
        assert reader.pending is bool(unseen)
        taken = reader.take(limit)
        assert (taken is None) is (len(unseen) > 8), "half of the log is kept as distance from the writer"
        if taken is None:
            unseen = []
        else:
            assert list(taken) == unseen[:limit]
            unseen = unseen[limit:]


def test_a_log_begun_anew_asks_for_a_rescan() -> None:
    region = memoryview(bytearray(dirty_log.region_bytes(16)))
    log, reader = DirtyLog(region), DirtyReader(region)
    for slot in range(5):
        log.mark(slot)
    reader.take(100)
    region[:] = bytes(len(region))
    DirtyLog(region).mark(1)
    assert reader.take(100) is None
    assert reader.take(100) == ()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 65535), st.lists(st.integers(0, 2**64 - 1), max_size=9)), max_size=60),
    st.integers(1, 30),
)
def test_sent_prefixes_arrive_in_order_while_the_reader_keeps_up(
    records: list[tuple[int, list[int]]], every: int
) -> None:
    region = memoryview(bytearray(sent_prefixes.region_bytes(512)))
    ring, reader = SentPrefixes(region), SentPrefixReader(region)
    got = []
    for number, (slot, hashes) in enumerate(records, start=1):
        ring.append(slot, hashes)
        if number % every == 0:
            got += reader.drain()
    got += reader.drain()
    assert got == records


def test_a_reader_that_lags_loses_the_oldest_and_finds_its_way_again() -> None:
    region = memoryview(bytearray(sent_prefixes.region_bytes(512)))
    ring, reader = SentPrefixes(region), SentPrefixReader(region)
    for slot in range(300):
        ring.append(slot, [slot] * 5)
    assert reader.drain() == []
    ring.append(7, [1, 2, 3])
    assert reader.drain() == [(7, [1, 2, 3])]


def test_a_drain_takes_no_more_than_asked_and_a_record_no_more_than_its_bound() -> None:
    region = memoryview(bytearray(sent_prefixes.region_bytes()))
    ring, reader = SentPrefixes(region), SentPrefixReader(region)
    ring.append(1, list(range(500)))
    ring.append(2, [5])
    assert [(slot, len(hashes)) for slot, hashes in reader.drain(1)] == [(1, sent_prefixes.MAX_HASHES)]
    assert reader.drain(1) == [(2, [5])]
