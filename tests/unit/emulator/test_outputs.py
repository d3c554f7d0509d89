"""Output sources and log probabilities: functions of the ids so far, so that a continuation goes on with them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.logprobs import RANKED, LogprobChain, prompt_logprobs
from emulator.outputs import PlannedOutput, RestrictedChain
from emulator.tokens import EOS_ID, FIRST_OUTPUT_ID, OUTPUT_WORDS, ChainChecker, TokenChain, decode, encode

IDS = st.lists(st.integers(0, EOS_ID), min_size=1, max_size=30)


@given(IDS, st.integers(0, 5), st.integers(0, 5))
def test_each_choice_has_a_chain_of_its_own(prompt: list[int], first: int, second: int) -> None:
    chains = [TokenChain(prompt, choice) for choice in (first, second)]
    ids = [[chain.next() for _ in range(6)] for chain in chains]
    assert (ids[0] == ids[1]) == (first == second)
    checker = ChainChecker(prompt, choice=first)
    checker.feed_ids(ids[0])
    checker.finish(6)
    other = ChainChecker(prompt, choice=second)
    other.feed(decode(ids[0]))
    assert (other.verified == 6) == (first == second)


def test_a_plan_is_followed_by_its_end() -> None:
    plan = PlannedOutput([5, 6], [9])
    assert [(plan.ends_here(), plan.next()) for _ in range(4)] == [
        (False, 5),
        (False, 6),
        (True, EOS_ID),
        (False, TokenChain([9, 5, 6, EOS_ID]).peek()),
    ]


@given(IDS, st.sets(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 9))
def test_a_restricted_chain_stays_inside_and_can_be_resumed(prompt: list[int], allowed: set[int], cut: int) -> None:
    chain = RestrictedChain(prompt, allowed=allowed)
    ids = [chain.next() for _ in range(10)]
    assert set(ids) <= allowed
    assert not chain.ends_here()
    rest = RestrictedChain(prompt + ids[:cut], allowed=allowed)
    assert [rest.next() for _ in range(10 - cut)] == ids[cut:]


@given(IDS, st.integers(0, 12))
def test_bad_words_never_come_not_even_across_tokens_or_a_cut(prompt: list[int], cut: int) -> None:
    words = (b"a", b"e x", b"qu")
    chain = RestrictedChain(prompt, bad_words=words)
    ids = [chain.next() for _ in range(12)]
    text = decode(ids).encode()
    assert not any(word in text for word in words)
    rest = RestrictedChain(prompt + ids[:cut], bad_words=words)
    assert [rest.next() for _ in range(12 - cut)] == ids[cut:]


def test_banned_ids_are_skipped_and_nothing_left_means_the_chain() -> None:
    prompt = [1, 2, 3]
    plain = TokenChain(prompt).peek()
    assert RestrictedChain(prompt).next() == plain
    assert RestrictedChain(prompt, banned=[plain]).next() != plain
    assert RestrictedChain(prompt, allowed=[7], banned=[7]).next() == plain
    assert RestrictedChain(prompt, banned=[EOS_ID]).ends_here() is False


@given(IDS, st.lists(st.integers(0, EOS_ID), min_size=1, max_size=8), st.integers(0, RANKED), st.booleans())
def test_entries_are_a_distribution(prompt: list[int], tokens: list[int], best: int, sampled_best: bool) -> None:
    chain = LogprobChain(prompt)
    for token in tokens:
        entries = chain.step(token, best, sampled_best=sampled_best)
        assert entries[0].token_id == token
        assert len({entry.token_id for entry in entries}) == len(entries)
        assert best <= len(entries) <= best + 1 or (best == 0 and len(entries) == 1)
        assert sum(math.exp(entry.logprob) for entry in entries) < 1.0
        if sampled_best:
            assert entries[0].rank == 1
        by_rank = sorted(entries, key=lambda entry: entry.rank)
        assert [entry.logprob for entry in by_rank] == sorted((entry.logprob for entry in entries), reverse=True)


@given(IDS, st.integers(1, 11))
def test_the_output_of_a_chain_is_the_best_and_a_resumed_one_says_the_same(prompt: list[int], cut: int) -> None:
    chain = TokenChain(prompt)
    ids = [chain.next() for _ in range(12)]
    walk = LogprobChain(prompt)
    seen = [walk.step(token, 3, sampled_best=True) for token in ids]
    rest = LogprobChain(prompt + ids[:cut])
    assert [rest.step(token, 3, sampled_best=True) for token in ids[cut:]] == seen[cut:]
    as_prompt = prompt_logprobs(prompt + ids, 3)
    assert as_prompt[0] is None
    assert as_prompt[len(prompt) :] == seen, "a generated token has the same value when it comes back as a prompt"


def test_prompt_tokens_have_low_ranks() -> None:
    found = prompt_logprobs(encode("import os, sys"), 2)
    assert found[0] is None
    for entries in found[1:]:
        assert entries is not None
        assert entries[0].rank > 1
        assert [entry.rank for entry in entries[1:]] == [1, 2]
        assert all(FIRST_OUTPUT_ID <= entry.token_id < FIRST_OUTPUT_ID + OUTPUT_WORDS for entry in entries[1:])


def test_an_id_outside_the_vocabulary_has_no_bytes() -> None:
    with pytest.raises(IndexError):
        RestrictedChain([1], allowed=[EOS_ID + 1]).next()
