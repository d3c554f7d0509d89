"""Memory and CPU of the processes of this replica, read from the operating system at scrape time."""

import os
from collections.abc import Mapping

import psutil

from router.shm.counters import FamilyLine
from router.shm.exposition import SeriesValue

_RSS = FamilyLine(
    "twofold_process_resident_memory_bytes", "gauge", "Resident memory, shared pages included", ("process",)
)
_CPU = FamilyLine("twofold_process_cpu_seconds_total", "counter", "User and system CPU time of this life", ("process",))
_START = FamilyLine("twofold_process_start_time_seconds", "gauge", "Start, seconds since the Unix epoch", ("process",))
_MAX_FDS = FamilyLine("twofold_process_max_fds", "gauge", "Most descriptors that it may open", ("process",))
_FDS = FamilyLine("twofold_process_open_fds", "gauge", "Open file descriptors", ("process",))


def process_series(pids: Mapping[str, int]) -> list[SeriesValue]:
    """Figures of the processes by name, grouped by metric; processes that are gone are left out."""
    found: dict[FamilyLine, list[SeriesValue]] = {_RSS: [], _CPU: [], _START: [], _FDS: [], _MAX_FDS: []}
    for name, pid in sorted(pids.items()):
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                times = process.cpu_times()
                figures = {
                    _RSS: float(process.memory_info().rss),
                    _CPU: times.user + times.system,
                    _START: process.create_time(),
                    _FDS: float(process.num_fds()),
                    _MAX_FDS: float(process.rlimit(psutil.RLIMIT_NOFILE)[0]),
                }
        except psutil.Error:
            continue
        for family, value in figures.items():
            found[family].append(SeriesValue(family, (name,), (value,)))
    return [series for group in found.values() for series in group]


def replica_pids(beats: Mapping[str, int]) -> dict[str, int]:
    """Names and pids of relays that beat (from ``beats``), this agent and its launcher."""
    pids = {name: pid for name, pid in beats.items() if pid > 0}
    return {**pids, "agent": os.getpid(), "launcher": os.getppid()}
