"""The ideal hit ratio against a cache written out in the simplest way."""

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from twofold.replay.cache import CacheLog, prefix_hashes

BLOCK = 4
Event = tuple[list[int], bool]

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=30)
events = st.lists(st.tuples(prompts, st.booleans()), max_size=30)


def brute_force(history: list[Event], capacity: int | None) -> tuple[int, int]:
    """(prompt tokens, hit tokens) of a cache of prefixes given as tuples; None is without bound."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    asked = hit = 0
    for ids, is_prompt in history:
        prefixes = [tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)]
        if is_prompt:
            depth = 0
            while depth < len(prefixes) and prefixes[depth] in cache:
                depth += 1
            hit += min(depth, (len(ids) - 1) // BLOCK) * BLOCK
            asked += len(ids)
        for prefix in reversed(prefixes):
            cache[prefix] = None
            cache.move_to_end(prefix)
        while capacity is not None and len(cache) > capacity:
            cache.popitem(last=False)
    return asked, hit


def log_of(history: list[Event]) -> CacheLog:
    log = CacheLog(BLOCK)
    for ids, is_prompt in history:
        if is_prompt:
            log.sent(log.hashes(ids), len(ids))
        else:
            log.answered(log.hashes(ids))
    return log


@given(events)
def test_the_endless_cache_is_that_of_brute_force(history: list[Event]) -> None:
    figures = log_of(history).endless()
    assert (figures.prompt_tokens, figures.hit_tokens) == brute_force(history, None)


@given(events, st.integers(1, 12))
def test_the_bounded_cache_is_that_of_brute_force(history: list[Event], blocks: int) -> None:
    figures = log_of(history).lru(blocks * BLOCK)
    assert (figures.prompt_tokens, figures.hit_tokens) == brute_force(history, blocks)


@given(prompts, prompts)
def test_hashes_are_equal_exactly_for_equal_prefixes(first: list[int], second: list[int]) -> None:
    mine, other = prefix_hashes(first, BLOCK).tolist(), prefix_hashes(second, BLOCK).tolist()
    for index, (a, b) in enumerate(zip(mine, other, strict=False)):
        end = (index + 1) * BLOCK
        assert (a == b) == (first[:end] == second[:end])


def test_swapped_blocks_are_another_prefix() -> None:
    a, b = [1, 2, 3, 4], [5, 6, 7, 8]
    assert prefix_hashes(a + b, BLOCK)[1] != prefix_hashes(b + a, BLOCK)[1]


def test_output_that_nobody_asks_for_again_takes_room() -> None:
    log = CacheLog(BLOCK)
    for _ in range(2):
        log.sent(log.hashes([1] * 9), 9)
        log.answered_unseen(40)
    assert log.endless().hit_tokens == 8
    assert log.lru(10 * BLOCK).hit_tokens == 0


def test_a_full_log_says_so() -> None:
    log = CacheLog(BLOCK, max_blocks=3)
    log.sent(log.hashes([1] * 8), 8)
    log.sent(log.hashes([1] * 8), 8)
    figures = log.endless()
    assert (figures.prompt_tokens, figures.complete) == (8, False)


def test_an_empty_log_has_no_ratio() -> None:
    assert CacheLog(BLOCK).endless().hit_ratio is None
