"""Block hashes: equal to those that a real vLLM published, and to its definition for arbitrary prompts."""

import hashlib
import json
import pickle
from array import array
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.model.block_hash import (
    DEFAULT_SEED,
    BlockHasher,
    UnsupportedAlgorithm,
    cbor_encode,
    event_hash,
    extra_keys,
    is_supported,
)
from twofold.model.fleet import HashAlgorithm

RECORDINGS = Path(__file__).parents[1] / "kvevents" / "recordings"
BLOCK_TOKENS = 128
ALGORITHMS = {
    "default": HashAlgorithm.SHA256,
    "evict_topic_smallbuffer": HashAlgorithm.SHA256,
    "sha256_cbor_dev": HashAlgorithm.SHA256_CBOR,
}
ids_lists = st.lists(st.integers(0, (1 << 32) - 1), max_size=70)


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDINGS / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_recorded_hash_is_recomputed(name: str) -> None:
    recording = recorded(name)
    hasher = BlockHasher(BLOCK_TOKENS, ALGORITHMS[name])
    known: dict[int, int] = {}
    for step in recording["steps"]:
        body = step["request"]["body"]
        prompts = body.get("prompt") or []
        for index, prompt in enumerate(prompts if prompts and isinstance(prompts[0], list) else [prompts]):
            ids = prompt + (step["output"][index] if step["output"] else [])
            chain = hasher.chain(ids, cache_salt=body.get("cache_salt") or "")
            known |= dict(zip(chain, [0, *chain], strict=False))
    stored = removed = 0
    for message in recording["messages"]:
        for event in message["decoded"][1]:
            if event["type"] == "BlockStored":
                parents = [event["parent_block_hash"] or 0, *event["block_hashes"]]
                for block_hash, parent in zip(event["block_hashes"], parents, strict=False):
                    assert known[block_hash] == parent
                    stored += 1
            elif event["type"] == "BlockRemoved":
                assert set(event["block_hashes"]) <= set(known)
                removed += len(event["block_hashes"])
    assert stored >= 10
    assert bool(removed) == (name == "evict_topic_smallbuffer")


@pytest.mark.parametrize("algorithm", [HashAlgorithm.SHA256, HashAlgorithm.SHA256_CBOR])
@given(
    ids=ids_lists,
    size=st.integers(1, 20),
    salt=st.text(max_size=8),
    adapter=st.none() | st.tuples(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8)),
    seed=st.sampled_from(["", "0", "17"]),
)
def test_chain_is_the_definition(
    algorithm: HashAlgorithm, ids: list[int], size: int, salt: str, adapter: tuple[str, str] | None, seed: str
) -> None:
    def digest(value: object) -> bytes:
        packed = (
            pickle.dumps(value, protocol=5) if algorithm is HashAlgorithm.SHA256 else cbor2.dumps(value, canonical=True)
        )
        return hashlib.sha256(packed).digest()

    parent, expected = digest(seed or DEFAULT_SEED), []
    for start in range(0, len(ids) - size + 1, size):
        keys: list[tuple[str, ...]] = [("lora", *adapter)] if adapter else []
        if salt and not start:
            keys.append(("cache_salt", salt))
        parent = digest((parent, tuple(ids[start : start + size]), tuple(keys) or None))
        expected.append(event_hash(parent))
    hasher = BlockHasher(size, algorithm, seed)
    assert hasher.chain(ids, cache_salt=salt, adapter=adapter) == expected
    assert hasher.chain(array("I", ids), cache_salt=salt, adapter=adapter) == expected


@given(ids=ids_lists, size=st.integers(1, 12), cut=st.integers(0, 70))
def test_a_chain_can_go_on(ids: list[int], size: int, cut: int) -> None:
    hasher = BlockHasher(size)
    every, first = extra_keys("salt", ("a", "/a"))
    whole = len(ids) // size
    middle = min(cut, whole)
    hashes: list[int] = []
    parent = hasher.extend(hashes, hasher.root, ids, 0, middle, every=every, first=first)
    hasher.extend(hashes, parent, ids, middle, whole, every=every, first=first)
    assert hashes == hasher.chain(ids, cache_salt="salt", adapter=("a", "/a"))


hashed_values = st.recursive(
    st.none() | st.integers(-(1 << 31), (1 << 64) - 1) | st.text(max_size=30) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=30).map(tuple),
)


@given(hashed_values)
def test_cbor_is_canonical(value: object) -> None:
    assert cbor_encode(value) == cbor2.dumps(value, canonical=True)


def test_other_values_have_no_place_in_a_hash() -> None:
    with pytest.raises(TypeError):
        cbor_encode(1.5)


def test_randomly_seeded_algorithms_are_refused() -> None:
    for algorithm in HashAlgorithm:
        if is_supported(algorithm):
            BlockHasher(16, algorithm)
        else:
            with pytest.raises(UnsupportedAlgorithm):
                BlockHasher(16, algorithm)
    assert not is_supported(HashAlgorithm.XXHASH)
    with pytest.raises(ValueError):
        BlockHasher(0)
