"""What the control plane and an agent cost in a large fleet, and how fresh routers' views of one another are.

A real control plane watches 1,000 (stand-in) engines; 20 router replicas watch the fleet and report load every 20 ms,
some of them real agents over shared memory, the others light clients with the real link and the real collector.
Requests arrive at 1,000/s in all. CPU is read from /proc for each process apart; the share of the time that a process
could run and had to wait for a core is shown beside it, because all of them share this machine.

Then all connections are cut at once (their sockets are shut down from outside), and at last the control plane is killed
and started anew.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
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

import yaml
from lib_fleet import engines, free_port, usage
from lib_replicas import Fleet

ROUND_S = 0.01
TICK_S = 0.02
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
        self.process.wait(20)


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


async def bench(options: argparse.Namespace, directory: Path) -> dict[str, object]:
    """All phases; returns the result."""
    with engines(options.targets) as (engine_process, ports):
        plane = ControlPlane(directory, ports)
        plane.start()
        fleet = Fleet(
            plane.address,
            directory,
            options.replicas - options.agents,
            options.agents,
            [free_port() for _ in range(options.agents)],
        )
        try:
            return await phases(options, plane, fleet, engine_process.pid)
        finally:
            await fleet.stop()
            plane.stop()


async def phases(options: argparse.Namespace, plane: ControlPlane, fleet: Fleet, engines_pid: int) -> dict[str, object]:
    """Idle, load, storm, restart."""
    progress(f"connecting {options.replicas} replicas ({options.agents} real agents)")
    await fleet.connect(options.targets, 60.0)
    pids = {"control plane": plane.process.pid}
    pids |= {replica.name: replica.process.pid for replica in fleet.real}
    pids |= {"light + load": os.getpid(), "engines": engines_pid}
    await asyncio.sleep(3.0)
    figures = Figures(pids)
    progress("idle")
    await asyncio.sleep(options.idle_seconds)
    idle = figures.end()
    show_cpu("idle: probes, watches, empty ticks", idle)

    fleet.begin_load(options.requests_per_s, options.seed)
    await asyncio.sleep(5.0)
    assert fleet.load is not None
    progress(f"load for {options.seconds:g} s")
    figures.begin()
    sent = fleet.load.sent
    fleet.load.late_s = 0.0
    views = await fleet.measure(options.seconds, options.seed)
    loaded = figures.end()
    rate = (fleet.load.sent - sent) / options.seconds
    show_cpu(f"{rate:.0f} requests/s", loaded)
    every = [seconds for samples in views.samples.values() for seconds in samples]
    print(f"\n{'dispatch to view':>32}  {'p50 ms':>7}  {'p90 ms':>7}  {'p99 ms':>7}  {'samples':>8}")
    for kind, samples in [*sorted(views.samples.items()), ("all", every)]:
        shares = "  ".join(f"{1e3 * percentile(samples, share):7.1f}" for share in (0.5, 0.9, 0.99))
        print(f"{kind:>32}  {shares}  {len(samples):8d}")
    print(f"{'no host could beat':>32}  {floor_ms(0.5):7.1f}  {floor_ms(0.9):7.1f}  {floor_ms(0.99):7.1f}")
    print(f"not seen within {0.4} s: {views.missed}; load generator late by at most {1e3 * fleet.load.late_s:.0f} ms")

    progress("cutting all connections")
    fleet.forget_snapshots()
    begun_s = time.monotonic()
    cut = plane.cut()
    storm_s, storm_all_s = await fleet.wait_reconnected(begun_s, 0, 20.0)
    print(f"\n{cut} connections cut: all have the fleet after {storm_s:.2f} s, all loads after {storm_all_s:.2f} s")
    await asyncio.sleep(3.0)

    progress("killing the control plane")
    epoch = fleet.replicas[-1].epoch()
    plane.kill()
    plane.start()
    begun_s = time.monotonic()
    restart_s, restart_all_s = await fleet.wait_reconnected(begun_s, epoch, 90.0)
    print(
        f"control plane killed and started: from its first connection on, all have the new epoch's fleet after "
        f"{restart_s:.2f} s, all loads after {restart_all_s:.2f} s"
    )
    agents = [cores for name, (cores, _) in loaded.items() if name.startswith("real-")]
    return {
        "cores": round(loaded["control plane"][0], 3),
        "agent_cores": round(max(agents), 3) if agents else None,
        "dispatch_to_other_view_p99_ms": round(1e3 * percentile(every, 0.99), 1),
        "reconnect_storm_s": round(storm_s, 2),
        "targets": options.targets,
        "replicas": options.replicas,
        "real_agents": options.agents,
        "requests_per_s": round(rate),
        "cores_idle": round(idle["control plane"][0], 3),
        "agent_cores_mean": round(statistics.fmean(agents), 3) if agents else None,
        "dispatch_to_other_view_p50_ms": round(1e3 * percentile(every, 0.5), 1),
        "dispatch_to_agent_view_p99_ms": round(
            1e3 * percentile([s for kind, x in views.samples.items() if kind.endswith("RealReplica") for s in x], 0.99),
            1,
        ),
        "floor_p99_ms": round(floor_ms(0.99), 1),
        "views": len(every),
        "views_missed": views.missed,
        "waiting_for_core": round(loaded["control plane"][1], 3),
        "reconnect_storm_with_loads_s": round(storm_all_s, 2),
        "restart_s": round(restart_s, 2),
    }


def main() -> None:
    """Print tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=20)
    parser.add_argument("--agents", type=int, default=3, help="of the replicas, real agent processes")
    parser.add_argument("--requests-per-s", type=float, default=1000.0, help="of all replicas together")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="twofold-bench-") as directory:
        result = asyncio.run(bench(options, Path(directory)))
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
