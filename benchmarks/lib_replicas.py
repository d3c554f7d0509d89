"""Router replicas of a benchmark, in one process: real agents over shared memory, and light ones beside them.

Both kinds have the real link to the control plane (watch, reconnecting) and the real collector of changed accounts, fed
by the same generated load. A light replica does not write the load of the others into a remote region; it notes only
when it sees a probe. A real one is ``python -m router.agent`` with this process in the place of its relay.

How long a dispatch takes to another router's view is measured with probes: each replica has a target that nobody else
uses, dispatches one request to it, and every other replica's view of that target is looked at afterwards. A real agent
writes the moment at which a queue begins into the remote region itself (HEAD_SENT_S), a light one notes it; both are
CLOCK_MONOTONIC, so nothing is polled.
"""

import asyncio
import heapq
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from router.agent.link import ControlPlaneLink, Credentials
from router.agent.load import LoadCollector, SlotMap
from router.agent.reporter import Reporter
from router.routing import table as tables
from router.routing.accounts import HEAD_SENT_S, INFLIGHT, ROW, AccountsWriter, Entry
from router.routing.buffers import in_memory
from router.routing.dirty_log import DirtyLog
from router.routing.sent_prefixes import SentPrefixes
from router.shm.layout import region_sizes, regions_of
from router.shm.replica import AGENT, Region, SharedReplica
from twofold.model.fleet import FleetSnapshot
from twofold.v1 import router_pb2 as pb

SLOTS = 4096
HASHES = (4, 20)
FIRST_TOKEN_S = (0.1, 0.6)
DECODE_S = (2.0, 8.0)
OUTPUT_TOKENS = 200
PROMPT_TOKENS, UNCACHED_TOKENS, WORK_S = 2000, 500, 0.05
STEP_S = 0.005
PROBE_SEEN_S = 0.4


class Replica:
    """What both kinds have in common: an accounts region of its own that load is written to, and a probe target."""

    def __init__(self, name: str, accounts: memoryview, dirty: memoryview, sent: memoryview) -> None:
        self.name = name
        self.out = AccountsWriter(accounts, DirtyLog(dirty))
        self.sent = SentPrefixes(sent)
        self.slot_of: dict[str, int] = {}

    def epoch(self) -> int:
        """Epoch of the table in force; 0 without one."""
        raise NotImplementedError

    def saw(self, target_id: str, since_s: float) -> float | None:
        """When this replica's view of a probe target began to show work, if it did after ``since_s``."""
        raise NotImplementedError


class LightReporter(Reporter):
    """The real report stream up; of what comes down it notes only when the probe of a replica appears."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.probe_ordinals: dict[str, int] = {}
        self.seen_s: dict[str, float] = {}
        self.full: set[str] = set()

    def _receive(self, peer: pb.PeerLoad) -> None:
        self.ticks_received += 1
        name, load = peer.replica_id, peer.load
        if peer.full:
            self.full.add(name)
        ordinal = self.probe_ordinals.get(name)
        if ordinal is not None and ordinal in load.ordinals:
            if not load.inflight[list(load.ordinals).index(ordinal)]:
                self.seen_s.pop(name, None)
            elif name not in self.seen_s:
                self.seen_s[name] = time.monotonic()


class LightReplica(Replica):
    """A replica without relays, shared memory and remote region."""

    def __init__(self, name: str, address: str) -> None:
        buffers = in_memory(SLOTS, prefix_entries=4)[0]
        super().__init__(name, buffers.own.accounts, buffers.own.dirty, buffers.sent)
        self._map = SlotMap()
        self._address = address
        self.snapshots = 0
        self.snapshot_s = 0.0
        credentials = Credentials()
        self.reporter = LightReporter(
            hello=pb.RouterHello(replica_id=name, version="bench", relays=1),
            metadata=credentials.metadata,
            collector=LoadCollector([buffers.own], [buffers.sent]),
            remote=None,
            commands=None,
            slots=lambda: self._map,
            demand=lambda: pb.DemandTick(interval_s=1.0),
            tick_s=0.02,
            demand_interval_s=1.0,
        )
        self.link = ControlPlaneLink(
            name,
            (address,),
            credentials,
            connect_timeout_s=5.0,
            silence_timeout_s=15.0,
            on_snapshot=self._on_snapshot,
            beside=self.reporter.run,
            rng=random.Random(name),
        )

    def _on_snapshot(self, snapshot: FleetSnapshot) -> None:
        self.snapshots += 1
        self.snapshot_s = time.monotonic()
        if len(snapshot.targets) <= SLOTS:
            self.slot_of = {target.target_id: i for i, target in enumerate(snapshot.targets)}
            self._map = SlotMap.of(snapshot, self.slot_of)

    def epoch(self) -> int:
        """Epoch of its snapshot."""
        return self.link.snapshot.epoch if self.link.snapshot is not None else 0

    def saw(self, target_id: str, since_s: float) -> float | None:
        """See Replica."""
        seen_s = self.reporter.seen_s.get(probe_owner(target_id))
        return seen_s if seen_s is not None and seen_s >= since_s else None


class RealReplica(Replica):
    """A real agent process; this process is its relay 0."""

    def __init__(self, name: str, address: str, directory: Path, admin_port: int) -> None:
        self.shared = SharedReplica.create(directory, relays=1, sizes=region_sizes(SLOTS))
        own = regions_of(self.shared, 0)
        super().__init__(name, own.accounts, own.dirty, self.shared.region(0, Region.SENT))
        self._remote = regions_of(self.shared, AGENT).accounts.cast("d")
        self._version = 0
        self._epoch = 0
        self.admin = f"http://127.0.0.1:{admin_port}"
        argv = [sys.executable, "-m", "router.agent", "--replica-id", name, "--replica-dir", str(directory)]
        argv += ["--control-plane", address, "--admin-port", str(admin_port), "--log-file", str(directory) + ".log"]
        self.process = subprocess.Popen(argv)

    def refresh(self) -> None:
        """Read the board again."""
        if self.shared.board.version != self._version:
            published = self.shared.board.read()
            if published is not None:
                self._version = published[0]
                table = tables.decode(published[1])
                self.slot_of, self._epoch = dict(table.slots), table.snapshot.epoch

    def epoch(self) -> int:
        """Epoch of the published table."""
        self.refresh()
        return self._epoch

    def saw(self, target_id: str, since_s: float) -> float | None:
        """See Replica."""
        at = self.slot_of[target_id] * ROW
        sent_s = self._remote[at + HEAD_SENT_S]
        return sent_s if self._remote[at + INFLIGHT] and sent_s >= since_s else None

    def stop(self) -> None:
        """End the agent and remove the shared memory."""
        self.process.terminate()
        self.process.wait(10)
        self._remote.release()
        self.shared.remove()


_OWNERS: dict[str, str] = {}


def probe_owner(target_id: str) -> str:
    """The replica whose probe target this is."""
    return _OWNERS[target_id]


class Load:
    """Requests at random moments from random replicas to random targets, each with its first token and its end."""

    def __init__(self, replicas: list[Replica], requests_per_s: float, seed: int) -> None:
        self._replicas = replicas
        self._rate = requests_per_s
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self.targets: list[str] = []
        self.sent = 0
        self.late_s = 0.0

    async def run(self) -> None:
        """Go on until cancelled."""
        due_s = now_s = time.monotonic()
        while True:
            self.late_s = max(self.late_s, time.monotonic() - now_s)
            now_s = time.monotonic()
            while due_s <= now_s:
                self._dispatch(now_s)
                due_s += self._random.expovariate(self._rate)
            while self._events and self._events[0][0] <= now_s:
                heapq.heappop(self._events)[2](now_s)
            await asyncio.sleep(STEP_S)
            now_s += STEP_S

    def _dispatch(self, now_s: float) -> None:
        rng = self._random
        replica = rng.choice(self._replicas)
        slot = replica.slot_of.get(rng.choice(self.targets))
        if slot is None:
            return
        self.sent += 1
        entry = replica.out.dispatch(slot, UNCACHED_TOKENS, PROMPT_TOKENS, WORK_S, now_s)
        replica.sent.append(slot, [rng.getrandbits(64) for _ in range(rng.randint(*HASHES))])
        first_s = now_s + rng.uniform(*FIRST_TOKEN_S)
        decode_s = rng.uniform(*DECODE_S)
        self._at(first_s, lambda at_s: replica.out.first_token(entry, at_s))
        for part in range(1, 5):
            self._at(first_s + part * decode_s / 5, lambda _: replica.out.tokens(entry, OUTPUT_TOKENS // 5))
        self._at(first_s + decode_s, lambda _: replica.out.finish(entry))

    def _at(self, at_s: float, do: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), do))


class Views(msgspec.Struct):
    """Seconds from a dispatch to another router's view, by kind of sender and viewer."""

    samples: dict[str, list[float]]
    missed: int = 0


async def probe(sender: Replica, others: list[Replica], target_id: str, views: Views, rng: random.Random) -> None:
    """Dispatch to a target of one's own again and again, and look when the others saw it; until cancelled."""
    entry: Entry | None = None
    try:
        while True:
            await asyncio.sleep(rng.uniform(PROBE_SEEN_S, 2 * PROBE_SEEN_S))
            now_s = time.monotonic()
            entry = sender.out.dispatch(sender.slot_of[target_id], UNCACHED_TOKENS, PROMPT_TOKENS, WORK_S, now_s)
            await asyncio.sleep(PROBE_SEEN_S)
            for other in others:
                seen_s = other.saw(target_id, now_s)
                if seen_s is None:
                    views.missed += 1
                else:
                    kind = f"{type(sender).__name__} to {type(other).__name__}"
                    views.samples.setdefault(kind, []).append(seen_s - now_s)
            sender.out.finish(entry)
    finally:
        if entry is not None:
            sender.out.finish(entry)


class Fleet:
    """All replicas, their load and their probes."""

    def __init__(self, address: str, directory: Path, light: int, real: int, admin_ports: list[int]) -> None:
        self.light = [LightReplica(f"light-{i}", address) for i in range(light)]
        self.real = [RealReplica(f"real-{i}", address, directory / f"real-{i}", admin_ports[i]) for i in range(real)]
        self.replicas: list[Replica] = [*self.real, *self.light]
        self.load: Load | None = None
        self._links: list[asyncio.Task[None]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self, targets: int, timeout_s: float) -> None:
        """Start the links and wait until everybody has the fleet. Raises TimeoutError."""
        self._links = [asyncio.create_task(replica.link.run()) for replica in self.light]
        async with asyncio.timeout(timeout_s):
            while any(len(replica.slot_of) < targets for replica in self.replicas):
                await asyncio.sleep(0.1)
                for replica in self.real:
                    replica.refresh()

    def begin_load(self, requests_per_s: float, seed: int) -> None:
        """Begin to write load."""
        names = sorted(self.light[0].slot_of if self.light else self.real[0].slot_of)
        self.load = Load(self.replicas, requests_per_s, seed)
        self.load.targets = names[len(self.replicas) :]
        self._assign_probes(names)
        self._tasks.append(asyncio.create_task(self.load.run()))

    def _assign_probes(self, names: list[str]) -> None:
        for replica, target_id in zip(self.replicas, names, strict=False):
            _OWNERS[target_id] = replica.name
        for light in self.light:
            assert light.link.snapshot is not None
            ordinals = {target.target_id: target.ordinal for target in light.link.snapshot.targets}
            light.reporter.probe_ordinals = {owner: ordinals[target_id] for target_id, owner in _OWNERS.items()}

    async def measure(self, seconds: float, seed: int) -> Views:
        """Probe for some time."""
        views = Views(samples={})
        by_name = {replica.name: replica for replica in self.replicas}
        tasks = [
            asyncio.create_task(
                probe(
                    by_name[owner],
                    [other for other in self.replicas if other.name != owner],
                    target_id,
                    views,
                    random.Random(f"{seed} {owner}"),
                )
            )
            for target_id, owner in _OWNERS.items()
        ]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return views

    def forget_snapshots(self) -> None:
        """Light replicas ask for everything when they connect the next time."""
        for replica in self.light:
            replica.link.snapshot = None
            replica.reporter.full.clear()

    async def wait_reconnected(self, begun_s: float, epoch: int, timeout_s: float) -> tuple[float, float]:
        """Wait until everybody watches and reports again with the fleet of an epoch other than ``epoch`` (0: any).

        Returns (seconds until all have the fleet, until all report and light ones know all others' load again).
        """
        fleet_s = 0.0
        deadline_s = time.monotonic() + timeout_s
        async with aiohttp.ClientSession() as session:
            while True:
                waiting = [
                    replica
                    for replica in self.light
                    if replica.link.snapshot is None or replica.epoch() == epoch or replica.snapshot_s < begun_s
                ]
                states = [await _state(session, replica.admin) for replica in self.real]
                late = [
                    state
                    for state in states
                    if not state["control_plane"]["connected"] or state["received"]["epoch"] == epoch
                ]
                if not waiting and not late:
                    fleet_s = fleet_s or time.monotonic() - begun_s
                    others = len(self.replicas) - 1
                    if all(len(replica.reporter.full) >= others for replica in self.light) and all(
                        state["control_plane"]["reporting"] and len(state["peers"]) == others for state in states
                    ):
                        return fleet_s, time.monotonic() - begun_s
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"not back: {[replica.name for replica in waiting]}, {late or states}")
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End everything."""
        for task in (*self._tasks, *self._links):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._links, return_exceptions=True)
        for replica in self.real:
            replica.stop()


async def _state(session: aiohttp.ClientSession, admin: str) -> dict[str, Any]:
    async with session.get(f"{admin}/debug/state") as reply:
        state: dict[str, Any] = await reply.json()
        return state
