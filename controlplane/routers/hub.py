"""Connected router replicas: their load to each other, their failures to the fleet, commands to them."""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable

import grpc

from controlplane.routers.demand import DemandBook
from controlplane.routers.load import ReplicaLoad
from twofold.v1 import router_pb2

log = logging.getLogger(__name__)

MAX_REPLICAS = 256
MAX_COMMANDS = 64
GONE_AFTER_S = 2.0
ROUND_S = 0.01
SEND_COST_S = 100e-6
"""Rounds are spaced so that passing load on to all replicas takes a bounded share of one core."""


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
        self.commands: deque[bytes] = deque()
        self.cursors: dict[str, tuple[int, int]] = {}
        """Other replica -> (its stream, the serial of its load that was sent)."""
        self.failures_sequence = 0


class RouterHub:
    """All sessions.

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
        self.demand = DemandBook()
        self.ticks = 0
        self.stale_ticks = 0
        self.sent = 0

    def connect(self, hello: router_pb2.RouterHello) -> Session:
        """Begin a stream; a stream of the same replica that is still open is ended. Raises HubError."""
        before = self._sessions.get(hello.replica_id)
        if before is None and len(self._sessions) >= MAX_REPLICAS:
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
        for session in self._sessions.values():
            session.ended.set()
            session.wake.set()

    def _expire(self, session: Session) -> None:
        replica_id = session.hello.replica_id
        self._timers.pop(replica_id, None)
        if self._sessions.get(replica_id) is session and not session.connected:
            del self._sessions[replica_id]
            log.info("router gone", extra={"replica_id": replica_id})
            self._on_gone(session)
            self._wake_others(session)

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
        self._wake_others(session)

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

        Per other replica at most one message a round, with the latest values: a slow reader is behind, never a queue.
        """
        while not session.ended.is_set():
            session.wake.clear()
            while session.commands and not session.ended.is_set():
                yield session.commands.popleft()
            for message in self._news(session):
                self.sent += 1
                yield message
                if session.ended.is_set():
                    return
            if not session.commands and not session.wake.is_set():
                await session.wake.wait()
            if not session.commands:
                await asyncio.sleep(max(ROUND_S, SEND_COST_S * len(self._sessions) ** 2))

    def _news(self, session: Session) -> Iterable[bytes]:
        own = session.hello.replica_id
        for replica_id in [replica_id for replica_id in session.cursors if replica_id not in self._sessions]:
            del session.cursors[replica_id]
            yield _peer_gone(replica_id)
        for replica_id, other in list(self._sessions.items()):
            if replica_id == own or other.load.serial == 0:
                continue
            stream, serial = session.cursors.get(replica_id, (0, 0))
            if stream and stream != other.stream:
                yield _peer_gone(replica_id)
                serial = 0
            if serial != other.load.serial:
                session.cursors[replica_id] = (other.stream, other.load.serial)
                yield other.load.since(serial)

    def _wake_others(self, session: Session) -> None:
        for other in self._sessions.values():
            if other is not session:
                other.wake.set()

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


def _peer_gone(replica_id: str) -> bytes:
    return router_pb2.ReportResponse(peer_gone=router_pb2.PeerGone(replica_id=replica_id)).SerializeToString()
