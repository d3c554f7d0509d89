"""Ring keys past hot prefixes, by bounded counts that fade."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing.popularity import Popularity

UNIQUE = 99


def key_of(counts: Popularity, chain: tuple[int, ...], now_s: float = 0.0, targets: int = 10) -> tuple[int, int]:
    return counts.ring_key(chain, targets, 1.0, 3.0, now_s, UNIQUE)


def serve(counts: Popularity, chain: tuple[int, ...], now_s: float = 0.0, targets: int = 10) -> tuple[int, int]:
    key, depth = key_of(counts, chain, now_s, targets)
    counts.count(chain, depth, now_s)
    return key, depth


def test_without_a_chunk_the_key_is_the_requests_own() -> None:
    assert key_of(Popularity(120.0, 0.0), ()) == (UNIQUE, 0)


def test_a_new_prefix_is_its_own_key() -> None:
    assert key_of(Popularity(120.0, 0.0), (5, 6)) == (5, 1)


def test_the_key_moves_past_a_system_prompt_that_all_share() -> None:
    counts = Popularity(120.0, 0.0)
    for session in range(200):
        serve(counts, (1, 2, 1000 + session, 5000 + session), session * 0.1)
    for session in range(200, 230):
        assert key_of(counts, (1, 2, 1000 + session, 5000 + session), 20.0) == (1000 + session, 3)


def test_a_session_keeps_its_key_while_it_grows() -> None:
    counts = Popularity(120.0, 0.0)
    for other in range(300):
        serve(counts, (1, 10_000 + other), 1.0)
    chain: tuple[int, ...] = (1, 7)
    keys = set()
    for turn in range(20):
        chain += (100 + turn,)
        keys.add(serve(counts, chain, 1.0)[0])
    assert keys == {7}


def test_a_chain_that_is_hot_to_its_end_gets_the_requests_own_key() -> None:
    counts = Popularity(120.0, 0.0)
    for _ in range(50):
        serve(counts, (1, 2))
    assert key_of(counts, (1, 2)) == (UNIQUE, 0)


def test_a_single_target_needs_no_spreading() -> None:
    counts = Popularity(120.0, 0.0)
    for _ in range(50):
        serve(counts, (1, 2), targets=1)
    assert key_of(counts, (1, 2), targets=1) == (1, 1)


def test_old_heat_fades_with_the_half_life() -> None:
    counts = Popularity(10.0, 0.0)
    for _ in range(64):
        serve(counts, (1, 2, 3))
    assert key_of(counts, (1, 2, 3), 0.0)[1] != 1
    # 64 requests are worth fewer than the 3 of min_count after five half lives.
    assert key_of(counts, (1, 2, 3), 44.0)[1] != 1
    assert key_of(counts, (1, 2, 3), 51.0) == (1, 1)


def test_a_share_is_a_share_of_recent_requests() -> None:
    counts = Popularity(10.0, 0.0)
    for session in range(100):
        serve(counts, (1, 1000 + session), 0.0, targets=2)
    for session in range(50):
        serve(counts, (2, 5000 + session), 50.0, targets=2)
    # 50 of 150 would be less than half; of what 50 s leave of the first 100 it is nearly all.
    assert key_of(counts, (2, 9), 50.0, targets=2) == (9, 2)


def test_counts_survive_any_length_of_time() -> None:
    counts = Popularity(1.0, 0.0)
    for now_s in (0.0, 600.0, 1300.0, 1e6, 1e9):
        for _ in range(40):
            serve(counts, (1, 2), now_s)
        assert key_of(counts, (1, 2), now_s)[1] != 1


def test_a_key_asked_for_changes_nothing() -> None:
    counts = Popularity(120.0, 0.0)
    for _ in range(100):
        key_of(counts, (1, 2, 3))
    assert len(counts) == 0


def test_a_flood_of_new_prefixes_is_bounded_and_does_not_wash_out_what_is_hot() -> None:
    counts = Popularity(1e6, 0.0, entries=200)
    rng = random.Random(5)
    for _ in range(5000):
        serve(counts, (1, rng.getrandbits(64)))
        assert len(counts) <= 200
    assert key_of(counts, (1, 2))[1] == 2


def test_where_the_walk_begins_changes_no_key() -> None:
    """Prompts with long and with short shared prefixes in turn, against counts that always walk from the beginning."""
    rng = random.Random(2)
    long, short = tuple(range(1000, 1064)), tuple(range(2000, 2003))
    counts, plain = Popularity(120.0, 0.0), Popularity(120.0, 0.0)
    depths = set()
    for number in range(1500):
        start = rng.choice((long, short, long[:20], ()))
        chain = start + tuple(rng.getrandbits(64) for _ in range(rng.randrange(1, 30)))
        plain._begin = 0
        key, depth = serve(counts, chain, number * 0.1, targets=300)
        assert serve(plain, chain, number * 0.1, targets=300) == (key, depth)
        depths.add(depth)
    assert {1, 4, 22, 72} <= depths


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 20), max_size=40), st.floats(0, 1e5)), max_size=60),
    st.integers(1, 30),
    st.integers(0, 50),
)
def test_any_traffic_gives_a_key_of_the_chain_or_the_unique_one(
    traffic: list[tuple[list[int], float]], entries: int, targets: int
) -> None:
    counts = Popularity(30.0, 0.0, entries=entries)
    for values, now_s in traffic:
        key, depth = serve(counts, tuple(values), now_s, targets)
        assert (key, depth) == ((values[depth - 1], depth) if depth else (UNIQUE, 0))
        assert len(counts) <= max(entries, 2)
