"""One target's stream of KV events put in order: duplicates dropped, gaps healed by replay, restarts noticed. Pure.

Live messages and replayed ones come in through the same door, ``take``. What the stream means for the target's view
comes out as calls of a ``Sink``. Sequence numbers begin at 0 when an engine starts; a message that has been seen
before, but bears a later time than the last one, is from an engine that was restarted.
"""

import enum
from typing import Protocol

from router.kvevents import wire
from router.kvevents.wire import BlockRemoved, BlockStored, EventBatch

MAX_PENDING_BATCHES = 2048
MAX_PENDING_BYTES = 32 << 20
FIRST_VERIFIED = 8
VERIFY_EVERY = 512
"""Of the events that begin a chain, the first few of each life of an engine are hashed again, then one in so many."""
TIMES_KEPT = 256
MAX_GARBAGE = 16
"""Undecodable messages in a row after which a source is given up."""


class FeedState(enum.StrEnum):
    """What is known of a target's cache, and why not more."""

    CONNECTING = "connecting"
    """Nothing received yet, the first replay is under way."""
    EXACT = "exact"
    """Every event since the cache was empty was seen."""
    PARTIAL = "partial"
    """A gap could not be healed, or the subscription began too late: what is listed is there, more may be."""
    BLOCK_SIZE_MISMATCH = "block-size-mismatch"
    HASH_MISMATCH = "hash-mismatch"
    GARBAGE = "garbage"
    """What comes from the socket are no KV events."""
    OVERFLOW = "overflow"
    """Its blocks found no room in the index."""


UNUSABLE = frozenset({FeedState.BLOCK_SIZE_MISMATCH, FeedState.HASH_MISMATCH, FeedState.GARBAGE, FeedState.OVERFLOW})


class Sink(Protocol):
    """What a feed does to its target's view."""

    def stored(self, hashes: list[int], parent: int | None) -> None:
        """A run of blocks of one chain is there."""

    def removed(self, hashes: list[int]) -> None:
        """One copy of each block is gone."""

    def cleared(self) -> None:
        """Nothing is there."""

    def verify(self, event: BlockStored) -> bool | None:
        """Whether the engine hashes as its pool says; None where the event does not tell."""


class FeedCounters:
    """Totals of one feed."""

    __slots__ = ("batches", "blocks", "duplicates", "gaps", "garbage", "healed", "ignored", "restarts", "verified")

    def __init__(self) -> None:
        self.batches = 0
        self.blocks = 0
        """Blocks stored and removed."""
        self.duplicates = 0
        self.garbage = 0
        self.gaps = 0
        self.healed = 0
        self.ignored = 0
        """Events of other media or cache groups."""
        self.restarts = 0
        self.verified = 0


class Feed:
    """The state machine of one source.

    The host asks for ``wants_replay_from`` whenever it is not None, says so by ``replay_asked``, and tells the end of
    the answer by ``replay_ended``. A replay always begins one batch before the one expected: seeing that batch again,
    with the time it had, proves that the engine is still the same.
    """

    def __init__(self, sink: Sink, block_tokens: int, *, can_replay: bool) -> None:
        self._sink = sink
        self._block_tokens = block_tokens
        self._can_replay = can_replay
        self._next = 0
        self._last_ts = 0.0
        self._times: dict[int, float] = {}
        """When each of the last batches was made, by sequence number."""
        self._answered = False
        self._pending: dict[int, EventBatch] = {}
        self._pending_bytes = 0
        self._replay: _Replay | None = None
        self._chains = 0
        self._garbage_row = 0
        self.counters = FeedCounters()
        self.state = FeedState.CONNECTING
        self.wants_replay_from: int | None = 0 if can_replay else None

    @property
    def next_sequence(self) -> int:
        """Sequence number of the batch expected next."""
        return self._next

    @property
    def pending(self) -> int:
        """Batches that wait for earlier ones."""
        return len(self._pending)

    @property
    def replaying(self) -> bool:
        """Whether a replay is under way."""
        return self._replay is not None

    def replay_asked(self) -> None:
        """What was wanted has been asked for."""
        self._replay = _Replay(self._next)
        self.wants_replay_from = None

    def check(self) -> None:
        """Ask for whatever was published since: shows what was lost at the end of the stream, and a restart."""
        if not self._can_replay or self._replay is not None or self.state in UNUSABLE:
            return
        if self.state is FeedState.PARTIAL and not self._answered:
            self._begin_life()
        self.wants_replay_from = max(0, self._next - 1)

    def take(self, sequence: int, payload: bytes, *, replayed: bool = False) -> None:
        """One message, live or replayed."""
        if self.state in UNUSABLE and sequence:
            return
        try:
            batch = wire.decode(payload)
        except wire.WireError:
            self._take_garbage(sequence)
            return
        self._garbage_row = 0
        if replayed and self._replay is not None:
            self._replay.seen = True
        if self.state in UNUSABLE:
            self._begin_life()
        elif sequence < self._next:
            if self._is_known(sequence, batch.ts):
                self.counters.duplicates += 1
                return
            self.counters.restarts += 1
            self._begin_life()
        if sequence == self._next:
            self._apply(batch)
            self._drain()
        elif self.state is FeedState.CONNECTING and not self._can_replay:
            self._next = sequence
            self.state = FeedState.PARTIAL
            self._apply(batch)
        else:
            self._hold(sequence, batch, len(payload))

    def replay_ended(self, *, answered: bool = True) -> None:
        """The replay is over; ``answered`` is False where its end did not come in time."""
        replay, self._replay = self._replay, None
        if replay is None or self.state in UNUSABLE:
            return
        self._drain()
        self._answered = self._answered or answered
        if not answered:
            if self._pending or self.state is FeedState.CONNECTING:
                self._give_up()
        elif replay.overtaken:
            pass  # the engine was restarted meanwhile: the replay of its new life is wanted already
        elif replay.expected and not replay.seen:
            # Its own last batch is not in the engine's buffer: it is another engine, or the same one restarted.
            self.counters.restarts += 1
            self._begin_life()
        elif self._pending:
            if self._next > replay.expected and (replay.same or not replay.expected):
                self.wants_replay_from = self._next - 1  # batches were lost on the way
            else:
                self._give_up()
        elif replay.expected and not replay.same:
            self._give_up()
        elif self.state is FeedState.CONNECTING:
            self.state = FeedState.EXACT

    def overflowed(self) -> None:
        """The index had no room for a block."""
        self._fail(FeedState.OVERFLOW)

    def _is_known(self, sequence: int, ts: float) -> bool:
        """Whether a batch that is not new has been seen before."""
        seen_ts = self._times.get(sequence)
        if seen_ts is None:
            return ts <= self._last_ts
        if seen_ts == ts and self._replay is not None:
            self._replay.same = True
        return seen_ts == ts

    def _begin_life(self) -> None:
        self._sink.cleared()
        self._forget_pending()
        self._next, self._last_ts, self._chains = 0, 0.0, 0
        self._times.clear()
        self.state = FeedState.CONNECTING
        if self._can_replay:
            self.wants_replay_from = 0
        if self._replay is not None:
            self._replay.overtaken = True

    def _hold(self, sequence: int, batch: EventBatch, size_bytes: int) -> None:
        if not self._pending and self.state is not FeedState.CONNECTING:
            self.counters.gaps += 1
        if sequence not in self._pending:
            self._pending[sequence] = batch
            self._pending_bytes += size_bytes
        if not self._can_replay or len(self._pending) > MAX_PENDING_BATCHES or self._pending_bytes > MAX_PENDING_BYTES:
            self._give_up()
        elif self._replay is None and self.wants_replay_from is None:
            self.wants_replay_from = max(0, self._next - 1)

    def _drain(self) -> None:
        """Apply what follows on from the last batch."""
        if not self._pending:
            return
        while self._pending and self.state not in UNUSABLE:
            batch = self._pending.pop(self._next, None)
            if batch is None:
                return
            self._apply(batch)
        self._pending_bytes = 0
        if self._replay is None and self.wants_replay_from is not None:
            self.wants_replay_from = None
        self.counters.healed += 1

    def _give_up(self) -> None:
        """A gap that stays open: forget everything and go on behind it."""
        while True:
            self._sink.cleared()
            self.state = FeedState.PARTIAL
            if not self._pending:
                break
            self._next = min(self._pending)
            while (batch := self._pending.pop(self._next, None)) is not None:
                self._apply(batch)
            if self.state in UNUSABLE:
                break
            if not self._pending:
                break
        self._forget_pending()
        self.wants_replay_from = None

    def _apply(self, batch: EventBatch) -> None:
        """The batch with the number that is due."""
        if not self._next:
            self.state = FeedState.EXACT
        self._last_ts = self._times[self._next] = batch.ts
        self._times.pop(self._next - TIMES_KEPT, None)
        self._next += 1
        counters, sink = self.counters, self._sink
        counters.batches += 1
        for event in batch.events:
            if type(event) is BlockRemoved:
                if wire.is_counted(event.medium, event.group_idx):
                    sink.removed([wire.short(value) for value in event.block_hashes])
                    counters.blocks += len(event.block_hashes)
                else:
                    counters.ignored += 1
            elif type(event) is BlockStored:
                if not self._stored(event):
                    return
            else:
                sink.cleared()
                self.state = FeedState.EXACT

    def _stored(self, event: BlockStored) -> bool:
        """Whether the engine is still believed."""
        if not wire.is_counted(event.medium, event.group_idx, event.kv_cache_spec_kind):
            self.counters.ignored += 1
            return True
        if event.block_size != self._block_tokens:
            self._fail(FeedState.BLOCK_SIZE_MISMATCH)
            return False
        parent = event.parent_block_hash
        if parent is None:
            self._chains += 1
            if self._chains <= FIRST_VERIFIED or self._chains % VERIFY_EVERY == 0:
                try:
                    right = self._sink.verify(event)
                except wire.WireError:
                    right = False
                if right is False:
                    self._fail(FeedState.HASH_MISMATCH)
                    return False
                self.counters.verified += right is True
        hashes = [wire.short(value) for value in event.block_hashes]
        self.counters.blocks += len(hashes)
        self._sink.stored(hashes, None if parent is None else wire.short(parent))
        return True

    def _take_garbage(self, sequence: int) -> None:
        self.counters.garbage += 1
        self._garbage_row += 1
        if self.state in UNUSABLE:
            return
        if self._garbage_row >= MAX_GARBAGE:
            self._fail(FeedState.GARBAGE)
        elif sequence == self._next:
            # What it said is lost, and asking again would not help.
            self._next += 1
            self._give_up()

    def _fail(self, state: FeedState) -> None:
        self._sink.cleared()
        self._forget_pending()
        self.state = state
        self.wants_replay_from = None

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._pending_bytes = 0


class _Replay:
    """A replay under way."""

    __slots__ = ("expected", "overtaken", "same", "seen")

    def __init__(self, expected: int) -> None:
        self.expected = expected
        """The batch expected next when it was asked for."""
        self.seen = False
        """Whether any batch came."""
        self.same = False
        """Whether a batch came that had been seen before, unchanged: the engine is still the same."""
        self.overtaken = False
        """Whether another life of the engine was seen meanwhile."""
