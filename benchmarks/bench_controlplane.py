"""What the control plane and an agent cost in a large fleet, and how fresh routers' views of one another are.

A real control plane watches 1,000 (stand-in) engines; 20 router replicas watch the fleet and report load every 20 ms,
some of them real agents over shared memory, the others light clients with the real link and the real collector.
Requests arrive at 1,000/s in all. CPU is read from /proc for each process apart; the share of the time that a process
could run and had to wait for a core is shown beside it, because all of them share this machine.

Then all connections are cut at once (their sockets are shut down from outside), and at last the control plane is killed
and started anew.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from lib_fleet import engines, free_port, usage
from lib_replicas import PROBE_S

from controlplane.routers.hub import ROUND_S

TICK_S = 0.02
SETTLE_S = 3.0
_PIDFD_GETFD = 438


class ControlPlane:
    """``python -m controlplane`` on fixed ports."""

    def __init__(self, directory: Path, engine_ports: list[int]) -> None:
        self.directory = directory
        self.port, self.metrics = free_port(), free_port()
        urls = [f"http://127.0.0.1:{port}" for port in engine_ports]
        group = {"profile": "l4-8b-tp1", "urls": urls}
        fleet = {"name": "bench", "pools": [{"name": "p", "models": ["m"], "workers": [group]}]}
        (directory / "fleet.yaml").write_text(yaml.safe_dump(fleet))

    @property
    def address(self) -> str:
        """host:port of its gRPC server."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it listens."""
        argv = [sys.executable, "-m", "controlplane", "--fleet", str(self.directory / "fleet.yaml")]
        argv += ["--listen", self.address, "--metrics-listen", f"127.0.0.1:{self.metrics}"]
        argv += ["--run-dir", str(self.directory / "run"), "--log-file", str(self.directory / "controlplane.log")]
        self.process = subprocess.Popen(argv)
        for _ in range(1000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise TimeoutError("the control plane does not listen")

    def cut(self) -> int:
        """Shut down every established connection of the gRPC port, as a broken line would; returns their number."""
        inodes = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].split(":")[1], 16) == self.port and fields[3] == "01":
                    inodes.add(fields[9])
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.pidfd_open(self.process.pid)
        shut = 0
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                link = os.readlink(entry)
                if link.startswith("socket:[") and link[8:-1] in inodes:
                    copy = libc.syscall(_PIDFD_GETFD, handle, int(entry.name), 0)
                    if copy < 0:
                        raise PermissionError("this system does not let one process shut another's sockets")
                    with socket.socket(fileno=copy) as connection:
                        connection.shutdown(socket.SHUT_RDWR)
                    shut += 1
        os.close(handle)
        if not shut:
            raise RuntimeError("no connection found to cut")
        return shut

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def progress(text: str) -> None:
    """Say what is being done."""
    sys.stderr.write(f"{text}\n")


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def floor_ms(share: float) -> float:
    """What no host can beat: the wait for the agent's next tick and for the control plane's next round."""
    rng = random.Random(1)
    return 1e3 * percentile([rng.uniform(0, TICK_S) + rng.uniform(0, ROUND_S) for _ in range(100_000)], share)


class Figures:
    """CPU of processes over windows."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.begin()

    def begin(self) -> None:
        """Start a window."""
        self._start_s = time.monotonic()
        self._before = {name: usage(pid) for name, pid in self._pids.items()}

    def end(self) -> dict[str, tuple[float, float]]:
        """Name -> (cores used, cores waited for) since ``begin``."""
        passed_s = time.monotonic() - self._start_s
        after = {name: usage(pid) for name, pid in self._pids.items()}
        return {
            name: tuple((now - then) / passed_s for now, then in zip(after[name], self._before[name], strict=True))  # type: ignore[misc]
            for name in after
        }


def show_cpu(title: str, window: dict[str, tuple[float, float]]) -> None:
    """Print a window."""
    print(f"\n{title}\n{'process':>16}  {'cores':>6}  {'waiting for a core':>18}")
    for name, (ran, waited) in window.items():
        print(f"{name:>16}  {ran:6.3f}  {waited:18.3f}")


class Replicas:
    """All replicas, spread over processes of ``lib_replicas.py``; the real agents have one for themselves."""

    def __init__(self, options: argparse.Namespace, address: str, directory: Path) -> None:
        light = options.replicas - options.agents
        names = [f"light-{i}" for i in range(light)] + [f"real-{i}" for i in range(options.agents)]
        common = ["--address", address, "--everybody", ",".join(names), "--directory", str(directory)]
        common += ["--targets", str(options.targets), "--log-level", "info" if options.verbose else "error"]
        shares = [
            (["--light", f"{first}-{min(light, first + options.per_process)}"], min(options.per_process, light - first))
            for first in range(0, light, options.per_process)
        ]
        if options.agents:
            ports = ",".join(str(free_port()) for _ in range(options.agents))
            shares.append((["--admin-ports", ports], options.agents))
        script = str(Path(__file__).parent / "lib_replicas.py")
        self.processes = []
        for number, (share, count) in enumerate(shares):
            rate = options.requests_per_s * count / options.replicas
            argv = [sys.executable, script, *common, *share, "--requests-per-s", str(rate)]
            argv += ["--seed", str(options.seed + number)]
            self.processes.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self.agents: dict[str, int] = {}
        for answer in self.answers():
            self.agents.update(answer)

    def answers(self) -> list[Any]:
        """The answer of every process to the last command."""
        found = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("a process of replicas ended")
            found.append(json.loads(line))
        return found

    def ask(self, command: str) -> list[Any]:
        """Give a command to every process and wait for all answers."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(command.encode() + b"\n")
            process.stdin.flush()
        return self.answers()

    def stop(self) -> None:
        """End all of them."""
        for process in self.processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            process.stdout.close()


def views(answers: list[dict[str, Any]]) -> tuple[dict[str, list[float]], int]:
    """(kind of sender and viewer -> seconds from dispatch to view, dispatches that a viewer did not see in time)."""
    sent = {owner: moments for answer in answers for owner, moments in answer["sent"].items()}
    found: dict[str, list[float]] = {}
    missed = 0
    for answer in answers:
        for viewer, seen in answer["seen"].items():
            for owner, moments in sent.items():
                if owner == viewer:
                    continue
                kind = f"{owner.split('-')[0]} to {viewer.split('-')[0]}"
                for sent_s in moments:
                    seen_s = next((at_s for at_s in seen.get(owner, ()) if at_s >= sent_s), math.inf)
                    if seen_s - sent_s > PROBE_S:
                        missed += 1
                    else:
                        found.setdefault(kind, []).append(seen_s - sent_s)
    return found, missed


def bench(options: argparse.Namespace, directory: Path) -> dict[str, object]:
    """All phases; returns the result."""
    with engines(options.targets) as (engine_process, ports):
        plane = ControlPlane(directory, ports)
        plane.start()
        replicas = None
        try:
            progress(f"connecting {options.replicas} replicas ({options.agents} real agents)")
            replicas = Replicas(options, plane.address, directory)
            pids = {"control plane": plane.process.pid, **replicas.agents}
            pids |= {f"replicas {i}": process.pid for i, process in enumerate(replicas.processes)}
            pids |= {"engines": engine_process.pid}
            result = steady(options, replicas, Figures(pids))
            return result | storms(plane, replicas)
        finally:
            try:
                if replicas is not None:
                    replicas.stop()
            finally:
                plane.stop()


def steady(options: argparse.Namespace, replicas: Replicas, figures: Figures) -> dict[str, object]:
    """Without and with load."""
    time.sleep(SETTLE_S)
    progress("idle")
    figures.begin()
    time.sleep(options.idle_seconds)
    idle = figures.end()
    show_cpu("idle: probes, watches, empty ticks", idle)

    replicas.ask("load")
    time.sleep(SETTLE_S)
    progress(f"load for {options.seconds:g} s")
    figures.begin()
    answers = replicas.ask(f"measure {options.seconds}")
    loaded = figures.end()
    rate = sum(answer["requests"] for answer in answers) / options.seconds
    show_cpu(f"{rate:.0f} requests/s", loaded)
    samples, missed = views(answers)
    every = [seconds for found in samples.values() for seconds in found]
    print(f"\n{'dispatch to view':>20}  {'p50 ms':>7}  {'p90 ms':>7}  {'p99 ms':>7}  {'samples':>8}")
    for kind, found in [*sorted(samples.items()), ("all", every)]:
        shares = "  ".join(f"{1e3 * percentile(found, share):7.1f}" for share in (0.5, 0.9, 0.99))
        print(f"{kind:>20}  {shares}  {len(found):8d}")
    print(f"{'no host could beat':>20}  {floor_ms(0.5):7.1f}  {floor_ms(0.9):7.1f}  {floor_ms(0.99):7.1f}")
    late_s = max(answer["late_s"] for answer in answers)
    print(f"not seen within {PROBE_S} s: {missed}; load generators late by at most {1e3 * late_s:.0f} ms")
    agents = [cores for name, (cores, _) in loaded.items() if name.startswith("real-")]
    to_agents = [seconds for kind, found in samples.items() if kind.endswith("real") for seconds in found]
    return {
        "cores": round(loaded["control plane"][0], 3),
        "agent_cores": round(max(agents), 3) if agents else None,
        "dispatch_to_other_view_p99_ms": round(1e3 * percentile(every, 0.99), 1),
        "reconnect_storm_s": None,
        "targets": options.targets,
        "replicas": options.replicas,
        "real_agents": options.agents,
        "requests_per_s": round(rate),
        "cores_idle": round(idle["control plane"][0], 3),
        "agent_cores_mean": round(statistics.fmean(agents), 3) if agents else None,
        "dispatch_to_other_view_p50_ms": round(1e3 * percentile(every, 0.5), 1),
        "dispatch_to_agent_view_p99_ms": round(1e3 * percentile(to_agents, 0.99), 1) if to_agents else None,
        "floor_p99_ms": round(floor_ms(0.99), 1),
        "views": len(every),
        "views_missed": missed,
        "waiting_for_core": round(loaded["control plane"][1], 3),
        "generator_late_ms": round(1e3 * late_s, 1),
    }


def storms(plane: ControlPlane, replicas: Replicas) -> dict[str, object]:
    """All connections cut; then the control plane killed and started anew."""
    progress("cutting all connections")
    replicas.ask("forget")
    begun_s = time.monotonic()
    cut = plane.cut()
    answers = replicas.ask(f"reconnected {begun_s} 0")
    storm_s, loads_s = (max(answer[key] for answer in answers) for key in ("fleet_s", "loads_s"))
    print(f"\n{cut} connections cut: all have the fleet after {storm_s:.2f} s, all loads after {loads_s:.2f} s")

    time.sleep(SETTLE_S)
    progress("killing the control plane")
    epoch = replicas.ask("epoch")[0]
    plane.kill()
    plane.start()
    begun_s = time.monotonic()
    answers = replicas.ask(f"reconnected {begun_s} {epoch}")
    restart_s, restart_loads_s = (max(answer[key] for answer in answers) for key in ("fleet_s", "loads_s"))
    print(
        f"control plane killed and started: from its first connection on, all have the new epoch's fleet after "
        f"{restart_s:.2f} s, all loads after {restart_loads_s:.2f} s"
    )
    return {
        "reconnect_storm_s": round(storm_s, 2),
        "reconnect_storm_with_loads_s": round(loads_s, 2),
        "restart_s": round(restart_s, 2),
    }


def main() -> None:
    """Print tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=20)
    parser.add_argument("--agents", type=int, default=3, help="of the replicas, real agent processes")
    parser.add_argument("--per-process", type=int, default=6, help="light replicas in one process")
    parser.add_argument("--requests-per-s", type=float, default=1000.0, help="of all replicas together")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    parser.add_argument("--verbose", action="store_true", help="log what the light replicas say")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="twofold-bench-") as directory:
        try:
            result = bench(options, Path(directory))
        except BaseException:
            tail = (Path(directory) / "controlplane.log").read_text().splitlines()[-20:]
            sys.stderr.write("\n".join(tail) + "\n")
            raise
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
