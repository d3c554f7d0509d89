"""The agent process: joins the control plane, the shared memory, the relays and the admin port of one replica."""

import asyncio
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

import twofold
from router.agent.admin import AdminServer
from router.agent.commands import Commands
from router.agent.control_server import ControlServer
from router.agent.demand import DemandMeter
from router.agent.figures import AgentFigures, Parts
from router.agent.link import ControlPlaneLink, Credentials
from router.agent.load import LoadCollector, SlotMap
from router.agent.processes import process_series, replica_pids
from router.agent.profiles import ReplicaProfiles
from router.agent.publisher import Publisher
from router.agent.remote import RemoteLoad
from router.agent.reporter import Reporter
from router.agent.settings import AgentSettings
from router.agent.slots import SlotTable
from router.agent.store import SnapshotStore
from router.kvevents.service import KvEvents
from router.routing import table as tables
from router.routing.accounts import AccountsReader
from router.shm.exposition import CounterBook, SeriesValue, render
from router.shm.files import SharedMemoryError
from router.shm.heartbeat import Beat, ProcessState
from router.shm.layout import region_sizes, regions_of
from router.shm.replica import AGENT, Region, SharedReplica, agent_socket, writer_name
from twofold.model.fleet import FleetSnapshot, Slo
from twofold.runtime.monitor import RuntimeMonitor
from twofold.runtime.port import ProfilePort
from twofold.v1 import router_pb2 as pb

log = logging.getLogger(__name__)

BEAT_S = 0.25
BEAT_MAX_AGE_S = 2.0


class Agent:
    """One agent over one replica's shared memory. ``run`` until ``stop`` is called."""

    def __init__(self, settings: AgentSettings, credentials: Credentials, replica: SharedReplica) -> None:
        """Raises SharedMemoryError when the replica was laid out by another version."""
        if replica.sizes != region_sizes(replica.slots):
            raise SharedMemoryError("the replica was laid out by another version of Twofold")
        self._settings = settings
        self._replica = replica
        self._started_s = time.time()
        self._stopping = asyncio.Event()
        self.failed = False
        """Whether a job failed; then the exit code is not 0."""
        self._heartbeat = replica.heartbeat(AGENT)
        self._heartbeat.start(os.getpid(), time.monotonic())
        self._book = CounterBook(replica.directory)
        self._meter = DemandMeter()
        self._slot_map = SlotMap()
        self._source = "none"
        relays = [regions_of(replica, index) for index in range(replica.relays)]
        self._remote = RemoteLoad(regions_of(replica, AGENT), relays, peer_timeout_s=settings.peer_timeout_s)
        collector = LoadCollector(relays, [replica.region(i, Region.SENT) for i in range(replica.relays)])
        self._store = SnapshotStore(Path(settings.state_dir)) if settings.state_dir else None
        self._kv_events = KvEvents(
            replica.directory,
            replica.slots,
            max_blocks=settings.kv_index_blocks,
            max_blocks_per_s=settings.kv_events_per_s,
        )
        self._publisher = self._make_publisher(AccountsReader(tuple(regions.accounts for regions in relays)))
        self._control = ControlServer(agent_socket(replica.directory))
        commands = Commands(settings.replica_id, self._control, self._meter.top)
        self._socket = _admin_socket(settings)
        self._reporter = Reporter(
            hello=self._hello(),
            metadata=credentials.metadata,
            collector=collector,
            remote=self._remote,
            commands=commands,
            slots=lambda: self._slot_map,
            demand=lambda: self._meter.tick(self._slos()),
            tick_s=settings.tick_s,
            demand_interval_s=settings.demand_interval_s,
        )
        self._link = ControlPlaneLink(
            settings.replica_id,
            settings.control_plane,
            credentials,
            connect_timeout_s=settings.connect_timeout_s,
            silence_timeout_s=settings.silence_timeout_s,
            on_snapshot=self._on_snapshot,
            beside=self._reporter.run,
            rng=random.Random(),
        )
        self._monitor = RuntimeMonitor()
        self._slab = replica.counters("agent")
        parts = Parts(
            link=self._link,
            reporter=self._reporter,
            collector=collector,
            remote=self._remote,
            publisher=self._publisher,
            commands=commands,
            control=self._control,
            relays=lambda: len(self._fresh_relays()),
        )
        self._figures = AgentFigures(self._slab, parts, self._monitor)
        profiles = ReplicaProfiles(self._control)
        self._admin = AdminServer(
            metrics=self._metrics,
            ready=self.missing,
            state=self.state,
            commands=commands,
            profiles=ProfilePort(
                profiles.record, profiles.processes, enabled=settings.debug_profile, token=credentials.token
            ),
        )

    def _make_publisher(self, accounts: AccountsReader) -> Publisher:
        settings, replica = self._settings, self._replica
        ledger = replica.region(AGENT, Region.SLOTS)
        self._recovered = _recover_table(replica)
        slots = SlotTable(
            replica.slots,
            quarantine_s=settings.slot_quarantine_s,
            assigned=self._recovered[0].slots if self._recovered else None,
            high_water=ledger.cast("Q")[0],
            now_s=time.monotonic(),
        )
        return Publisher(
            replica.board,
            slots,
            accounts,
            self._store,
            settle_s=settings.settle_s,
            on_published=self._on_published,
            ledger=ledger,
        )

    def stop(self) -> None:
        """Ask ``run`` to end. Idempotent."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until ``stop``."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        if self._recovered is not None:
            table, rings = self._recovered
            self._remote.recover(time.monotonic())
            self._publisher.adopt(table, rings)
            self._link.resume_from(table.snapshot)
            self._source = "shared memory"
            log.info("attached to a running replica", extra={"targets": len(table.slots)})
        self._monitor.watch_collector()
        async with self._control:
            await self._admin.start(self._socket)
            jobs = [
                self._start(self._publisher.run(), "publish"),
                self._start(self._link.run(), "link"),
                self._start(self._keep_house(), "house"),
                self._start(self._kv_events.run(), "kv-events"),
                self._start(self._monitor.watch_loop(), "lag"),
                self._start(self._sample(), "sample"),
                self._start(self._fall_back_to_disk(), "disk"),
            ]
            log.info(
                "agent runs",
                extra={"relays": self._replica.relays, "control_planes": len(self._settings.control_plane)},
            )
            try:
                await self._stopping.wait()
            finally:
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)
                await self._admin.stop()
        self._heartbeat.beat(time.monotonic(), ProcessState.STOPPED, self._replica.board.version, 0)
        self._monitor.close()
        self._book.close()
        self._slab.close()
        log.info("agent stopped")

    def _start(self, job: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A job that is to run for ever; should it fail, the agent ends and the launcher starts a new one."""
        task = asyncio.get_running_loop().create_task(job, name=name)

        def ended(done: asyncio.Task[None]) -> None:
            if done.cancelled() and self._stopping.is_set():
                return
            if done.cancelled() or done.exception() is not None:
                error = None if done.cancelled() else done.exception()
                log.critical("agent job failed", exc_info=error, extra={"job": name})
                self.failed = True
                self.stop()

        task.add_done_callback(ended)
        return task

    def _hello(self) -> pb.RouterHello:
        settings = self._settings
        host, port = self._socket.getsockname()[:2]
        return pb.RouterHello(
            replica_id=settings.replica_id,
            version=twofold.__version__,
            admin_address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            serving_url=settings.serving_url,
            relays=self._replica.relays,
            started_s=self._started_s,
        )

    def _on_snapshot(self, snapshot: FleetSnapshot) -> None:
        self._source = "control plane"
        self._publisher.offer(snapshot)

    def _on_published(self, slots: SlotMap, fresh: frozenset[int]) -> None:
        self._slot_map = slots
        self._remote.place(slots, fresh, time.monotonic())
        if self._publisher.table is not None:
            self._kv_events.set_table(self._publisher.table)

    def _slos(self) -> Mapping[str, Slo]:
        table = self._publisher.table
        return {pool.name: pool.slo for pool in table.snapshot.pools} if table is not None else {}

    async def _fall_back_to_disk(self) -> None:
        """Serve from the snapshot on disk when neither an earlier agent nor the control plane gave one in time."""
        if self._store is None or self._recovered is not None:
            return
        await asyncio.sleep(self._settings.disk_snapshot_after_s if self._settings.control_plane else 0.0)
        if self._link.snapshot is not None:
            return
        stored = await asyncio.to_thread(self._store.load)
        if stored is None or self._link.snapshot is not None:
            return
        self._source = "disk"
        self._publisher.offer(stored.snapshot)
        age_s = round(max(0.0, time.time() - stored.saved_s), 1)
        log.warning("control plane not reachable, serving the stored snapshot", extra={"age_s": age_s})

    async def _keep_house(self) -> None:
        while True:
            now_s = time.monotonic()
            self._heartbeat.beat(now_s, ProcessState.SERVING, self._replica.board.version, 0)
            self._figures.flush(now_s)
            for name in self._remote.expire(now_s):
                log.warning("replica is silent, its load is forgotten", extra={"peer": name})
            await asyncio.sleep(BEAT_S)

    async def _sample(self) -> None:
        while True:
            self._meter.add(self._totals(), time.monotonic())
            await asyncio.sleep(self._settings.demand_interval_s / 2)

    def _totals(self) -> list[SeriesValue]:
        now_s = time.monotonic()
        dead = {name for name, beat in self._beats().items() if not beat.is_fresh(now_s, BEAT_MAX_AGE_S)}
        return self._book.totals(dead)

    def _beats(self) -> dict[str, Beat]:
        return {writer_name(index): self._replica.heartbeat(index).read() for index in range(self._replica.relays)}

    def _fresh_relays(self) -> dict[str, Beat]:
        now_s = time.monotonic()
        return {name: beat for name, beat in self._beats().items() if beat.is_fresh(now_s, BEAT_MAX_AGE_S)}

    def _usable_targets(self) -> int:
        """Targets that take work in the table that every live relay has installed."""
        table, relays = self._publisher.table, self._fresh_relays()
        version = self._replica.board.version
        if table is None or not relays or any(beat.snapshot_version != version for beat in relays.values()):
            return 0
        return sum(target.takes_work for target in table.snapshot.targets)

    def missing(self) -> str:
        """What keeps the replica from serving; "" when nothing does."""
        if self._replica.board.version == 0:
            return "no snapshot yet"
        relays = self._fresh_relays().values()
        if not any(beat.state is ProcessState.SERVING for beat in relays):
            return "no relay serves"
        table = self._publisher.table
        if table is None or not any(target.takes_work for target in table.snapshot.targets):
            return "no usable worker"
        return ""

    def state(self) -> dict[str, Any]:
        """A look inside, as JSON. Keys are documented in docs/replica.md; no prompts, no secrets."""
        now_s = time.monotonic()
        table = self._publisher.table
        held = self._link.snapshot
        return {
            "replica_id": self._settings.replica_id,
            "pid": os.getpid(),
            "started_s": self._started_s,
            "ready": not self.missing(),
            "usable_targets": self._usable_targets(),
            "source": self._source,
            "control_plane": {
                "address": self._link.address,
                "connected": self._link.connected,
                "reporting": self._reporter.connected,
                "reconnects": self._link.reconnects,
            },
            "received": {"epoch": held.epoch, "version": held.version} if held is not None else None,
            "snapshot": {
                "epoch": table.snapshot.epoch,
                "version": table.snapshot.version,
                "policy": table.snapshot.policy.name,
                "targets": len(table.slots),
                "pools": {ring.pool: {"ring_version": ring.version, "members": ring.members} for ring in table.rings},
            }
            if table is not None
            else None,
            "board_version": self._replica.board.version,
            "slots": {"size": self._replica.slots, "missing": list(self._publisher.without_slot[:20])},
            "relays": {name: _beat_state(beat, now_s) for name, beat in self._beats().items()},
            "control_channel": self._control.relays,
            "peers": {name: {"age_s": round(now_s - seen_s, 3)} for name, seen_s in self._remote.peers.items()},
            "queues": {"report": self._reporter.queued},
            "kv_events": self._kv_events.state(),
        }

    def _metrics(self) -> str:
        totals = self._totals()
        beats = self._fresh_relays()
        pids = replica_pids({name: beat.pid for name, beat in beats.items()})
        series = [*totals, *process_series(pids), *self._figures.series(), *self._kv_events.series()]
        return render(sorted(series, key=lambda item: (item.family.name, item.values)), self._book.families())


def _beat_state(beat: Beat, now_s: float) -> dict[str, Any]:
    return {
        "pid": beat.pid,
        "state": beat.state.name.lower(),
        "snapshot_version": beat.snapshot_version,
        "inflight": beat.inflight,
        "beat_age_s": round(now_s - beat.beat_s, 3) if beat.pid else None,
        "uptime_s": round(now_s - beat.started_s, 1) if beat.pid else None,
    }


def _recover_table(replica: SharedReplica) -> tuple[tables.RoutingTable, bytes] | None:
    """What an earlier agent published, if anything usable."""
    try:
        published = replica.board.read()
        return (tables.decode(published[1]), bytes(published[2])) if published is not None else None
    except (SharedMemoryError, msgspec.MsgspecError) as error:
        log.error("published table cannot be used", extra={"reason": str(error)})
        return None


def _admin_socket(settings: AgentSettings) -> socket.socket:
    if settings.admin_fd >= 0:
        sock = socket.socket(fileno=settings.admin_fd)
        sock.setblocking(False)
        return sock
    family = socket.AF_INET6 if ":" in settings.admin_host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((settings.admin_host, settings.admin_port))
    return sock
