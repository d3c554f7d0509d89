"""The thread that reads the engines' KV events and keeps the index of cached blocks.

One SUB socket and one DEALER for replays a target. The thread looks at all sockets every few milliseconds, takes a
bounded number of messages from each, and applies all that came as one batch; a target that floods its socket delays
nobody. What it cannot take in time waits in ZMQ's queues; beyond those the engine drops, which shows as a gap and is
healed by replay, or costs the target its exact view.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec
import zmq

from router.kvevents.feed import UNUSABLE, Feed, FeedCounters, FeedState
from router.kvevents.index_writer import Changes, KvIndexWriter
from router.kvevents.source import Source
from router.kvevents.verify import matches
from router.kvevents.wire import MAX_PAYLOAD_BYTES, BlockStored
from router.routing.kv_index import ViewState
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import HashAlgorithm

log = logging.getLogger(__name__)

TURN_S = 0.01
"""Between two looks at the sockets."""
KEEP_S = 0.1
"""Between two rounds over all targets, for what no message brings up."""
MESSAGES_PER_TURN = 64
"""Taken from one socket at a look."""
BLOCKS_PER_BATCH = 16_384
REPLAY_TIMEOUT_S = 5.0
CHECK_S = 10.0
"""Between two checks of a stream for losses at its end."""
RECEIVE_QUEUE_MESSAGES = 4096
RECONNECT_MS, RECONNECT_MAX_MS = 100, 5000
END_SEQUENCE = b"\xff" * 8
_VIEWS = {FeedState.EXACT: ViewState.EXACT, FeedState.PARTIAL: ViewState.PARTIAL}


class FeedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A target to follow. Another spec for a slot is another engine, whose view begins anew, unless only the adapters
    differ."""

    slot: int
    target_id: str
    incarnation: int
    pool: str
    source: Source
    block_tokens: int
    algorithm: HashAlgorithm
    hash_seed: str = ""
    adapter_paths: tuple[tuple[str, str], ...] = ()


class FeedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with one target."""

    target_id: str
    pool: str
    slot: int
    state: FeedState
    next_sequence: int
    pending: int
    batches: int
    blocks: int
    gaps: int
    healed: int
    restarts: int
    duplicates: int
    garbage: int
    ignored: int
    verified: int


class _Follower:
    """One target: its sockets, its feed, and the feed's effect on the index (``feed.Sink``)."""

    def __init__(self, spec: FeedSpec, hasher: BlockHasher, owner: "Subscriber", now_s: float) -> None:
        self.spec = spec
        self._hasher = hasher
        self._owner = owner
        self._paths = dict(spec.adapter_paths)
        self.feed = Feed(self, spec.block_tokens, can_replay=bool(spec.source.replay_endpoint))
        self._shown = FeedState.CONNECTING
        self.replay_due_s = 0.0
        self.check_due_s = now_s + 1.0
        self.events: zmq.Socket[bytes] = owner.context.socket(zmq.SUB)
        self.replays: zmq.Socket[bytes] | None = None
        _limit(self.events, RECEIVE_QUEUE_MESSAGES)
        self.events.setsockopt_string(zmq.SUBSCRIBE, spec.source.topic)
        self.events.connect(spec.source.endpoint)

    def goes_on(self, spec: FeedSpec | None) -> bool:
        """Whether the follower may go on under ``spec``: adapters come and go, all else makes it another target."""
        if spec is None or msgspec.structs.replace(spec, adapter_paths=self.spec.adapter_paths) != self.spec:
            return False
        if spec.adapter_paths != self.spec.adapter_paths:
            self.spec, self._paths = spec, dict(spec.adapter_paths)
        return True

    def stored(self, hashes: list[int], parent: int | None) -> None:
        """See feed.Sink."""
        self._owner.changes.stored(self.spec.slot, hashes, parent)

    def removed(self, hashes: list[int]) -> None:
        """See feed.Sink."""
        self._owner.changes.removed(self.spec.slot, hashes)

    def cleared(self) -> None:
        """See feed.Sink."""
        self._owner.flush()
        self._owner.index.clear(self.spec.slot)

    def verify(self, event: BlockStored) -> bool | None:
        """See feed.Sink."""
        return matches(event, self._hasher, self._paths)

    def read(self) -> int:
        """Take what came; returns the number of messages."""
        taken = 0
        while taken < MESSAGES_PER_TURN:
            try:
                frames = self.events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            taken += 1
            if len(frames) == 3 and len(frames[1]) == 8:
                self.feed.take(int.from_bytes(frames[1], "big"), frames[2])
            else:
                self.feed.counters.garbage += 1
        return taken

    def read_replay(self, now_s: float) -> None:
        """Take what came of a replay under way."""
        replays = self.replays
        if replays is None:
            return
        for _ in range(MESSAGES_PER_TURN):
            try:
                frames = replays.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.replay_due_s = now_s + REPLAY_TIMEOUT_S
            if len(frames) != 4 or len(frames[2]) != 8:
                self.feed.counters.garbage += 1
            elif frames[2] == END_SEQUENCE:
                self._close_replay()
                self.feed.replay_ended()
                return
            else:
                self.feed.take(int.from_bytes(frames[2], "big"), frames[3], replayed=True)

    def keep(self, now_s: float) -> None:
        """Ask for replays that are wanted, end those that are late, check a stream from time to time."""
        feed = self.feed
        if self.replays is not None and now_s > self.replay_due_s:
            self._close_replay()
            feed.replay_ended(answered=False)
        if now_s > self.check_due_s:
            self.check_due_s = now_s + CHECK_S
            feed.check()
        if feed.wants_replay_from is not None and self.replays is None:
            socket = self._owner.context.socket(zmq.DEALER)
            # All of an engine's buffer comes at once.
            _limit(socket, 0)
            socket.connect(self.spec.source.replay_endpoint)
            try:
                socket.send_multipart([b"", feed.wants_replay_from.to_bytes(8, "big")], zmq.NOBLOCK)
            except zmq.ZMQError:
                socket.close(linger=0)
                return
            self.replays = socket
            self._owner.watch(socket, self)
            self.replay_due_s = now_s + REPLAY_TIMEOUT_S
            feed.replay_asked()

    def show(self) -> None:
        """Let readers see the state that the feed is in."""
        state = self.feed.state
        if state is self._shown:
            return
        view = _VIEWS.get(state, ViewState.NONE)
        self._owner.flush()
        self._owner.index.set_view(self.spec.slot, view, self.spec.block_tokens)
        extra = {"target_id": self.spec.target_id, "state": state.value, "before": self._shown.value}
        if state in UNUSABLE or state is FeedState.PARTIAL:
            log.warning("no exact view of a cache", extra=extra)
        else:
            log.info("view of a cache", extra=extra)
        self._shown = state

    def close(self) -> None:
        """Close the sockets and forget the view."""
        self._owner.unwatch(self.events)
        self._close_replay()
        self._owner.index.set_view(self.spec.slot, ViewState.NONE)
        self._owner.index.clear(self.spec.slot)

    def _close_replay(self) -> None:
        if self.replays is not None:
            self._owner.unwatch(self.replays)
            self.replays = None

    def status(self) -> FeedStatus:
        """For people and metrics."""
        feed, counters = self.feed, self.feed.counters
        return FeedStatus(
            target_id=self.spec.target_id,
            pool=self.spec.pool,
            slot=self.spec.slot,
            state=feed.state,
            next_sequence=feed.next_sequence,
            pending=feed.pending,
            **{name: getattr(counters, name) for name in FeedCounters.__slots__},
        )


class Subscriber:
    """The thread and everything that it owns. ``follow`` and ``status`` may be called from any thread.

    ``grow(index)`` gives a larger index with the same content, or None when none is to be had.
    """

    def __init__(
        self,
        index: KvIndexWriter,
        *,
        grow: Callable[[KvIndexWriter], KvIndexWriter | None] = lambda index: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self._grow = grow
        self._clock = clock
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, self.context.get(zmq.SOCKET_LIMIT))
        self.poller = zmq.Poller()
        self.changes = Changes()
        self._followers: dict[int, _Follower] = {}
        self._by_socket: dict[zmq.Socket[bytes], _Follower] = {}
        self._keep_due_s = 0.0
        self._wanted: dict[int, FeedSpec] | None = None
        self._lock = threading.Lock()
        self._status: tuple[FeedStatus, ...] = ()
        self._stopping = threading.Event()
        self.failure: BaseException | None = None
        self.applied_blocks = 0
        """Blocks stored and removed that went into the index."""
        self.cpu_s = 0.0
        """CPU time of the thread."""
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close all sockets. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def follow(self, specs: Iterable[FeedSpec]) -> None:
        """Follow exactly these targets from now on."""
        with self._lock:
            self._wanted = {spec.slot: spec for spec in specs}

    def status(self) -> tuple[FeedStatus, ...]:
        """How it stands with each target, at most a quarter of a second old."""
        return self._status

    def flush(self) -> None:
        """Apply the changes collected so far (the subscriber's own thread)."""
        if not len(self.changes):
            return
        changes, self.changes = self.changes, Changes()
        self.applied_blocks += len(changes)
        while self.index.blocks + len(changes) > self.index.capacity:
            larger = self._grow(self.index)
            if larger is None:
                break
            self.index = larger
        self.index.apply(changes.batch())
        for slot in self.index.take_overflowed():
            follower = self._followers.get(slot)
            if follower is not None:
                self.index.clear(slot)
                follower.feed.overflowed()

    def watch(self, socket: "zmq.Socket[bytes]", follower: _Follower) -> None:
        """Look at a follower's socket from now on (the subscriber's own thread)."""
        self.poller.register(socket, zmq.POLLIN)
        self._by_socket[socket] = follower

    def unwatch(self, socket: "zmq.Socket[bytes]") -> None:
        """Close a socket (the subscriber's own thread)."""
        self.poller.unregister(socket)
        del self._by_socket[socket]
        socket.close(linger=0)

    def _run(self) -> None:
        try:
            told_s = 0.0
            while not self._stopping.is_set():
                now_s = self._clock()
                self._take_orders(now_s)
                self._turn(now_s)
                self.index.beat(now_s)
                if now_s - told_s > 0.25:
                    told_s = now_s
                    self._status = tuple(follower.status() for follower in self._followers.values())
                    self.cpu_s = time.thread_time()
                self._stopping.wait(TURN_S)
        except BaseException as error:
            self.failure = error
            log.critical("the subscriber to KV events failed", exc_info=error)
        finally:
            for follower in self._followers.values():
                follower.close()
            self.context.destroy(linger=0)

    def _turn(self, now_s: float) -> None:
        touched = set()
        for socket, _ in self.poller.poll(0) if self._followers else ():
            follower = self._by_socket[socket]
            touched.add(follower)
            if socket is follower.events:
                if follower.read():
                    follower.check_due_s = now_s + CHECK_S
            else:
                follower.read_replay(now_s)
            if len(self.changes) > BLOCKS_PER_BATCH:
                self.flush()
        self.flush()
        if now_s >= self._keep_due_s:
            self._keep_due_s = now_s + KEEP_S
            touched.update(self._followers.values())
        for follower in touched:
            follower.keep(now_s)
            follower.show()

    def _take_orders(self, now_s: float) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, None
        if wanted is None:
            return
        for slot, follower in list(self._followers.items()):
            if not follower.goes_on(wanted.get(slot)):
                follower.close()
                del self._followers[slot]
        for slot, spec in wanted.items():
            if slot in self._followers:
                continue
            try:
                hasher = BlockHasher(spec.block_tokens, spec.algorithm, spec.hash_seed)
                follower = _Follower(spec, hasher, self, now_s)
            except (zmq.ZMQError, ValueError) as error:
                log.error("cannot follow a target", extra={"target_id": spec.target_id, "cause": str(error)})
                continue
            self._followers[slot] = follower
            self.watch(follower.events, follower)
            follower.keep(now_s)


def _limit(socket: "zmq.Socket[bytes]", queue_messages: int) -> None:
    """What one peer may cost: length of its queue, size of a message, rate of reconnects."""
    socket.setsockopt(zmq.RCVHWM, queue_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.LINGER, 0)


def totals(statuses: Iterable[FeedStatus]) -> Mapping[str, int]:
    """Sums of the counters over targets."""
    names = FeedCounters.__slots__
    sums = dict.fromkeys(names, 0)
    for status in statuses:
        for name in names:
            sums[name] += getattr(status, name)
    return sums
