"""The index of cached blocks against a dictionary, whatever engines do, with holes, clears and full tables."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.kvevents.index_writer import Changes, KvIndexWriter, memory_bytes
from router.kvevents.table import KeyTable
from router.routing.kv_index import (
    KvIndexError,
    KvIndexReader,
    ViewState,
    buckets_for,
    capacity_blocks,
    index_bytes,
)

SLOTS = 4


def make(blocks: int = 200, slots: int = SLOTS) -> tuple[KvIndexWriter, KvIndexReader]:
    buckets = buckets_for(blocks)
    region = memoryview(bytearray(index_bytes(slots, buckets)))
    writer = KvIndexWriter(region, slots, buckets, nonce=7)
    for slot in range(slots):
        writer.set_view(slot, ViewState.EXACT, 16)
    return writer, KvIndexReader(region)


def block(number: int) -> int:
    return random.Random(number).getrandbits(64) or 1


TREE = {number: (number - 1) // 2 for number in range(1, 40)}
"""Block -> predecessor: a binary tree of chains that share prefixes; block 0 is a root, and so is 40."""


def chain_to(number: int) -> list[int]:
    path = [number]
    while path[-1] in TREE:
        path.append(TREE[path[-1]])
    return path[::-1]


operations = st.lists(
    st.tuples(
        st.integers(0, SLOTS - 1),
        st.sampled_from(["store", "store", "store", "remove", "clear", "apply", "apply"]),
        st.integers(0, 40),
        st.integers(1, 6),
    ),
    max_size=80,
)


class Model:
    """The same index as plain dictionaries."""

    def __init__(self) -> None:
        self.copies: list[Counter[int]] = [Counter() for _ in range(SLOTS)]
        self.last: dict[int, int] = {}

    def store(self, slot: int, numbers: list[int]) -> None:
        self.copies[slot].update(numbers)
        for number in numbers:
            self.last[number] = slot

    def remove(self, slot: int, number: int) -> None:
        if self.copies[slot][number] > 0:
            self.copies[slot][number] -= 1
        if not self.copies[slot][number]:
            del self.copies[slot][number]

    def leading(self, slot: int, chain: list[int]) -> int:
        for depth, number in enumerate(chain):
            if not self.copies[slot][number]:
                return depth
        return len(chain)


@settings(max_examples=250, deadline=None)
@given(operations)
def test_index_is_a_dictionary(ops: list[tuple[int, str, int, int]]) -> None:
    writer, reader = make()
    model, changes = Model(), Changes()
    for slot, kind, number, length in ops:
        if kind == "store":
            run = chain_to(number)[-length:]
            parent = TREE.get(run[0])
            changes.stored(slot, [block(n) for n in run], None if parent is None else block(parent))
            model.store(slot, run)
        elif kind == "remove":
            changes.removed(slot, [block(number)])
            model.remove(slot, number)
        else:
            writer.apply(changes.batch())
            changes = Changes()
            if kind == "clear":
                assert writer.clear(slot) == len(model.copies[slot])
                model.copies[slot].clear()
            check(writer, reader, model)
    writer.apply(changes.batch())
    check(writer, reader, model)


def check(writer: KvIndexWriter, reader: KvIndexReader, model: Model) -> None:
    holes = 0
    for slot in range(SLOTS):
        held = {number: count for number, count in model.copies[slot].items() if count}
        assert writer.blocks_of(slot) == {block(number): count for number, count in held.items()}
        holes += sum(number in TREE and TREE[number] not in held for number in held)
        for number in range(41):
            chain = chain_to(number)
            assert reader.leading_blocks(slot, [block(n) for n in chain]) == model.leading(slot, chain)
    assert writer.holes == holes
    assert writer.blocks == sum(len(+held) for held in model.copies)
    anywhere = {number for held in model.copies for number in +held}
    assert writer.distinct_blocks == len(anywhere)
    for number in range(41):
        storer = reader.storer_of(block(number))
        if number not in anywhere:
            assert storer is None
        else:
            assert storer is not None
            assert model.copies[storer][number], "a storer that dropped the block is replaced by one that holds it"
            if model.copies[model.last[number]][number] and not holes:
                assert storer == model.last[number] or not_last_any_more(model, number, storer)


def not_last_any_more(model: Model, number: int, storer: int) -> bool:
    """The last storer may have dropped the block and stored nothing since; then any holder is as good."""
    return model.copies[storer][number] > 0


def test_last_storer_of_the_deepest_block() -> None:
    writer, reader = make()
    changes = Changes()
    chain = [block(n) for n in range(100, 110)]
    changes.stored(0, chain[:4], None)
    changes.stored(1, chain[:7], None)
    changes.stored(2, chain[:7], None)
    changes.stored(1, chain[6:7], chain[5])
    writer.apply(changes.batch())
    assert reader.last_storer(chain) == (1, 7), "the second copy of block 7 came last"
    assert reader.last_storer(chain[:4]) == (2, 4)
    assert reader.last_storer([block(1)]) is None
    assert reader.last_storer([]) is None
    changes = Changes()
    changes.removed(1, [chain[6], chain[6]])
    writer.apply(changes.batch())
    assert reader.last_storer(chain) == (2, 7), "another holder takes the place of one that dropped the block"
    writer.clear(2)
    assert reader.last_storer(chain) == (1, 6)


def test_no_view_no_answer() -> None:
    writer, reader = make()
    changes = Changes()
    changes.stored(0, [block(1)], None)
    writer.apply(changes.batch())
    assert reader.leading_blocks(0, [block(1)]) == 1
    assert reader.view(0) == (ViewState.EXACT, 16)
    writer.set_view(0, ViewState.NONE)
    assert reader.leading_blocks(0, [block(1)]) == -1
    assert reader.leading_blocks(SLOTS + 1, [block(1)]) == -1
    assert reader.view(SLOTS + 1) == (ViewState.NONE, 0)
    writer.set_view(0, ViewState.PARTIAL, 32)
    assert reader.view(0) == (ViewState.PARTIAL, 32)
    assert writer.view(0) == (ViewState.PARTIAL, 32)
    assert reader.leading_blocks(0, []) == 0
    assert not reader.superseded
    writer.supersede()
    assert reader.superseded


def test_a_full_index_says_whose_view_is_wrong() -> None:
    writer, _ = make(blocks=6, slots=2)
    changes = Changes()
    changes.stored(0, [block(n) for n in range(1000, 1100)], None)
    writer.apply(changes.batch())
    assert writer.take_overflowed() == {0}
    assert writer.take_overflowed() == set()
    assert writer.clear(0) == min(100, writer.buckets * 8)
    assert writer.blocks == writer.distinct_blocks == 0


def test_a_tables_worth_of_blocks_fits() -> None:
    """Filled to the capacity that it is meant for, nothing overflows; 1,000 turn-overs later neither."""
    writer, reader = make(blocks=20_000, slots=1)
    random.seed(3)
    alive: list[int] = []
    for _ in range(60):
        changes = Changes()
        fresh = [random.getrandbits(64) for _ in range(1000)]
        for value in fresh:
            changes.stored(0, [value], None)
        alive += fresh
        while len(alive) > writer.capacity:
            changes.removed(0, alive[:500])
            del alive[:500]
        writer.apply(changes.batch())
    assert not writer.take_overflowed()
    assert writer.blocks == len(alive)
    assert writer.capacity >= 20_000
    assert all(reader.leading_blocks(0, [value]) == 1 for value in alive)


def test_export_moves_everything() -> None:
    small, _ = make(blocks=50)
    changes = Changes()
    chain = [block(n) for n in range(20)]
    changes.stored(1, chain, None)
    changes.stored(1, chain[9:10], chain[8])
    changes.stored(3, chain[5:8], chain[4])
    small.apply(changes.batch())
    large, reader = make(blocks=5000)
    large.apply(small.export())
    for slot in range(SLOTS):
        assert large.blocks_of(slot) == small.blocks_of(slot)
    assert large.holes == small.holes == 1
    assert reader.leading_blocks(1, chain) == 20
    assert reader.leading_blocks(3, chain) == 0


def test_unknown_removals_are_counted_and_harmless() -> None:
    writer, _ = make()
    changes = Changes()
    changes.removed(0, [block(1)])
    changes.stored(0, [block(1)], None)
    changes.removed(0, [block(2)])
    writer.apply(changes.batch())
    assert writer.unknown_removals == 2
    assert writer.blocks_of(0) == {block(1): 1}


def test_layout_is_checked() -> None:
    with pytest.raises(KvIndexError):
        KvIndexReader(memoryview(bytes(10)))
    with pytest.raises(KvIndexError):
        KvIndexReader(memoryview(bytes(8192)))
    with pytest.raises(ValueError):
        KvIndexWriter(memoryview(bytearray(100)), 1, 1)
    with pytest.raises(ValueError):
        KeyTable(np.zeros(24, np.uint64))
    for blocks in (1, 5, 6, 7, 1000, 100_000):
        assert capacity_blocks(buckets_for(blocks)) >= blocks
        assert memory_bytes(10, buckets_for(blocks)) > index_bytes(10, buckets_for(blocks))
