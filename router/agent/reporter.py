"""The report stream: load of this replica up every 20 ms, demand every second, results; peers and commands down."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from router.agent.commands import Commands
from router.agent.link import LinkError, Metadata
from router.agent.load import LoadCollector, SlotMap, Tick
from router.agent.remote import News, RemoteLoad, Row
from twofold.runtime.monitor import WindowMax
from twofold.v1 import router_pb2 as pb
from twofold.v1 import router_pb2_grpc

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
"""A tick goes out at least this often, changed or not: peers forget who is silent."""
WRITE_TIMEOUT_S = 5.0
MAX_QUEUED = 256
_UINT32_MAX = (1 << 32) - 1
_AMOUNT_MAX = 1e15


class Reporter:
    """Runs one report stream after another. ``slots`` gives the present slot map, ``demand`` the next demand tick."""

    def __init__(
        self,
        *,
        hello: pb.RouterHello,
        metadata: Metadata,
        collector: LoadCollector,
        remote: RemoteLoad,
        commands: Commands,
        slots: Callable[[], SlotMap],
        demand: Callable[[], pb.DemandTick],
        tick_s: float,
        demand_interval_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hello = hello
        self._metadata = metadata
        self._collector = collector
        self._remote = remote
        self._commands = commands
        self._slots = slots
        self._demand = demand
        self._tick_s = tick_s
        self._demand_interval_s = demand_interval_s
        self._monotonic = monotonic
        self._queue: deque[pb.ReportRequest] = deque(maxlen=MAX_QUEUED)
        self._tasks: set[asyncio.Task[None]] = set()
        self.dropped = 0
        """Answers that made room for later ones."""
        self.late_max = WindowMax()
        """How late ticks were."""
        self.ticks_sent = 0
        self.ticks_received = 0
        self.connected = False

    @property
    def queued(self) -> int:
        """Messages that wait to be sent."""
        return len(self._queue)

    async def run(self, channel: grpc.aio.Channel) -> None:
        """One report stream, until it ends. Raises grpc.aio.AioRpcError or LinkError when it fails."""
        stub: Any = router_pb2_grpc.RouterServiceStub(channel)
        call = stub.Report(metadata=self._metadata)
        reader: asyncio.Task[None] | None = None
        try:
            await self._write(call, pb.ReportRequest(hello=self._hello))
            self._collector.restart()
            reader = asyncio.create_task(self._read(call), name="report-read")
            self.connected = True
            await self._send(call, reader)
        finally:
            self.connected = False
            call.cancel()
            for task in (*self._tasks, *([reader] if reader else [])):
                task.cancel()
            await asyncio.gather(*self._tasks, *([reader] if reader else []), return_exceptions=True)
            self._queue.clear()

    async def _send(self, call: Any, reader: asyncio.Task[None]) -> None:
        sequence = 0
        now_s = self._monotonic()
        next_tick_s, heartbeat_s, next_demand_s = now_s, now_s, now_s + self._demand_interval_s
        while not reader.done():
            now_s = self._monotonic()
            self.late_max.add(now_s - next_tick_s, now_s)
            slots = self._slots()
            tick = self._collector.collect(slots)
            if tick.rows or tick.prefixes or now_s >= heartbeat_s:
                sequence += 1
                await self._write(call, pb.ReportRequest(load=tick_to_proto(tick, slots.epoch, sequence)))
                self.ticks_sent += 1
                heartbeat_s = now_s + HEARTBEAT_S
            if now_s >= next_demand_s:
                await self._write(call, pb.ReportRequest(demand=self._demand()))
                next_demand_s = max(next_demand_s + self._demand_interval_s, now_s)
            while self._queue:
                await self._write(call, self._queue.popleft())
            next_tick_s = max(next_tick_s + self._tick_s, now_s)
            await asyncio.sleep(max(0.0, next_tick_s - self._monotonic()))
        await reader

    async def _write(self, call: Any, message: pb.ReportRequest) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await call.write(message)
        except TimeoutError:
            raise LinkError(f"the control plane took no message for {WRITE_TIMEOUT_S:g} s") from None
        except asyncio.InvalidStateError:
            # The call is over; its status says why.
            code = await call.code()
            raise LinkError(f"{code.name}: {(await call.details() or '')[:200]}") from None

    async def _read(self, call: Any) -> None:
        async for response in call:
            for gone in response.gone:
                self._remote.forget_peer(gone.replica_id, self._monotonic())
            for peer in response.peers:
                self._receive(peer)
            if response.HasField("command"):
                self._start_command(response.command)

    def _receive(self, peer: pb.PeerLoad) -> None:
        if peer.replica_id == self._hello.replica_id:
            return
        news = news_from_proto(peer.load)
        if news is None:
            log.warning("load of a replica makes no sense", extra={"peer": peer.replica_id[:128]})
            return
        self.ticks_received += 1
        now_s = self._monotonic()
        self._remote.receive(peer.replica_id, peer.load.epoch, news, self._slots(), now_s, full=peer.full)

    def _start_command(self, command: pb.RouterCommand) -> None:
        async def answer() -> None:
            result = await self._commands.run(command)
            self.dropped += len(self._queue) == MAX_QUEUED
            self._queue.append(pb.ReportRequest(result=result))

        task = asyncio.create_task(answer(), name="command")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def tick_to_proto(tick: Tick, epoch: int, sequence: int) -> pb.LoadTick:
    """A tick as a message."""
    rows = [row for _, row in tick.rows]
    return pb.LoadTick(
        epoch=epoch,
        sequence=sequence,
        ordinals=[ordinal for ordinal, _ in tick.rows],
        inflight=[_uint32(row.inflight) for row in rows],
        decodes=[_uint32(row.decodes) for row in rows],
        queued_prefill_tokens=[row.queued_prefill_tokens for row in rows],
        queued_prefill_s=[row.queued_prefill_s for row in rows],
        kv_tokens=[row.kv_tokens for row in rows],
        stored_tokens=[row.stored_tokens for row in rows],
        failures=[_uint32(row.failures) for row in rows],
        prefixes=[pb.SentPrefix(ordinal=ordinal, hashes=hashes) for ordinal, hashes in tick.prefixes],
    )


def news_from_proto(message: pb.LoadTick) -> News | None:
    """What a tick says, with senseless figures made harmless; None when its arrays differ in length."""
    rows: list[tuple[int, Row]] = []
    columns = zip(
        message.ordinals,
        message.inflight,
        message.decodes,
        message.queued_prefill_tokens,
        message.queued_prefill_s,
        message.kv_tokens,
        message.stored_tokens,
        message.failures,
        strict=True,
    )
    most = _AMOUNT_MAX
    try:
        for ordinal, inflight, decodes, tokens, seconds, kv_tokens, stored, failures in columns:
            if not (
                decodes <= inflight
                and 0.0 <= tokens < most
                and 0.0 <= seconds < most
                and 0.0 <= kv_tokens < most
                and 0.0 <= stored < most
            ):
                decodes = min(decodes, inflight)
                tokens, seconds, kv_tokens, stored = map(_amount, (tokens, seconds, kv_tokens, stored))
            rows.append((ordinal, (inflight, decodes, tokens, seconds, kv_tokens, stored, failures)))
    except ValueError:
        return None
    return News(rows, [(prefix.ordinal, prefix.hashes[:]) for prefix in message.prefixes])


def _uint32(value: int) -> int:
    return min(max(value, 0), _UINT32_MAX)


def _amount(value: float) -> float:
    """A figure of another process as a finite amount that is not negative."""
    return value if 0.0 <= value < _AMOUNT_MAX else 0.0
