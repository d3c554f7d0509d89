"""What the engines of a pool must agree on."""

from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.fleet.events import ConfigChanged
from controlplane.fleet.reducer import reduce
from controlplane.fleet.state import FleetState
from twofold.model.fleet import HashAlgorithm, Health, Pool
from twofold.model.reasons import TargetCondition
from twofold.profiles import get

from .builders import FACTS, PROFILE, config, probe, run, source, spec


def three(odd: dict[str, Any]) -> FleetState:
    """Three workers, of which "c" has other facts."""
    state = run(config(), source(*(spec(name) for name in "abc")), probe("a", 1, 1.0), probe("b", 1, 1.0))
    return reduce(state, [probe("c", 1, 1.0, facts=replace(FACTS, **odd))])


@pytest.mark.parametrize(
    ("odd", "condition"),
    [
        ({"block_size_tokens": 32}, TargetCondition.BLOCK_SIZE_MISMATCH),
        ({"hash_algorithm": HashAlgorithm.XXHASH}, TargetCondition.HASH_ALGORITHM_MISMATCH),
        ({"tokenizer_digest": "bb"}, TargetCondition.TOKENIZER_MISMATCH),
        ({"max_model_len_tokens": 4096}, TargetCondition.MODEL_LENGTH_MISMATCH),
    ],
)
def test_the_odd_one_out_has_the_condition_and_still_takes_work(
    odd: dict[str, Any], condition: TargetCondition
) -> None:
    state = three(odd)
    assert state.workers["c"].conditions == (condition,)
    assert state.workers["a"].conditions == state.workers["b"].conditions == ()
    assert state.workers["c"].health is Health.HEALTHY
    agreed = state.pools["pool"]
    assert (agreed.block_size_tokens, agreed.hash_algorithm) == (16, HashAlgorithm.SHA256)
    assert (agreed.tokenizer_digest, agreed.max_model_len_tokens) == ("aa", 8192)


def test_a_declared_value_wins_over_the_majority() -> None:
    state = three({"block_size_tokens": 32})
    declared = Pool(name="pool", models=("m",), block_size_tokens=32)
    state = reduce(state, [ConfigChanged(at_s=2.0, version=2, pools=(declared,), profiles=(get(PROFILE),))])
    assert state.workers["c"].conditions == ()
    assert state.workers["a"].conditions == (TargetCondition.BLOCK_SIZE_MISMATCH,)


def test_what_an_engine_did_not_say_is_no_mismatch() -> None:
    assert three({"tokenizer_digest": "", "block_size_tokens": 0}).workers["c"].conditions == ()


def test_a_tie_leaves_the_pool_as_it_was() -> None:
    state = run(config(), source(spec("a"), spec("b")), probe("a", 1, 1.0, facts=replace(FACTS, block_size_tokens=64)))
    assert state.pools["pool"].block_size_tokens == 64
    state = reduce(state, [probe("b", 1, 1.0)])
    assert state.pools["pool"].block_size_tokens == 64
    assert state.workers["b"].conditions == (TargetCondition.BLOCK_SIZE_MISMATCH,)


def test_an_engine_without_the_pools_model_gets_no_work() -> None:
    state = three({"served_models": ("other",)})
    assert state.workers["c"].health is Health.STARTING
    assert TargetCondition.MODEL_MISSING in state.workers["c"].conditions
    state = reduce(state, [probe("c", 2, 2.0)])
    assert state.workers["c"].health is Health.HEALTHY
    state = reduce(state, [probe("c", 3, 3.0, facts=replace(FACTS, served_models=("other",)))])
    assert state.workers["c"].health is Health.SUSPECT


def test_adapters_of_all_engines_belong_to_the_pool() -> None:
    assert three({"adapters": ("lora",)}).pools["pool"].adapters == ("lora",)


def test_a_worker_that_is_gone_has_no_say() -> None:
    state = run(config(), source(spec("a"), spec("b")), probe("a", 1, 1.0))
    for sequence in (2, 3, 4):
        state = reduce(state, [probe("a", sequence, 20.0 * sequence, ok=False)])
    assert state.workers["a"].health is Health.GONE
    state = reduce(state, [probe("b", 1, 90.0, facts=replace(FACTS, block_size_tokens=32))])
    assert state.pools["pool"].block_size_tokens == 32
    assert state.workers["b"].conditions == ()
