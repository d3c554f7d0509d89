"""What the agent itself adds to the metrics of its replica: its queues, its bounds, its view of the fleet."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from router.agent.commands import MAX_RUNNING, Commands
from router.agent.control_server import ControlServer
from router.agent.link import ControlPlaneLink
from router.agent.load import LoadCollector
from router.agent.publisher import Publisher
from router.agent.remote import MAX_PEERS, RemoteLoad
from router.agent.reporter import MAX_QUEUED, Reporter
from router.shm.counters import CounterSlab, FamilyLine
from router.shm.exposition import SeriesValue
from router.telemetry.runtime import Flow, RuntimeSeries
from twofold.runtime.monitor import RuntimeMonitor

PREFIX = "twofold_"
_NETSTAT = Path("/proc/net/netstat")


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of an agent that have figures. ``relays`` gives the number of relays that beat."""

    link: ControlPlaneLink
    reporter: Reporter
    collector: LoadCollector
    remote: RemoteLoad
    publisher: Publisher
    commands: Commands
    control: ControlServer
    relays: Callable[[], int]


class AgentFigures:
    """Series of the agent. ``flush`` about once a second keeps those that live in shared memory up to date."""

    def __init__(self, slab: CounterSlab, parts: Parts, monitor: RuntimeMonitor) -> None:
        self._parts = parts
        self._runtime = RuntimeSeries(slab, "agent", monitor)
        counter = slab.counter
        # Names that relays have too: shared memory adds them up.
        self._rescans = Flow(
            slab, counter("twofold_dirty_log_rescans_total", "Times a log of changed slots had moved on too far").cell()
        )
        self._evictions = Flow(
            slab, counter("twofold_prefix_evictions_total", "Entries of prefix tables that made room for others").cell()
        )

    def flush(self, now_s: float) -> None:
        """Bring shared memory up to ``now_s`` (monotonic)."""
        self._runtime.flush(now_s)
        self._rescans.to(self._parts.collector.overruns[0])
        self._evictions.to(self._parts.remote.prefix_evictions)

    def series(self) -> list[SeriesValue]:
        """What is read from the agent's objects now."""
        return [*self._fleet(), *self._queues(), *self._slots()]

    def _fleet(self) -> Iterator[SeriesValue]:
        parts = self._parts
        publisher, link, reporter = parts.publisher, parts.link, parts.reporter
        table = publisher.table
        targets = table.snapshot.targets if table is not None else ()
        yield _gauge("relays", "Relay processes that beat", parts.relays())
        yield _gauge("control_plane_connected", "Whether the watch is open", link.connected)
        yield _counter("control_plane_reconnects_total", "Watches that ended", link.reconnects)
        yield _gauge("targets", "Targets in the routing table", len(table.slots) if table is not None else 0)
        yield _gauge("usable_targets", "Targets that take work", sum(target.takes_work for target in targets))
        yield _counter("snapshots_published_total", "Routing tables published", publisher.published)
        yield _gauge("ring_build_seconds", "Time of the last build", publisher.build_s)
        yield _counter("report_ticks_sent_total", "Load ticks sent", reporter.ticks_sent)
        yield _counter("report_ticks_received_total", "Load ticks of peers", reporter.ticks_received)

    def _queues(self) -> Iterator[SeriesValue]:
        parts = self._parts
        reporter, commands, control, remote = parts.reporter, parts.commands, parts.control, parts.remote
        now_s = time.monotonic()
        oldest_s = max((now_s - seen_s for seen_s in remote.peers.values()), default=0.0)
        yield _gauge("peers", "Other replicas heard of", len(remote.peers))
        yield _gauge("peer_age_max_seconds", "Time since the last tick of the replica that is silent longest", oldest_s)
        yield _gauge(
            "report_late_max_seconds",
            "Latest load tick of the last 10 to 20 seconds",
            reporter.late_max.get(now_s),
        )
        yield _counter(
            "peer_ticks_dropped_total", "Load ticks of another epoch or of one peer too many", remote.dropped_ticks
        )
        yield _gauge("report_queue", "Answers that wait for the report stream", reporter.queued)
        yield _counter("report_queue_dropped_total", "Answers that made room for later ones", reporter.dropped)
        yield _gauge("report_slots_pending", "Changed slots that wait for a later tick", parts.collector.pending)
        yield _counter(
            "sent_prefix_overruns_total",
            "Times that the ring of sent prefixes was overwritten unread",
            parts.collector.overruns[1],
        )
        yield _gauge("commands_running", "Commands being answered", commands.running)
        yield _counter("commands_refused_total", "Commands refused because too many were running", commands.refused)
        yield _gauge("control_channel_pending", "Answers that relays owe", control.pending)
        yield _counter("control_channel_refused_total", "Commands and connections beyond its bounds", control.refused)
        for limit, bound in (("commands", MAX_RUNNING), ("peers", MAX_PEERS), ("report_queue", MAX_QUEUED)):
            yield SeriesValue(_AGENT_BOUND, (limit,), (float(bound),))
        yield _counter(
            "host_listen_overflows_total",
            "Connections that this host dropped because an accept queue was full",
            listen_overflows(),
        )

    def _slots(self) -> Iterator[SeriesValue]:
        used, resting, free = self._parts.publisher.slot_counts
        for state, count in (("used", used), ("resting", resting), ("free", free)):
            yield SeriesValue(_SLOTS, (state,), (float(count),))
        yield _gauge("targets_without_slot", "Targets left out", len(self._parts.publisher.without_slot))


_SLOTS = FamilyLine("twofold_slots", "gauge", "Slots of the shared memory by state", ("state",))
_AGENT_BOUND = FamilyLine("twofold_agent_bound", "gauge", "Bounds of the agent, by name", ("limit",))


def listen_overflows(path: Path = _NETSTAT) -> int:
    """Connections dropped on this host since it started; 0 where the system does not tell."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for names, values in pairwise(lines):
        if names.startswith("TcpExt:") and values.startswith("TcpExt:"):
            return int(dict(zip(names.split(), values.split(), strict=False)).get("ListenOverflows", 0))
    return 0


def _gauge(name: str, text: str, value: float) -> SeriesValue:
    return SeriesValue(FamilyLine(PREFIX + name, "gauge", text), (), (float(value),))


def _counter(name: str, text: str, value: float) -> SeriesValue:
    return SeriesValue(FamilyLine(PREFIX + name, "counter", text), (), (float(value),))
