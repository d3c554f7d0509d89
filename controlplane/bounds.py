"""Metrics of the control plane's queues and bounds, of its event loop and its garbage collector."""

import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from controlplane.app import ControlPlane
from controlplane.core import MAX_PENDING
from controlplane.discovery.leases import MAX_LEASES
from controlplane.feed import HISTORY
from controlplane.fleet.state import MAX_CONTROLS, MAX_LOGS, MAX_REPLICAS
from controlplane.probes.prober import MAX_CONCURRENT
from controlplane.routers.hub import MAX_COMMANDS
from controlplane.routers.hub import MAX_REPLICAS as MAX_SESSIONS
from twofold.runtime.monitor import LAG_BOUNDS_S, RuntimeMonitor

PREFIX = "twofold_controlplane_"
BOUNDS = {
    "commands": MAX_COMMANDS,
    "controls": MAX_CONTROLS,
    "events": MAX_PENDING,
    "history": HISTORY,
    "leases": MAX_LEASES,
    "logs": MAX_LOGS,
    "probes": MAX_CONCURRENT,
    "replicas": MAX_REPLICAS,
    "sessions": MAX_SESSIONS,
}


def bounds(control_plane: ControlPlane) -> Iterator[Metric]:
    """How full what is bounded is, and what was refused or merged."""
    now_s = time.monotonic()
    core, hub, leases, prober = control_plane.core, control_plane.hub, control_plane.leases, control_plane.prober
    feed, state = core.feed, core.state
    yield gauge("events_pending", "Events that wait for the next batch", core.pending)
    yield gauge("batch_events_max", "Largest batch of the last 10 to 20 seconds", core.batch_max.get(now_s))
    yield counter("reduce_seconds", "Time to reduce events and build snapshots", core.reduce_s)
    yield gauge("reduce_max_seconds", "Longest batch of the last 10 to 20 seconds", core.reduce_max.get(now_s))
    yield counter("watch_versions_merged", "Versions that a watcher was sent together with a later one", feed.merged)
    yield gauge("watch_history", "Snapshots kept for deltas", feed.kept)
    yield counter("encode_seconds", "Time to encode snapshots and deltas", feed.encode_s)
    yield gauge("encode_max_seconds", "Longest encoding of the last 10 to 20 seconds", feed.encode_max.get(now_s))
    yield gauge("snapshot_bytes", "Size of the whole snapshot encoded last", feed.snapshot_bytes)
    yield counter("load_rounds", "Rounds in which load was passed on", hub.rounds)
    yield counter("load_merges", "Times that a router was behind and was sent merged loads", hub.merges)
    yield gauge("commands_pending", "Commands that routers have not answered", hub.pending_commands)
    yield gauge("probes_running", "Probes under way", prober.running if prober is not None else 0)
    late_s = prober.late_max.get(now_s) if prober is not None else 0.0
    yield gauge("probe_late_max_seconds", "Latest start of a probe in the last 10 to 20 seconds", late_s)
    yield counter("leases_expired", "Leases that ran out", leases.expired)
    entries = GaugeMetricFamily(PREFIX + "state_entries", "Entries of the fleet's state by kind", labels=["kind"])
    for kind, count in (
        ("controls", len(state.controls)),
        ("logs", len(state.logs)),
        ("replicas", len(state.replicas)),
        ("workers", len(state.workers)),
    ):
        entries.add_metric([kind], count)
    yield entries
    hits = CounterMetricFamily(PREFIX + "limit_hits", "Times that a bound was reached, by bound", labels=["limit"])
    for limit, count in (
        ("commands", hub.refused_commands),
        ("events", core.dropped),
        ("leases", leases.refused),
        ("probes", prober.deferred if prober is not None else 0),
        ("sessions", hub.refused_sessions),
    ):
        hits.add_metric([limit], count)
    yield hits
    limits = GaugeMetricFamily(PREFIX + "bound", "Bounds by name", labels=["limit"])
    for limit, bound in BOUNDS.items():
        limits.add_metric([limit], bound)
    yield limits


def runtime(monitor: RuntimeMonitor) -> Iterator[Metric]:
    """Lag of the event loop, pauses of the collector, open files."""
    now_s = time.monotonic()
    names = [*map(floatToGoString, LAG_BOUNDS_S), "+Inf"]
    buckets = list(zip(names, accumulate(monitor.lag_counts), strict=True))
    lag = HistogramMetricFamily(PREFIX + "loop_lag_seconds", "How late timers of the event loop fire")
    lag.add_metric([], buckets=buckets, sum_value=monitor.lag_sum_s)
    yield lag
    yield gauge("loop_lag_max_seconds", "Latest timer of the last 10 to 20 seconds", monitor.lag_max.get(now_s))
    collections = CounterMetricFamily(PREFIX + "gc_collections", "Garbage collections", labels=["generation"])
    pauses = CounterMetricFamily(PREFIX + "gc_pause_seconds", "Time in garbage collections", labels=["generation"])
    for generation, (count, pause_s) in enumerate(zip(monitor.collections, monitor.pause_s, strict=True)):
        collections.add_metric([str(generation)], count)
        pauses.add_metric([str(generation)], pause_s)
    yield collections
    yield pauses
    yield gauge("gc_pause_max_seconds", "Longest collection of the last 10 to 20 seconds", monitor.pause_max.get(now_s))
    yield gauge("open_fds", "Open file descriptors", sum(1 for _ in Path("/proc/self/fd").glob("*")))


def gauge(name: str, help_text: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(PREFIX + name, help_text, value=float(value))


def counter(name: str, help_text: str, value: float) -> Metric:
    """A counter without labels; ``_total`` is added to its name."""
    return CounterMetricFamily(PREFIX + name, help_text, value=float(value))
