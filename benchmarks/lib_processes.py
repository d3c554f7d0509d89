"""Memory, descriptors and CPU time of processes over time, and whether they grow."""

import statistics
import time
from collections.abc import Mapping, Sequence

import msgspec
import psutil

MIB = 1 << 20
EDGE = 0.1
"""Share of a window at each end whose medians are compared."""


class Sample(msgspec.Struct, frozen=True):
    """One look at one process. ``private`` leaves out pages of files and shared memory."""

    at_s: float
    rss_bytes: int
    private_bytes: int
    fds: int
    cpu_s: float


class Growth(msgspec.Struct, frozen=True):
    """First and last tenth of a window (medians), and the slope of a line through all of it."""

    first: float
    last: float
    slope_per_h: float


class ProcessWatch:
    """Samples of named processes; ``sample`` now and then."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.samples: dict[str, list[Sample]] = {name: [] for name in pids}
        self.gone: set[str] = set()

    def sample(self) -> None:
        """Look at every process once."""
        for name, process in self._processes.items():
            try:
                with process.oneshot():
                    memory, times = process.memory_info(), process.cpu_times()
                    sample = Sample(
                        time.monotonic(),
                        memory.rss,
                        memory.rss - memory.shared,
                        process.num_fds(),
                        times.user + times.system,
                    )
            except psutil.Error:
                self.gone.add(name)
                continue
            self.samples[name].append(sample)

    def since(self, name: str, start_s: float) -> list[Sample]:
        """Samples of a process from ``start_s`` (monotonic) on."""
        return [sample for sample in self.samples[name] if sample.at_s >= start_s]

    def cores(self, name: str, start_s: float) -> float:
        """CPU cores that a process used from ``start_s`` on."""
        window = self.since(name, start_s)
        if len(window) < 2:
            return 0.0
        return (window[-1].cpu_s - window[0].cpu_s) / (window[-1].at_s - window[0].at_s)


def growth(points: Sequence[tuple[float, float]]) -> Growth:
    """How the values of (time in s, value) changed."""
    if not points:
        return Growth(0.0, 0.0, 0.0)
    edge = max(1, round(EDGE * len(points)))
    first = statistics.median(value for _, value in points[:edge])
    last = statistics.median(value for _, value in points[-edge:])
    slope = 0.0
    if len({at_s for at_s, _ in points}) > 1:
        slope = 3600.0 * statistics.linear_regression(*zip(*points, strict=True)).slope
    return Growth(first, last, slope)


def replica_pids(launcher_pid: int) -> dict[str, int]:
    """Names and pids of a launcher, its agent and its relays."""
    found = {"launcher": launcher_pid}
    for child in psutil.Process(launcher_pid).children():
        argv = child.cmdline()
        if "router.agent" in argv:
            found["agent"] = child.pid
        elif "router.relay" in argv:
            found[f"relay-{argv[argv.index('--index') + 1]}"] = child.pid
    return dict(sorted(found.items()))


def engine_pids(control_plane_pid: int) -> dict[str, int]:
    """Names and pids of the emulator processes that a control plane runs."""
    children = psutil.Process(control_plane_pid).children(recursive=True)
    emulators = sorted(child.pid for child in children if "emulator" in child.cmdline())
    return {f"engines-{number}": pid for number, pid in enumerate(emulators)}


def raise_file_limit() -> int:
    """Let this process and its children open as many files as the system allows; returns that number."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
