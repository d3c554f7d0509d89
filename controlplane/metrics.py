"""Prometheus metrics of the control plane, read from its objects when scraped, and the metrics port."""

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Iterator

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controlplane import bounds
from controlplane.app import ControlPlane
from controlplane.bounds import PREFIX
from controlplane.bounds import counter as _counter
from controlplane.bounds import gauge as _gauge
from twofold.model.fleet import Health
from twofold.model.reasons import TargetCondition
from twofold.runtime import sampler
from twofold.runtime.monitor import RuntimeMonitor
from twofold.runtime.port import PATH, ProfilePort, Wanted


class ControlPlaneCollector(Collector):
    """Turns the state of a ControlPlane into metric families. Labels: pool, health, condition, profile, outcome."""

    def __init__(self, control_plane: ControlPlane, monitor: RuntimeMonitor) -> None:
        self._control_plane = control_plane
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._fleet()
        yield from self._routers()
        yield from self._work()
        yield from bounds.bounds(self._control_plane)
        yield from bounds.runtime(self._monitor)

    def _fleet(self) -> Iterator[Metric]:
        core = self._control_plane.core
        snapshot = core.snapshot
        targets = GaugeMetricFamily(PREFIX + "targets", "Targets by pool and health", labels=["pool", "health"])
        found = Counter((target.pool, target.health) for target in snapshot.targets)
        for pool in snapshot.pools:
            for health in Health:
                targets.add_metric([pool.name, health.value], found[(pool.name, health)])
        yield targets
        conditions = GaugeMetricFamily(
            PREFIX + "target_conditions", "Targets with a condition", labels=["pool", "condition"]
        )
        held = Counter((target.pool, condition) for target in snapshot.targets for condition in target.conditions)
        for pool in snapshot.pools:
            for condition in TargetCondition:
                conditions.add_metric([pool.name, condition.value], held[(pool.name, condition)])
        yield conditions
        cordoned = GaugeMetricFamily(PREFIX + "targets_cordoned", "Targets cordoned or draining", labels=["pool"])
        for pool in snapshot.pools:
            count = sum(t.cordoned or t.draining for t in snapshot.targets if t.pool == pool.name)
            cordoned.add_metric([pool.name], count)
        yield cordoned
        yield _gauge("snapshot_epoch", "Epoch of the present snapshot", snapshot.epoch)
        yield _gauge("snapshot_version", "Version of the present snapshot", snapshot.version)
        yield _gauge("warm", "1 once routers are given snapshots", core.warm)
        yield _counter("batches", "Batches of events reduced", core.batches)
        yield _counter("events", "Events reduced", core.events)
        watch = self._control_plane.watch
        yield _gauge("fleet_file_valid", "0 while a changed fleet file is bad and the old one stays", not watch.fault)
        yield _counter("fleet_file_reloads", "Fleet files taken over", watch.reloads)

    def _routers(self) -> Iterator[Metric]:
        hub, feed = self._control_plane.hub, self._control_plane.core.feed
        yield _gauge("routers_connected", "Router replicas with an open Report stream", len(hub.connected()))
        yield _gauge("watchers", "Open Watch streams", feed.readers)
        yield _counter("load_ticks", "Load ticks received", hub.ticks)
        yield _counter("load_ticks_stale", "Load ticks of another epoch, dropped", hub.stale_ticks)
        yield _counter("load_messages_sent", "Load messages passed on to other replicas", hub.sent)
        yield _counter("snapshots_sent", "Whole snapshots sent to routers", feed.snapshots_sent)
        yield _counter("deltas_sent", "Deltas sent to routers", feed.deltas_sent)
        yield _gauge("leases", "Registered workers", len(self._control_plane.leases))

    def _work(self) -> Iterator[Metric]:
        probes = CounterMetricFamily(PREFIX + "probes", "Probes by outcome", labels=["outcome"])
        for outcome, count in self._control_plane.probe_counts.items():
            probes.add_metric([outcome.value], count)
        yield probes
        yield _counter("probe_seconds", "Time spent waiting for probes", self._control_plane.probe_seconds)
        labels = ["pool", "profile", "zone"]
        families = {
            name: GaugeMetricFamily(PREFIX + f"workers_{name}", help_text, labels=labels)
            for name, help_text in (
                ("desired", "Workers that should run here"),
                ("running", "Workers whose process runs"),
                ("ready", "Workers that take work"),
                ("restarting", "Workers waiting to be started again"),
            )
        }
        for status in self._control_plane.provider.status():
            key = list(status.desired.key)
            families["desired"].add_metric(key, status.desired.replicas)
            families["running"].add_metric(key, status.running)
            families["ready"].add_metric(key, status.ready)
            families["restarting"].add_metric(key, status.restarting)
        yield from families.values()
        yield _counter("store_failures", "Failed writes of stored state", self._control_plane.store_faults)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        yield _counter("cpu_seconds", "CPU time of this process", usage.ru_utime + usage.ru_stime)
        yield _gauge("max_resident_bytes", "Most memory this process held", usage.ru_maxrss * 1024)
        yield _gauge("start_time_seconds", "When it started, since the Unix epoch", self._control_plane.started_s)


async def _record(wanted: Wanted) -> sampler.Profile:
    return await sampler.record(wanted.process, seconds=wanted.seconds, hz=wanted.hz, clock=wanted.clock)


class MetricsPort:
    """HTTP: /metrics for Prometheus, /healthz (200 once routers are given snapshots, else 503), and with
    ``debug_profile`` /debug/profile for clients on this host or with ``token``."""

    def __init__(self, control_plane: ControlPlane, *, debug_profile: bool = False, token: str = "") -> None:
        self._control_plane = control_plane
        self._profiles = ProfilePort(_record, lambda: ("controlplane",), enabled=debug_profile, token=token)
        self._registry = CollectorRegistry()
        self._monitor = RuntimeMonitor()
        self._watching: asyncio.Task[None] | None = None
        self._registry.register(ControlPlaneCollector(control_plane, self._monitor))
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError."""
        app = web.Application(client_max_size=1024)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get(PATH, self._profiles.get)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._monitor.watch_collector()
        self._watching = asyncio.create_task(self._monitor.watch_loop(), name="lag")

    async def stop(self) -> None:
        """Stop listening."""
        self._monitor.close()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"content-type": CONTENT_TYPE_LATEST})

    async def _healthz(self, request: web.Request) -> web.Response:
        core = self._control_plane.core
        state = {
            "ready": core.warm,
            "epoch": core.epoch,
            "version": core.snapshot.version,
            "uptime_s": round(time.time() - self._control_plane.started_s, 1),
            "fleet_file": self._control_plane.watch.fault or "ok",
        }
        return web.json_response(state, status=200 if core.warm else 503)
