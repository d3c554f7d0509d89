"""Connected router replicas: their load to each other, their failures to the fleet, commands to them."""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

import grpc

from controlplane.routers.demand import DemandBook
from controlplane.routers.load import ReplicaLoad
from twofold.v1 import router_pb2

log = logging.getLogger(__name__)

MAX_REPLICAS = 256
MAX_COMMANDS = 64
GONE_AFTER_S = 2.0
ROUND_S = 0.015
SEND_COST_S = 300e-6
"""Rounds are spaced so that passing load on, one message to each replica, takes a bounded share of one core."""
MAX_BATCH_BYTES = 4 << 20
"""Above this, what is left for a reader follows in another message."""


class HubError(Exception):
    """A session or command that cannot be; ``code`` is the status to answer with."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Session:
    """One replica's present stream."""

    def __init__(self, hello: router_pb2.RouterHello, stream: int) -> None:
        self.hello = hello
        self.stream = stream
        self.load = ReplicaLoad(hello.replica_id)
        self.connected = True
        self.seen_s = time.monotonic()
        self.snapshot_epoch = 0
        self.snapshot_version = 0
        self.ended = asyncio.Event()
        self.wake = asyncio.Event()
        self.wake.set()
        self.commands: deque[bytes] = deque()
        self.cursors: dict[str, tuple[int, int]] = {}
        """Other replica -> (its stream, the serial of its load that was sent)."""
        self.turn = 0
        """Index of the replica to begin with, where a batch was cut short."""
        self.departures = 0
        """Departures of replicas known when ``cursors`` was last cleaned."""
        self.failures_sequence = 0


class RouterHub:
    """All sessions.

    Load is passed on in rounds: all readers are woken together, and each is sent what the others reported since its
    last message, as one message joined from pieces that were encoded once. A round follows a tick at once, or after the
    round before it by a spacing that grows with the number of replicas.

    ``on_failures(session, [(ordinal, failures)])`` hears of changed failure counts, ``on_gone(session)`` when a replica
    is away for longer than a grace period. ``epoch()`` is the epoch that ticks must carry.
    """

    def __init__(
        self,
        epoch: Callable[[], int],
        on_failures: Callable[[Session, list[tuple[int, int]]], None],
        on_gone: Callable[[Session], None],
        *,
        gone_after_s: float = GONE_AFTER_S,
    ) -> None:
        self._epoch = epoch
        self._on_failures = on_failures
        self._on_gone = on_gone
        self._gone_after_s = gone_after_s
        self._sessions: dict[str, Session] = {}
        self._streams = itertools.count(1)
        self._ids = itertools.count(1)
        self._pending: dict[str, tuple[str, asyncio.Future[router_pb2.CommandResult]]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._order: list[Session] = []
        """All sessions, for rounds."""
        self._round: asyncio.TimerHandle | None = None
        self._last_round_s = 0.0
        self._departures = 0
        self.demand = DemandBook()
        self.ticks = 0
        self.stale_ticks = 0
        self.refused_commands = 0
        self.refused_sessions = 0
        self.sent = 0
        self.rounds = 0
        self.merges = 0
        """Times that a reader was behind by more than one tick of a replica and was sent merged values."""

    @property
    def pending_commands(self) -> int:
        """Commands that were not answered yet."""
        return len(self._pending)

    def connect(self, hello: router_pb2.RouterHello) -> Session:
        """Begin a stream; a stream of the same replica that is still open is ended. Raises HubError."""
        before = self._sessions.get(hello.replica_id)
        if before is None and len(self._sessions) >= MAX_REPLICAS:
            self.refused_sessions += 1
            raise HubError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_REPLICAS} replicas are connected already")
        if before is not None:
            before.connected = False
            before.ended.set()
            before.wake.set()
            self._fail_commands(hello.replica_id, "the replica connected anew")
        timer = self._timers.pop(hello.replica_id, None)
        if timer is not None:
            timer.cancel()
        session = Session(hello, next(self._streams))
        self._sessions[hello.replica_id] = session
        self._order = list(self._sessions.values())
        log.info("router connected", extra={"replica_id": hello.replica_id, "stream": session.stream})
        return session

    def disconnect(self, session: Session) -> None:
        """End a stream. Its load counts for a grace period more, for a replica that comes straight back."""
        replica_id = session.hello.replica_id
        session.connected = False
        session.ended.set()
        if self._sessions.get(replica_id) is not session:
            return
        self._fail_commands(replica_id, "the replica went away")
        loop = asyncio.get_running_loop()
        self._timers[replica_id] = loop.call_later(self._gone_after_s, self._expire, session)

    def close(self) -> None:
        """End every stream."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._round is not None:
            self._round.cancel()
        for session in self._sessions.values():
            session.ended.set()
            session.wake.set()

    def _expire(self, session: Session) -> None:
        replica_id = session.hello.replica_id
        self._timers.pop(replica_id, None)
        if self._sessions.get(replica_id) is session and not session.connected:
            del self._sessions[replica_id]
            self._order = list(self._sessions.values())
            self._departures += 1
            log.info("router gone", extra={"replica_id": replica_id})
            self._on_gone(session)
            self._begin_round()

    def tick(self, session: Session, tick: router_pb2.LoadTick) -> None:
        """Take a load tick. Raises LoadError for one that no router would send."""
        session.seen_s = time.monotonic()
        self.ticks += 1
        if tick.epoch != self._epoch():
            self.stale_ticks += 1
            return
        failures = session.load.apply(tick)
        if failures:
            self._on_failures(session, failures)
        self._begin_round()

    def result(self, session: Session, result: router_pb2.CommandResult) -> None:
        """Take the answer to a command; answers to forgotten ones are dropped."""
        session.seen_s = time.monotonic()
        pending = self._pending.get(result.command_id)
        if pending is not None and pending[0] == session.hello.replica_id and not pending[1].done():
            pending[1].set_result(result)

    async def command(
        self, replica_id: str, command: router_pb2.RouterCommand, deadline_s: float
    ) -> router_pb2.CommandResult:
        """Send a command to one replica and wait for its answer. Raises HubError, TimeoutError after ``deadline_s``."""
        session = self._sessions.get(replica_id)
        if session is None or not session.connected:
            raise HubError(grpc.StatusCode.UNAVAILABLE, f"replica {replica_id} is not connected")
        if len(session.commands) >= MAX_COMMANDS:
            self.refused_commands += 1
            raise HubError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"replica {replica_id} has {MAX_COMMANDS} commands waiting"
            )
        command_id = f"c{next(self._ids)}"
        sent = router_pb2.RouterCommand()
        sent.CopyFrom(command)
        sent.command_id, sent.deadline_s = command_id, deadline_s
        future: asyncio.Future[router_pb2.CommandResult] = asyncio.get_running_loop().create_future()
        self._pending[command_id] = (replica_id, future)
        session.commands.append(router_pb2.ReportResponse(command=sent).SerializeToString())
        session.wake.set()
        try:
            async with asyncio.timeout(deadline_s):
                return await future
        finally:
            self._pending.pop(command_id, None)

    def _fail_commands(self, replica_id: str, message: str) -> None:
        for owner, future in list(self._pending.values()):
            if owner == replica_id and not future.done():
                future.set_exception(HubError(grpc.StatusCode.UNAVAILABLE, f"replica {replica_id}: {message}"))

    async def outgoing(self, session: Session) -> AsyncGenerator[bytes, None]:
        """Encoded ReportResponse messages for a replica until its stream ends.

        At most one message with loads a round, with the latest values: a slow reader is behind, never a queue.
        """
        while not session.ended.is_set():
            await session.wake.wait()
            session.wake.clear()
            while session.commands and not session.ended.is_set():
                yield session.commands.popleft()
            news = self._news(session)
            if news and not session.ended.is_set():
                self.sent += 1
                yield news

    def _news(self, session: Session) -> bytes:
        """What the others reported since the last message, b"" for nothing."""
        parts: list[bytes] = []
        cursors = session.cursors
        if session.departures != self._departures:
            session.departures = self._departures
            for replica_id in [replica_id for replica_id in cursors if replica_id not in self._sessions]:
                del cursors[replica_id]
                parts.append(_gone(replica_id))
        size = 0
        order, count = self._order, len(self._order)
        for step in range(count):
            other = order[(session.turn + step) % count]
            load = other.load
            if other is session or load.serial == 0:
                continue
            replica_id = load.replica_id
            stream, serial = cursors.get(replica_id, _UNKNOWN)
            if stream != other.stream:
                serial = 0
            elif serial == load.serial:
                continue
            elif serial != load.serial - 1:
                self.merges += 1
            if size > MAX_BATCH_BYTES:
                session.turn = (session.turn + step) % count
                session.wake.set()
                break
            cursors[replica_id] = (other.stream, load.serial)
            part = load.since(serial)
            size += len(part)
            parts.append(part)
        return b"".join(parts)

    def _begin_round(self) -> None:
        """Wake all readers, now or when the spacing after the last round is over."""
        if self._round is None:
            loop = asyncio.get_running_loop()
            spacing_s = max(ROUND_S, SEND_COST_S * len(self._order))
            self._round = loop.call_at(self._last_round_s + spacing_s, self._wake_all)

    def _wake_all(self) -> None:
        self._round = None
        self._last_round_s = asyncio.get_running_loop().time()
        self.rounds += 1
        for session in self._order:
            session.wake.set()

    def sessions(self) -> list[Session]:
        """All sessions, those of the grace period included, by replica id."""
        return [self._sessions[replica_id] for replica_id in sorted(self._sessions)]

    def connected(self) -> list[str]:
        """Ids of the replicas that are connected."""
        return [session.hello.replica_id for session in self.sessions() if session.connected]

    def inflight(self, ordinal: int) -> tuple[int, int]:
        """(requests in flight, those without a first token) on a target, all replicas."""
        total = decodes = 0
        for session in self._sessions.values():
            row = session.load.row(ordinal)
            total += row.inflight
            decodes += row.decodes
        return total, max(0, total - decodes)

    def keep_only(self, ordinals: set[int]) -> None:
        """Forget the load of targets that are no more."""
        for session in self._sessions.values():
            session.load.keep_only(ordinals)

    def saw_snapshot(self, replica_id: str, epoch: int, version: int) -> None:
        """Note which snapshot a replica was sent."""
        session = self._sessions.get(replica_id)
        if session is not None:
            session.snapshot_epoch, session.snapshot_version = epoch, version


def _gone(replica_id: str) -> bytes:
    return router_pb2.ReportResponse(gone=(router_pb2.PeerGone(replica_id=replica_id),)).SerializeToString()


_UNKNOWN = (0, 0)
