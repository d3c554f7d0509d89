"""Prefix identity, and the table of what is probably cached where."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing.prefix import (
    DEPTH_SCHEDULE,
    MAX_CHUNKS,
    broadcast_hashes,
    chain,
    chain_seed,
    scheduled_depths,
    split_broadcast,
)
from router.routing.prefix_table import PrefixReader, PrefixWriter, region_bytes, target_salt

SALT = target_salt("w", 1)


def hashes_of(values: tuple[int, ...]) -> list[int]:
    return [values[depth - 1] for depth in scheduled_depths(len(values))]


def random_chain(rng: random.Random, length: int, start: tuple[int, ...] = ()) -> tuple[int, ...]:
    return start + tuple(rng.getrandbits(64) for _ in range(length - len(start)))


@given(st.binary(max_size=400), st.binary(max_size=100), st.integers(min_value=1, max_value=40))
def test_a_longer_prompt_continues_the_chain_of_its_prefix(prompt: bytes, more: bytes, chunk: int) -> None:
    short, long = chain(prompt, chunk, 0), chain(prompt + more, chunk, 0)
    assert len(short) == len(prompt) // chunk
    assert long[: len(short)] == short


@given(st.binary(min_size=64, max_size=200), st.integers(min_value=0, max_value=63), st.integers(1, 255))
def test_one_changed_byte_changes_all_later_chunks(prompt: bytes, at: int, flip: int) -> None:
    changed = bytearray(prompt)
    changed[at] ^= flip
    one, other = chain(prompt, 16, 0), chain(bytes(changed), 16, 0)
    first = at // 16
    assert one[:first] == other[:first]
    assert all(a != b for a, b in zip(one[first:], other[first:], strict=True))


def test_adapters_and_salts_share_no_prefix() -> None:
    seeds = {chain_seed(a, s) for a in ("", "x", "xy") for s in ("", "y", "\ud800")}
    assert len(seeds) == 9
    assert chain_seed("", "") == 0
    assert chain_seed("x", "y") != chain_seed("xy", "")


def test_the_chain_of_an_endless_prompt_is_bounded() -> None:
    assert len(chain(b"x" * (MAX_CHUNKS + 10), 1, 0)) == MAX_CHUNKS


def test_the_depth_schedule_is_dense_first_then_eight_per_octave() -> None:
    assert DEPTH_SCHEDULE[:17] == (*range(1, 17), 18)
    assert DEPTH_SCHEDULE[-1] == MAX_CHUNKS
    for octave in (16, 128, 2048):
        assert sum(octave < depth <= 2 * octave for depth in DEPTH_SCHEDULE) == 8
    assert scheduled_depths(0) == ()
    assert scheduled_depths(17) == tuple(range(1, 17))


@given(st.lists(st.integers(0, 2**64 - 1), max_size=300))
def test_a_broadcast_says_scheduled_depths_and_the_deepest(values: list[int]) -> None:
    told = broadcast_hashes(tuple(values))
    if not values:
        assert told == []
        return
    assert split_broadcast(told) == (hashes_of(tuple(values)), values[-1])


@pytest.mark.parametrize("told", [[], [1], [1] * (len(DEPTH_SCHEDULE) + 2)])
def test_what_is_no_broadcast_is_not_taken_for_one(told: list[int]) -> None:
    assert split_broadcast(told) is None


class Table:
    """One writer, one reader, capacity in tokens."""

    def __init__(self, entries: int = 1 << 12) -> None:
        self.region = memoryview(bytearray(region_bytes(entries)))
        self.writer = PrefixWriter(self.region)
        self.reader = PrefixReader(self.region)

    def send(
        self, values: tuple[int, ...], stamp: float = 0.0, salt: int = SALT, now_s: float = 1.0, young: float = 0.0
    ) -> int:
        return self.writer.insert(salt, hashes_of(values), values[-1], stamp, now_s, young)

    def held(self, values: tuple[int, ...], stored: float = 0.0, capacity: float = 100.0, salt: int = SALT) -> int:
        return self.reader.cached_chunks(salt, values, stored, capacity)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 600), st.integers(0, 2**32))
def test_what_is_found_is_shared_and_at_most_one_step_of_the_schedule_short(
    sent_length: int, asked_length: int, shared: int, seed: int
) -> None:
    shared = min(shared, sent_length, asked_length)
    rng = random.Random(seed)
    table = Table()
    sent = random_chain(rng, sent_length)
    asked = random_chain(rng, asked_length, sent[:shared])
    table.send(sent)
    held = table.held(asked)
    assert held <= shared
    scheduled = [depth for depth in DEPTH_SCHEDULE if depth <= shared]
    assert held >= (scheduled[-1] if scheduled else 0)
    if shared == sent_length:
        assert held == shared, "the next turn of a conversation is recognised to the full depth of the last"


def test_an_entry_is_stale_once_the_target_has_stored_its_capacity_since() -> None:
    table = Table()
    values = random_chain(random.Random(1), 20)
    table.send(values, stamp=1000.0)
    assert table.held(values, stored=1100.0, capacity=100.0) == 20
    assert table.held(values, stored=1101.0, capacity=100.0) == 0
    table.send(values, stamp=1101.0)
    assert table.held(values, stored=1101.0, capacity=100.0) == 20
    # A writer that began anew counts from zero: its entries must not look young for ever.
    assert table.held(values, stored=0.0, capacity=100.0) == 0


def test_entries_of_another_incarnation_or_target_are_not_taken_for_this_one() -> None:
    table = Table()
    values = random_chain(random.Random(1), 5)
    table.send(values)
    assert table.held(values) == 5
    assert table.held(values, salt=target_salt("w", 2)) == 0
    assert table.held(values, salt=target_salt("v", 1)) == 0


def test_several_processes_write_one_table() -> None:
    table = Table()
    others = [PrefixWriter(table.region) for _ in range(3)]
    values = random_chain(random.Random(1), 64)
    for writer, length in zip(others, (7, 50, 20), strict=True):
        writer.insert(SALT, hashes_of(values[:length]), values[length - 1], 0.0, 1.0)
    assert table.held(values) == 50


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=64), st.integers(1, 600), st.floats(0, 1e18))
def test_any_bytes_in_the_table_are_harmless(noise: bytes, length: int, stored: float) -> None:
    table = Table(entries=16)
    values = random_chain(random.Random(length), length)
    table.send(values)
    size = len(table.region)
    table.region[:] = (noise * size)[:size]
    assert 0 <= table.held(values, stored) <= length
    entered = table.send(values)
    table.writer.forget(SALT, hashes_of(values), entered, 1.0)


def test_a_forgotten_prompt_is_gone_unless_it_was_sent_again() -> None:
    table = Table()
    values = random_chain(random.Random(1), 12)
    entered = table.send(values, now_s=5.0)
    table.writer.forget(SALT, hashes_of(values), entered, 4.0)
    assert table.held(values) == 12
    table.writer.forget(SALT, hashes_of(values), entered, 5.0)
    assert table.held(values) == 0
    assert not any(table.region[:32])


@pytest.mark.parametrize("young", [0.0, 50.0])
def test_forgetting_leaves_what_was_there_before_and_what_was_sent_since(young: float) -> None:
    table = Table()
    rng = random.Random(1)
    first = random_chain(rng, 5)
    longer = random_chain(rng, 12, first)
    other = random_chain(rng, 9, longer[:7])
    table.send(first, stamp=1.0, now_s=1.0, young=young)
    entered = table.send(longer, stamp=2.0, now_s=2.0, young=young)
    table.send(other, stamp=3.0, now_s=3.0, young=young)
    table.writer.forget(SALT, hashes_of(longer), entered, 2.0)
    assert table.held(other, stored=3.0) == 9
    assert table.held(longer, stored=3.0) == 7, "common with what was sent since"
    alone = Table()
    alone.send(first, stamp=1.0, now_s=1.0, young=50.0)
    entered = alone.send(longer, stamp=2.0, now_s=2.0, young=50.0)
    alone.writer.forget(SALT, hashes_of(longer), entered, 2.0)
    assert alone.held(longer, stored=2.0) == 5
    # Sent again whole, nothing new was entered: what led to the failed prompt leads nowhere now.
    again = alone.send(first, stamp=2.0, now_s=4.0, young=50.0)
    assert again == 0
    alone.writer.forget(SALT, hashes_of(first), again, 4.0)
    assert alone.held(first, stored=2.0) == 5


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=40),
    st.integers(0, 2**32),
)
def test_young_entries_are_left_alone_and_nothing_is_believed_longer_or_deeper_for_it(
    sent: list[tuple[int, int, int]], seed: int
) -> None:
    """Sessions that grow, fork and come back, against a table that enters every depth every time."""
    rng = random.Random(seed)
    capacity, young = 100.0, 10.0
    lazy, thorough = Table(), Table()
    trunk = random_chain(rng, 60)
    sessions = [trunk[: 8 * number] + random_chain(rng, 60 - 8 * number) for number in range(7)]
    stored = 0.0
    for number, length, tokens in sent:
        values = sessions[number][:length]
        assert lazy.send(values, stamp=stored, now_s=stored, young=young) <= len(hashes_of(values))
        thorough.send(values, stamp=stored, now_s=stored)
        stored += tokens
        for asked in sessions:
            held = lazy.held(asked, stored, capacity)
            assert held <= thorough.held(asked, stored, capacity)
            assert held >= thorough.held(asked, stored, capacity - young)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 600), st.integers(0, 80), st.integers(0, 2**32))
def test_where_the_search_begins_changes_nothing_of_what_it_finds(
    sent_length: int, asked_length: int, shared: int, likely: int, seed: int
) -> None:
    rng = random.Random(seed)
    sent = random_chain(rng, sent_length)
    asked = random_chain(rng, asked_length, sent[: min(shared, sent_length, asked_length)])
    table = Table()
    table.send(sent)
    assert table.reader.cached_chunks(SALT, asked, 0.0, 1.0, likely) == table.held(asked, capacity=1.0)


def test_a_shorter_prompt_is_still_known_whole_after_a_longer_one_passed_it() -> None:
    table = Table()
    rng = random.Random(1)
    short = random_chain(rng, 50)
    table.send(short)
    table.send(random_chain(rng, 120, short[:49]))
    assert table.held((*short, 1)) == 50, "48 is the schedule's depth; the rest is known by its end"


def test_what_many_sessions_share_is_refreshed_more_rarely_and_dates_nothing_of_theirs() -> None:
    table = Table()
    rng = random.Random(1)
    shared = random_chain(rng, 8)
    first, second, third = (random_chain(rng, 12, shared) for _ in range(3))

    def send(values: tuple[int, ...], stamp: float) -> int:
        return table.writer.insert(SALT, hashes_of(values), values[-1], stamp, stamp, 10.0, 8, 50.0)

    assert send(first, 0.0) == 12
    assert send(second, 50.0) == 4, "the shared part is not 50 tokens old"
    assert table.held(second, stored=150.0, capacity=100.0) == 12, "its own part is as old as it is"
    assert table.held(first, stored=150.0, capacity=100.0) == 0
    assert send(third, 51.0) == 12
    assert table.held(first, stored=150.0, capacity=100.0) == 8


def test_a_prompt_sent_again_and_again_costs_one_look() -> None:
    table = Table()
    values = random_chain(random.Random(1), 512)
    assert table.send(values, stamp=1000.0, young=100.0) == len(hashes_of(values))
    assert table.send(values, stamp=1100.0, young=100.0) == 0
    assert table.send((*values, 1), stamp=1100.0, young=100.0) == 0, "no scheduled depth more"
    assert table.held((*values, 1), stored=1100.0) == 513
    assert table.send(values, stamp=1101.0, young=100.0) == len(hashes_of(values)), "not young any more"


def test_a_flood_replaces_the_oldest_and_takes_no_more_memory() -> None:
    table = Table(entries=64)
    rng = random.Random(3)
    for second in range(2000):
        table.writer.insert(SALT, [rng.getrandbits(64)], 1, 0.0, second)
    last = rng.getrandbits(64)
    table.writer.insert(SALT, [last], last, 0.0, 3000)
    assert table.held((last,)) == 1
    assert len(table.region) == region_bytes(64)


@pytest.mark.parametrize("entries", [0, 2, 3, 100])
def test_a_table_size_that_is_no_power_of_two_is_refused(entries: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        region_bytes(entries)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), max_size=12), st.integers(0, 2**64 - 1))
def test_extreme_hashes_do_no_harm(chains: list[list[int]], salt: int) -> None:
    table = Table(entries=16)
    for values in chains:
        table.send(tuple(values), salt=salt)
        assert 0 <= table.held(tuple(values), salt=salt) <= len(values)
