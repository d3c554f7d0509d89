"""The stream of one engine put in order: duplicates, losses, short buffers, restarts, engines that lie."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.kvevents import wire
from router.kvevents.feed import MAX_GARBAGE, MAX_PENDING_BATCHES, Feed, FeedState

SIZE = 4


class View:
    """What a feed makes of a target's cache."""

    def __init__(self, right: bool | None = True) -> None:
        self.copies: Counter[int] = Counter()
        self.clears = 0
        self.right = right
        self.asked = 0

    def stored(self, hashes: list[int], parent: int | None) -> None:
        self.copies.update(hashes)

    def removed(self, hashes: list[int]) -> None:
        for value in hashes:
            if self.copies[value]:
                self.copies[value] -= 1

    def cleared(self) -> None:
        self.copies.clear()
        self.clears += 1

    def verify(self, event: wire.BlockStored) -> bool | None:
        self.asked += 1
        return self.right


def stored(*hashes: int, parent: int | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": [1] * SIZE * len(hashes),
        "block_size": SIZE,
        "medium": "GPU",
        **fields,
    }


def removed(value: int, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": [value], "medium": "GPU", "group_idx": 0, **fields}


def payload(ts: float, *events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([ts, list(events), 0])


class Engine:
    """A publisher with a replay buffer, in memory."""

    def __init__(self, buffer_steps: int = 10_000, start_ts: float = 1000.0) -> None:
        self.buffer_steps = buffer_steps
        self.ts = start_ts
        self.log: list[bytes] = []
        self.truth: Counter[int] = Counter()

    def restart(self) -> None:
        self.log = []
        self.truth.clear()
        self.ts += 10

    def publish(self, *events: dict[str, Any]) -> tuple[int, bytes]:
        self.ts += 1
        for event in events:
            if event["type"] == "BlockStored":
                self.truth.update(event["block_hashes"])
            elif event["type"] == "BlockRemoved":
                self.truth[event["block_hashes"][0]] -= 1
            else:
                self.truth.clear()
        self.log.append(payload(self.ts, *events))
        return len(self.log) - 1, self.log[-1]

    def replay(self, feed: Feed, *, lose: Callable[[], bool] = lambda: False) -> None:
        start = feed.wants_replay_from
        assert start is not None
        feed.replay_asked()
        first = max(start, len(self.log) - self.buffer_steps)
        for sequence in range(first, len(self.log)):
            if not lose():
                feed.take(sequence, self.log[sequence], replayed=True)
        feed.replay_ended()

    def settle(self, feed: Feed) -> None:
        for _ in range(50):
            if feed.wants_replay_from is None:
                return
            self.replay(feed)
        raise AssertionError("the feed asks for ever")


def connected(buffer_steps: int = 10_000) -> tuple[Engine, View, Feed]:
    engine, view = Engine(buffer_steps), View()
    feed = Feed(view, SIZE, can_replay=True)
    engine.settle(feed)
    return engine, view, feed


def test_a_fresh_engine_is_known_exactly() -> None:
    engine, view, feed = connected()
    assert feed.state is FeedState.EXACT
    feed.take(*engine.publish(stored(1, 2)))
    feed.take(*engine.publish(removed(2), stored(2, parent=1)))
    assert +view.copies == +engine.truth == {1: 1, 2: 1}
    assert (feed.counters.batches, feed.counters.blocks, feed.counters.gaps) == (2, 4, 0)


def test_a_late_subscriber_gets_what_the_buffer_holds() -> None:
    engine, view = Engine(), View()
    for number in range(1, 9):
        engine.publish(stored(number))
    feed = Feed(view, SIZE, can_replay=True)
    assert feed.state is FeedState.CONNECTING
    feed.take(*engine.publish(stored(9)))
    engine.settle(feed)
    assert feed.state is FeedState.EXACT
    assert view.copies == engine.truth


def test_a_short_buffer_leaves_a_partial_view_until_the_cache_is_reset() -> None:
    engine, view = Engine(buffer_steps=3), View()
    for number in range(1, 9):
        engine.publish(stored(number))
    feed = Feed(view, SIZE, can_replay=True)
    engine.settle(feed)
    assert feed.state is FeedState.PARTIAL
    assert +view.copies == {6: 1, 7: 1, 8: 1}
    feed.take(*engine.publish({"type": "AllBlocksCleared"}, stored(20)))
    assert feed.state is FeedState.EXACT
    assert +view.copies == {20: 1}


def test_a_gap_is_healed_by_replay() -> None:
    engine, view, feed = connected()
    feed.take(*engine.publish(stored(1)))
    engine.publish(stored(2))
    feed.take(*engine.publish(stored(3)))
    assert +view.copies == {1: 1}, "what comes behind a gap waits"
    assert feed.wants_replay_from == 0, "asked from the last known batch on"
    assert feed.state is FeedState.EXACT
    engine.settle(feed)
    assert view.copies == engine.truth
    assert feed.state is FeedState.EXACT
    assert (feed.counters.gaps, feed.counters.healed, feed.pending) == (1, 1, 0)


def test_a_gap_beyond_the_buffer_drops_the_view() -> None:
    engine, view, feed = connected(buffer_steps=2)
    feed.take(*engine.publish(stored(1)))
    for number in range(2, 8):
        engine.publish(stored(number))
    feed.take(*engine.publish(stored(8)))
    engine.settle(feed)
    assert feed.state is FeedState.PARTIAL
    assert +view.copies == {7: 1, 8: 1}
    feed.take(*engine.publish(stored(9)))
    assert view.copies[9] == 1


def test_without_replay_a_gap_drops_the_view() -> None:
    view = View()
    feed = Feed(view, SIZE, can_replay=False)
    assert feed.wants_replay_from is None
    engine = Engine()
    feed.take(*engine.publish(stored(1)))
    assert feed.state is FeedState.EXACT
    engine.publish(stored(2))
    feed.take(*engine.publish(stored(3)))
    assert feed.state is FeedState.PARTIAL
    assert +view.copies == {3: 1}
    late = Feed(View(), SIZE, can_replay=False)
    late.take(*engine.publish(stored(4)))
    assert late.state is FeedState.PARTIAL


def test_a_loss_at_the_end_is_found_by_the_check() -> None:
    engine, view, feed = connected()
    feed.take(*engine.publish(stored(1)))
    engine.publish(stored(2))
    feed.check()
    engine.settle(feed)
    assert view.copies == engine.truth
    assert feed.state is FeedState.EXACT
    assert feed.counters.restarts == 0


def test_a_restart_begins_anew() -> None:
    engine, view, feed = connected()
    for number in range(1, 6):
        feed.take(*engine.publish(stored(number)))
    engine.restart()
    feed.take(*engine.publish(stored(100)))
    assert feed.state is FeedState.EXACT
    assert +view.copies == {100: 1}
    assert feed.counters.restarts == 1


def test_a_restart_is_noticed_when_its_first_batches_were_missed() -> None:
    engine, view, feed = connected()
    for number in range(1, 6):
        feed.take(*engine.publish(stored(number)))
    engine.restart()
    engine.publish(stored(100))
    feed.take(*engine.publish(stored(101)))
    assert +view.copies == {}, "nothing of the old life is believed any more"
    engine.settle(feed)
    assert feed.state is FeedState.EXACT
    assert view.copies == engine.truth


def test_a_restart_is_noticed_when_the_new_life_is_longer() -> None:
    engine, view, feed = connected()
    for number in range(1, 4):
        feed.take(*engine.publish(stored(number)))
    engine.restart()
    for number in range(100, 110):
        engine.publish(stored(number))
    feed.take(*engine.publish(stored(110)))
    engine.settle(feed)
    assert view.copies == engine.truth
    assert feed.state is FeedState.EXACT


def test_a_restart_of_a_silent_engine_is_found_by_the_check() -> None:
    engine, view, feed = connected()
    for number in range(1, 4):
        feed.take(*engine.publish(stored(number)))
    engine.restart()
    feed.check()
    engine.settle(feed)
    assert (+view.copies, feed.state, feed.counters.restarts) == ({}, FeedState.EXACT, 1)


def test_a_restart_found_by_the_check_is_known_exactly() -> None:
    engine, view, feed = connected()
    feed.take(*engine.publish(stored(1)))
    engine.restart()
    engine.publish(stored(2))
    feed.check()
    engine.settle(feed)
    assert (+view.copies, feed.state, feed.counters.restarts) == ({2: 1}, FeedState.EXACT, 1)


def test_a_check_of_a_busy_engine_with_a_short_buffer_leaves_the_view_alone() -> None:
    engine, view, feed = connected(buffer_steps=2)
    feed.take(*engine.publish(stored(1)))
    feed.check()
    start = feed.wants_replay_from
    feed.replay_asked()
    for number in range(2, 9):
        feed.take(*engine.publish(stored(number)))
    assert start == 0
    for sequence in (6, 7):
        feed.take(sequence, engine.log[sequence], replayed=True)
    feed.replay_ended()
    assert feed.state is FeedState.EXACT
    assert view.copies == engine.truth


def test_a_silent_replay_port_leaves_a_partial_view_that_a_later_answer_completes() -> None:
    engine, view = Engine(), View()
    feed = Feed(view, SIZE, can_replay=True)
    engine.publish(stored(1))
    feed.replay_asked()
    feed.replay_ended(answered=False)
    assert feed.state is FeedState.PARTIAL
    feed.check()
    engine.settle(feed)
    assert feed.state is FeedState.EXACT
    assert view.copies == engine.truth


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (stored(1, block_size=8), FeedState.BLOCK_SIZE_MISMATCH),
        (stored(1), FeedState.HASH_MISMATCH),
    ],
)
def test_an_engine_that_differs_from_its_pool_is_not_believed(event: dict[str, Any], state: FeedState) -> None:
    engine, view = Engine(), View(right=state is not FeedState.HASH_MISMATCH)
    feed = Feed(view, SIZE, can_replay=True)
    engine.settle(feed)
    feed.take(*engine.publish(event))
    assert feed.state is state
    feed.take(*engine.publish(stored(2)))
    assert +view.copies == {}
    feed.check()
    assert feed.wants_replay_from is None
    view.right = True
    engine.restart()
    feed.take(*engine.publish(stored(3)))
    assert feed.state is FeedState.EXACT, "a new life gets a new chance"
    assert +view.copies == {3: 1}


def test_garbage_is_counted_and_costs_the_view() -> None:
    engine, view, feed = connected()
    feed.take(*engine.publish(stored(1)))
    feed.take(1, b"\xc1garbage")
    assert feed.state is FeedState.PARTIAL
    assert +view.copies == {}
    for sequence in range(2, 2 + MAX_GARBAGE):
        feed.take(sequence, msgspec.msgpack.encode({"no": "batch"}))
    assert feed.state is FeedState.GARBAGE
    assert feed.counters.garbage == MAX_GARBAGE


def test_what_waits_is_bounded() -> None:
    engine, _, feed = connected()
    feed.take(*engine.publish(stored(1)))
    for number in range(2 * MAX_PENDING_BATCHES):
        engine.publish(stored(5))
        feed.take(*engine.publish(stored(10 + number)))
        assert feed.pending <= MAX_PENDING_BATCHES
    assert feed.state is FeedState.PARTIAL


def test_other_media_and_groups_are_left_out() -> None:
    engine, view, feed = connected()
    feed.take(
        *engine.publish(
            stored(1, medium="CPU"),
            stored(2, group_idx=1),
            stored(3, kv_cache_spec_kind="sliding_window"),
            stored(4, kv_cache_spec_kind="full_attention", group_idx=0),
            removed(4, medium="CPU"),
            stored(5, medium=None),
        )
    )
    assert +view.copies == {4: 1, 5: 1}
    assert feed.counters.ignored == 4


def test_hashes_may_come_as_whole_digests() -> None:
    engine, view, feed = connected()
    digest = bytes(range(32))
    feed.take(*engine.publish({**stored(1), "block_hashes": [digest], "parent_block_hash": digest}))
    assert +view.copies == {int.from_bytes(digest[-8:], "big"): 1}


def test_chains_are_verified_now_and_then() -> None:
    engine, view, feed = connected()
    for number in range(2000):
        feed.take(*engine.publish(stored(number + 1)))
        feed.take(*engine.publish(stored(number + 5000, parent=number + 1)))
    assert 8 <= view.asked <= 20


steps = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "restart", "check", "clear"]), st.integers(1, 30))
)


@settings(max_examples=300, deadline=None)
@given(steps, st.integers(0, 1 << 30), st.sampled_from([1, 3, 10_000]), st.sampled_from([0.0, 0.1, 0.5]))
def test_an_exact_view_is_exact(ops: list[tuple[str, int]], seed: int, buffer_steps: int, loss: float) -> None:
    """Messages are lost, live and in replays, engines restart: whenever a feed says EXACT and the stream is at rest,
    its view is the engine's cache; with a full buffer and no loss in the last replay it always says so."""
    chance = random.Random(seed)
    engine, view = Engine(buffer_steps), View()
    feed = Feed(view, SIZE, can_replay=True)

    def lost() -> bool:
        return chance.random() < loss

    for kind, number in ops:
        if kind == "store":
            message = engine.publish(stored(number))
        elif kind == "remove" and engine.truth[number] > 0:
            message = engine.publish(removed(number))
        elif kind == "clear":
            message = engine.publish({"type": "AllBlocksCleared"})
        elif kind == "restart":
            # Where messages are lost too, a new life may go on with the very number that was expected of the old one;
            # that is for the control plane to notice, by the engine's time of start.
            if not loss:
                engine.restart()
            continue
        else:
            feed.check()
            if feed.wants_replay_from is not None and chance.random() < 0.7:
                engine.replay(feed, lose=lost)
            continue
        if not lost():
            feed.take(*message)
        if feed.wants_replay_from is not None and chance.random() < 0.3:
            engine.replay(feed, lose=lost)
    feed.check()
    engine.settle(feed)
    feed.check()
    engine.settle(feed)
    if feed.state is FeedState.EXACT:
        assert +view.copies == +engine.truth
    else:
        assert feed.state is FeedState.PARTIAL
        assert +view.copies <= +engine.truth
        assert loss or buffer_steps < 10_000
