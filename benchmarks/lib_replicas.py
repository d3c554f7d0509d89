"""Router replicas of a benchmark: real agents over shared memory, and light ones beside them.

Both kinds have the real link to the control plane (watch, reconnecting) and the real collector of changed accounts, fed
by generated load. A light replica does not write the load of the others into a remote region; it notes only when it
sees a probe. A real one is ``python -m router.agent`` with this process in the place of its relay.

How long a dispatch takes to another router's view is measured with probes: each replica has a target that nobody else
uses and dispatches one request to it now and then. A real agent writes the moment at which a queue begins into the
remote region itself (HEAD_SENT_S), a light one notes it; all are CLOCK_MONOTONIC, which all processes share.

Run as a program (several share the replicas, so that none is short of time) it takes commands on standard input, a line
each, and answers each with a line of JSON.
"""

import argparse
import asyncio
import heapq
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from router.agent.link import ControlPlaneLink, Credentials
from router.agent.load import LoadCollector, SlotMap
from router.agent.reporter import Reporter
from router.routing import table as tables
from router.routing.accounts import HEAD_SENT_S, ROW, AccountsWriter, Entry
from router.routing.buffers import in_memory
from router.routing.dirty_log import DirtyLog
from router.routing.sent_prefixes import SentPrefixes
from router.shm.layout import region_sizes, regions_of
from router.shm.replica import AGENT, Region, SharedReplica
from twofold import log as logs
from twofold.model.fleet import FleetSnapshot
from twofold.v1 import router_pb2 as pb

SLOTS = 4096
HASHES = (4, 20)
FIRST_TOKEN_S = (0.1, 0.6)
DECODE_S = (2.0, 8.0)
OUTPUT_TOKENS = 200
PROMPT_TOKENS, UNCACHED_TOKENS, WORK_S = 2000, 500, 0.05
STEP_S = 0.005
PROBE_S = 0.4
CONNECT_S = 60.0


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

    def seen(self) -> dict[str, list[float]]:
        """Owner of a probe target -> the moments at which this replica's view of it began to show work."""
        raise NotImplementedError


class LightReporter(Reporter):
    """The real report stream up; of what comes down it notes only when the probe of a replica appears."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.probe_ordinals: dict[str, int] = {}
        self.seen_s: dict[str, list[float]] = {}
        self._busy: set[str] = set()
        self.full: set[str] = set()

    def _receive(self, peer: pb.PeerLoad) -> None:
        self.ticks_received += 1
        name, load = peer.replica_id, peer.load
        if peer.full:
            self.full.add(name)
        ordinal = self.probe_ordinals.get(name)
        if ordinal is not None and ordinal in load.ordinals:
            if not load.inflight[list(load.ordinals).index(ordinal)]:
                self._busy.discard(name)
            elif name not in self._busy:
                self._busy.add(name)
                self.seen_s.setdefault(name, []).append(time.monotonic())


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

    def seen(self) -> dict[str, list[float]]:
        """See Replica."""
        return self.reporter.seen_s


class RealReplica(Replica):
    """A real agent process; this process is its relay 0."""

    def __init__(self, name: str, address: str, directory: Path, admin_port: int) -> None:
        self.shared = SharedReplica.create(directory, relays=1, sizes=region_sizes(SLOTS))
        own = regions_of(self.shared, 0)
        super().__init__(name, own.accounts, own.dirty, self.shared.region(0, Region.SENT))
        self._remote = regions_of(self.shared, AGENT).accounts.cast("d")
        self._version = 0
        self._epoch = 0
        self._seen: dict[str, list[float]] = {}
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

    def look(self, owners: dict[str, str]) -> None:
        """Note what the agent wrote about the probe targets (target id -> owner) since the last look."""
        for target_id, owner in owners.items():
            sent_s = self._remote[self.slot_of[target_id] * ROW + HEAD_SENT_S]
            seen = self._seen.setdefault(owner, [])
            if sent_s and (not seen or sent_s != seen[-1]):
                seen.append(sent_s)

    def seen(self) -> dict[str, list[float]]:
        """See Replica."""
        return self._seen

    def stop(self) -> None:
        """End the agent and remove the shared memory."""
        self.process.terminate()
        self.process.wait(10)
        self._remote.release()
        self.shared.remove()


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


async def probe(sender: Replica, target_id: str, sent_s: list[float], rng: random.Random) -> None:
    """Dispatch to a target of one's own again and again and note when; until cancelled."""
    entry: Entry | None = None
    try:
        while True:
            await asyncio.sleep(rng.uniform(PROBE_S, 2 * PROBE_S))
            sent_s.append(time.monotonic())
            entry = sender.out.dispatch(sender.slot_of[target_id], UNCACHED_TOKENS, PROMPT_TOKENS, WORK_S, sent_s[-1])
            await asyncio.sleep(PROBE_S)
            sender.out.finish(entry)
    finally:
        if entry is not None:
            sender.out.finish(entry)


class Group:
    """The replicas of one process, their load and their probes. ``options``: see ``main``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        ports = [int(port) for port in options.admin_ports.split(",") if port]
        directory = Path(options.directory)
        self.light = [LightReplica(f"light-{i}", options.address) for i in range(*map(int, options.light.split("-")))]
        self.real = [
            RealReplica(f"real-{i}", options.address, directory / f"real-{i}", port) for i, port in enumerate(ports)
        ]
        self.replicas: list[Replica] = [*self.light, *self.real]
        self._owners: dict[str, str] = {}
        self._load: Load | None = None
        self._links: list[asyncio.Task[None]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self) -> dict[str, int]:
        """Start the links and wait until everybody has the fleet; pids of the agents. Raises TimeoutError."""
        self._links = [asyncio.create_task(replica.link.run()) for replica in self.light]
        async with asyncio.timeout(CONNECT_S):
            while any(len(replica.slot_of) < self._options.targets for replica in self.replicas):
                await asyncio.sleep(0.1)
                for replica in self.real:
                    replica.refresh()
        return {replica.name: replica.process.pid for replica in self.real}

    def begin_load(self) -> None:
        """Begin to write load. The first targets are for probes, one for each replica of all processes."""
        names = sorted(self.replicas[0].slot_of)
        everybody = self._options.everybody.split(",")
        self._owners = dict(zip(names, everybody, strict=False))
        self._load = Load(self.replicas, self._options.requests_per_s, self._options.seed)
        self._load.targets = names[len(everybody) :]
        for light in self.light:
            assert light.link.snapshot is not None
            ordinals = {target.target_id: target.ordinal for target in light.link.snapshot.targets}
            light.reporter.probe_ordinals = {owner: ordinals[target_id] for target_id, owner in self._owners.items()}
        self._tasks.append(asyncio.create_task(self._load.run()))

    async def measure(self, seconds: float) -> dict[str, Any]:
        """Probe for some time: moments of dispatches, moments at which they were seen, requests, lateness."""
        assert self._load is not None
        self._load.late_s, before = 0.0, self._load.sent
        by_name = {replica.name: replica for replica in self.replicas}
        sent: dict[str, list[float]] = {name: [] for name in by_name}
        tasks = [
            asyncio.create_task(
                probe(by_name[owner], target_id, sent[owner], random.Random(f"{self._options.seed} {owner}"))
            )
            for target_id, owner in self._owners.items()
            if owner in by_name
        ]
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            await asyncio.sleep(PROBE_S / 4)
            for replica in self.real:
                replica.look(self._owners)
        requests, late_s = self._load.sent - before, self._load.late_s
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(2 * PROBE_S)
        for replica in self.real:
            replica.look(self._owners)
        seen = {replica.name: replica.seen() for replica in self.replicas}
        return {"sent": sent, "seen": seen, "requests": requests, "late_s": late_s}

    def forget_snapshots(self) -> None:
        """Light replicas ask for everything when they connect the next time."""
        for replica in self.light:
            replica.link.snapshot = None
            replica.reporter.full.clear()

    async def wait_reconnected(self, begun_s: float, epoch: int) -> dict[str, float]:
        """Wait until everybody watches and reports again with the fleet of an epoch other than ``epoch`` (0: any).

        Seconds until all have the fleet, and until all report and know all others' load again.
        """
        fleet_s = 0.0
        others = len(self._options.everybody.split(",")) - 1
        deadline_s = time.monotonic() + CONNECT_S
        async with aiohttp.ClientSession() as session:
            while True:
                waiting = [
                    replica.name
                    for replica in self.light
                    if replica.link.snapshot is None or replica.epoch() == epoch or replica.snapshot_s < begun_s
                ]
                states = [await _state(session, replica.admin) for replica in self.real]
                waiting += [
                    state["replica_id"]
                    for state in states
                    if not state["control_plane"]["connected"] or state["received"]["epoch"] == epoch
                ]
                if not waiting:
                    fleet_s = fleet_s or time.monotonic() - begun_s
                    waiting = [replica.name for replica in self.light if len(replica.reporter.full) < others]
                    waiting += [state["replica_id"] for state in states if len(state["peers"]) < others]
                    if not waiting:
                        return {"fleet_s": fleet_s, "loads_s": time.monotonic() - begun_s}
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"not back: {waiting}")
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


async def obey(options: argparse.Namespace) -> None:
    """Carry out commands until "quit" or the end of standard input."""
    group = Group(options)
    loop = asyncio.get_running_loop()
    try:
        answer: Any = await group.connect()
        while True:
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
            command, *words = (await loop.run_in_executor(None, sys.stdin.readline)).split() or ["quit"]
            answer = None
            if command == "load":
                group.begin_load()
            elif command == "measure":
                answer = await group.measure(float(words[0]))
            elif command == "forget":
                group.forget_snapshots()
            elif command == "epoch":
                answer = group.replicas[0].epoch()
            elif command == "reconnected":
                answer = await group.wait_reconnected(float(words[0]), int(words[1]))
            else:
                break
    finally:
        await group.stop()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="host:port of the control plane")
    parser.add_argument("--light", default="0-0", help="light replicas: first-end")
    parser.add_argument("--admin-ports", default="", help="of real agents")
    parser.add_argument("--everybody", required=True, help="names of the replicas of all processes")
    parser.add_argument("--targets", type=int, required=True)
    parser.add_argument("--directory", required=True, help="for shared memory and logs")
    parser.add_argument("--requests-per-s", type=float, required=True, help="of this process")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--log-level", default="error")
    options = parser.parse_args()
    logs.configure("replicas", level=options.log_level)
    uvloop.run(obey(options))


if __name__ == "__main__":
    main()
