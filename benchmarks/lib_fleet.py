"""Processes that benchmarks of the control plane need."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def engines(count: int, *, filters: bool = True) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A process that stands for ``count`` engines, and their ports. ``filters``: they answer named series alone."""
    argv = [sys.executable, str(Path(__file__).parent / "lib_engines.py"), "--count", str(count)]
    process = subprocess.Popen([*argv, *([] if filters else ["--no-filter"])], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def usage(pid: int) -> tuple[float, float]:
    """(CPU seconds, seconds of waiting for a core) of all live threads of a process, to the nanosecond."""
    ran = waited = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            fields = (task / "schedstat").read_text().split()
            ran, waited = ran + int(fields[0]), waited + int(fields[1])
    return ran / 1e9, waited / 1e9
