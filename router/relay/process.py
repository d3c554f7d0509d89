"""A relay process: attaches to its replica's shared memory, serves its listening socket, stops gracefully."""

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from pathlib import Path

import msgspec

import twofold
from router.http.server import HttpServer
from router.relay.context import RelayContext
from router.relay.control import ControlClient
from router.relay.fleet import RelayFleet
from router.relay.service import RelayService
from router.relay.settings import RelaySettings
from router.relay.usage import RelayUsage
from router.routing.live import LiveFleet
from router.shm.files import SharedMemoryError
from router.shm.heartbeat import ProcessState
from router.shm.kv_file import KvIndexFile
from router.shm.layout import clear_accounts, region_sizes, relay_buffers
from router.shm.replica import SharedReplica, agent_socket
from router.telemetry.metrics import RelayMetrics
from router.telemetry.runtime import RuntimeSeries
from twofold.runtime.monitor import RuntimeMonitor

log = logging.getLogger(__name__)

TICK_S = 0.02
SWEEP_TICKS = 5
HOUSEKEEPING_TICKS = 50
FLUSH_S = 1.0
"""After the grace period, time for error events to leave."""
SEQUENCE_STRIDE = 7919


class RelayProcess:
    """One relay over one replica's shared memory."""

    def __init__(self, settings: RelaySettings, replica: SharedReplica) -> None:
        if replica.sizes != region_sizes(replica.slots):
            raise SharedMemoryError("the replica was laid out by another version of Twofold")
        self.settings = settings
        self._replica = replica
        self._heartbeat = replica.heartbeat(settings.index)
        self._heartbeat.start(os.getpid(), time.monotonic())
        cleared = clear_accounts(replica, settings.index, time.monotonic())
        if cleared:
            log.warning("cleared the accounts of an earlier life", extra={"slots": cleared})
        fleet = RelayFleet(LiveFleet(relay_buffers(replica, settings.index)), worker_id_key=settings.worker_id_key)
        metrics = RelayMetrics(replica.counters(f"relay-{settings.index}"))
        self.context = RelayContext(settings, fleet, metrics, clock=time.monotonic, wall_clock=time.time)
        self.service = RelayService(
            self.context,
            version=twofold.__version__,
            sequence_offset=int.from_bytes(os.urandom(2), "little") + settings.index * SEQUENCE_STRIDE,
        )
        self.http = HttpServer(self.service, settings.http_limits(), self.context.budget)
        self._monitor = RuntimeMonitor()
        self._runtime = RuntimeSeries(metrics.slab, f"relay-{settings.index}", self._monitor)
        self._usage: RelayUsage | None = None
        self._due_s = 0.0
        self._state = ProcessState.STARTING
        self._board_version = 0
        self._ticks = 0
        self._kv_index = KvIndexFile(replica.directory)
        self._stopping: asyncio.Event | None = None
        self._grace_s = settings.grace_s

    async def run(self, listener: socket.socket) -> None:
        """Serve until asked to stop, then until the last stream ended or the grace period did."""
        loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, self.settings.grace_s)
        self._reload()
        self._monitor.watch_collector()
        self._usage = RelayUsage(self.context.metrics.slab, self.context, listener)
        server = await loop.create_server(self.http, sock=listener, backlog=4096)
        self._state = ProcessState.SERVING
        control = loop.create_task(self._control().run())
        self._tick()
        log.info("relay serving", extra={"relay": self.settings.index, "snapshot": self._board_version})
        try:
            await self._stopping.wait()
            server.close()
            await self._drain()
        finally:
            control.cancel()
            self._state = ProcessState.STOPPED
            self._beat()
            self._flush()
            self._monitor.close()
            self.context.upstream.close()
            self.context.exact.close()
        log.info("relay stopped", extra={"relay": self.settings.index})

    def stop(self, grace_s: float) -> None:
        """Ask for a graceful stop; streams may run on for ``grace_s``. Idempotent."""
        self._grace_s = grace_s
        if self._stopping is not None:
            self._stopping.set()

    def _control(self) -> ControlClient:
        return ControlClient(
            agent_socket(Path(self.settings.replica_dir)),
            relay=self.settings.index,
            context=self.context,
            service=self.service,
            stop=self.stop,
        )

    async def _drain(self) -> None:
        self._state = ProcessState.DRAINING
        self.service.draining = True
        self.http.drain()
        log.info("relay draining", extra={"requests": len(self.context.exchanges), "grace_s": self._grace_s})
        await self._until_idle(self._grace_s)
        for exchange in list(self.context.exchanges):
            exchange.stop()
        await self._until_idle(FLUSH_S)
        for connection in list(self.http.connections):
            connection.abort()

    async def _until_idle(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while self.http.connections and time.monotonic() < deadline_s:
            await asyncio.sleep(TICK_S)

    def _tick(self) -> None:
        """The relay's one timer: snapshots, watchdogs, heartbeat."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if self._due_s:
            self._monitor.late(now_s - self._due_s, now_s)
        self._due_s = now_s + TICK_S
        loop.call_later(TICK_S, self._tick)
        self._ticks += 1
        if self._replica.board.version != self._board_version:
            self._reload()
        if self._ticks % SWEEP_TICKS == 0:
            now_s = time.monotonic()
            if self.context.exact:
                self._kv_index.refresh(now_s)
                self.context.fleet.show_caches(self._kv_index.reader)
            elif self.context.fleet.kv is not None:
                self.context.fleet.show_caches(None)
            for exchange in list(self.context.exchanges):
                exchange.check(now_s)
            self.http.sweep(now_s)
            self._beat()
        if self._ticks % HOUSEKEEPING_TICKS == 0:
            self.context.upstream.sweep(time.monotonic())
            self._flush()

    def _flush(self) -> None:
        """Bring the figures that are not counted as they happen into shared memory."""
        self._runtime.flush(time.monotonic())
        if self._usage is not None:
            self._usage.flush()

    def _reload(self) -> None:
        """Take the published snapshot; a damaged one is passed over and the last good one stays in force."""
        try:
            published = self._replica.board.read()
            if published is None:
                return
            version, table, rings = published
            self._board_version = version
            self.context.fleet.install(table, rings)
            self.context.exact.install(self.context.fleet.live.snapshot)
        except (SharedMemoryError, msgspec.MsgspecError, ValueError, LookupError) as error:
            log.error("cannot take the published snapshot", extra={"cause": str(error)})
            return
        self.context.upstream.keep_only(self.context.fleet.addresses())

    def _beat(self) -> None:
        metrics = self.context.metrics
        metrics.slab.set(metrics.connections, float(len(self.http.connections)))
        self._heartbeat.beat(time.monotonic(), self._state, self._board_version, len(self.context.exchanges))


def serve(settings: RelaySettings, listener: socket.socket) -> None:
    """Run a relay to its end on a fresh uvloop event loop. Raises SharedMemoryError when it cannot attach."""
    import uvloop

    replica = SharedReplica.attach(Path(settings.replica_dir), writer=settings.index)
    process = RelayProcess(settings, replica)
    # What lives now lives for good; requests make few cycles, so the collector may come rarely.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    try:
        uvloop.run(process.run(listener))
    finally:
        replica.close()
