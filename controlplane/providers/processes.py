"""Engine processes as sessions: started apart from us, told from others by start time, ended with all they left."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL_S = 0.05
KILL_BOUND_S = 10.0


def boot_id() -> str:
    """Identity of this boot of the machine: start ticks of different boots cannot be compared."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_ticks(pid: int, *, zombies: bool = False) -> int | None:
    """Start time of a process in clock ticks since boot; None when it is gone, or a zombie and those do not count."""
    fields = _stat(pid)
    return None if fields is None or (fields[0] == b"Z" and not zombies) else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """Fields of /proc/pid/stat from the state on."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
        return raw[raw.rindex(b")") + 2 :].split()
    except (OSError, ValueError):
        return None


def members(leader: int, since_ticks: int) -> list[int]:
    """Living processes of the session that ``leader`` founded, the leader included, whatever group they are in."""
    found: list[int] = []
    owner = _stat(leader)
    if owner is not None and int(owner[19]) != since_ticks:
        # The kernel gives a session's number to a new process only when nobody of the session is left.
        return found
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields is not None and int(fields[3]) == leader and fields[0] != b"Z" and int(fields[19]) >= since_ticks:
                found.append(int(entry))
    return found


def spawn(argv: Sequence[str], env: Mapping[str, str], log_path: Path, cwd: str) -> "subprocess.Popen[bytes]":
    """Start a process as leader of its own session with its output appended to ``log_path``. Raises OSError.

    It does not die with us: a control plane that is killed leaves its engines serving.
    """
    descriptor = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
            close_fds=True,
        )
    finally:
        os.close(descriptor)


class Handle:
    """A running session leader, a child of ours or an adopted one.

    ``wait`` returns when the leader is gone. The pid stays reserved while a child is not reaped, and signals to adopted
    leaders go through a pidfd, so that no signal can reach a stranger.
    """

    def __init__(self, pid: int, ticks: int, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self.ticks = ticks
        self._child = child
        self._fd = os.pidfd_open(pid)
        self._gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._ended)

    @classmethod
    def adopt(cls, pid: int, ticks: int) -> "Handle | None":
        """A process that another control plane started; None when it is not there any more."""
        if start_ticks(pid) != ticks:
            return None
        try:
            handle = cls(pid, ticks)
        except OSError:
            return None
        if start_ticks(pid) != ticks:
            handle.close()
            return None
        return handle

    @property
    def alive(self) -> bool:
        """Whether the leader runs."""
        return not self._gone.is_set()

    @property
    def exit_text(self) -> str:
        """How the leader ended, in words; "" while it runs or where only its parent could know."""
        code = self._child.returncode if self._child is not None else None
        if code is None:
            return "" if self.alive else "ended"
        if code >= 0:
            return f"exited with {code}"
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
        return f"ended by signal {-code}"

    async def wait(self) -> None:
        """Wait until the leader is gone."""
        await self._gone.wait()

    def terminate(self) -> None:
        """SIGTERM to the leader."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGTERM)

    async def end(self, grace_s: float) -> None:
        """SIGTERM to the leader, SIGKILL to its whole session after ``grace_s`` or as soon as the leader is gone.

        Returns when no process of the session is left, or after a bound.
        """
        self.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._gone.wait()
        await self.sweep()
        self.close()

    async def sweep(self) -> None:
        """Kill everything left in the session; vLLM's engine core and workers outlive a killed API server."""
        deadline_s = time.monotonic() + KILL_BOUND_S
        while time.monotonic() < deadline_s:
            left = members(self.pid, self.ticks)
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(POLL_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._gone.wait()

    def close(self) -> None:
        """Forget the process without touching it."""
        if self._fd >= 0:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        if self._child is not None:
            self._child.poll()
        self._gone.set()


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_ports(host: str, count: int, taken: set[int]) -> int:
    """First of ``count`` neighbouring ports that are free now and not in ``taken``. Raises OSError when none are."""
    for _ in range(64):
        with socket.socket() as probe:
            probe.bind((host, 0))
            base = int(probe.getsockname()[1])
        span = range(base, base + count)
        if span[-1] <= 65_535 and taken.isdisjoint(span) and all(port_is_free(host, port) for port in span):
            return base
    raise OSError(errno.EADDRINUSE, f"no {count} neighbouring free ports")
