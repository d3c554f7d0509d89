"""One child process of the launcher: started, watched, started again with backoff."""

import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Sequence

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 10.0
HEALTHY_AFTER_S = 30.0
"""A child that lived this long begins its backoff anew."""
EXIT_USAGE = 2
STARVED_SHARE = 0.5
"""A process that spends more of the time than this in the queue for a CPU cannot be blamed for its silence."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class Child:
    """A command that is to run for as long as the launcher does. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self, name: str, argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self.argv = list(argv)
        self.pass_fds = tuple(pass_fds)
        self.starts = 0
        self.start_at_s = 0.0
        """When it is to be started; only meaningful while it does not run."""
        self._backoff_s = BACKOFF_FIRST_S
        self._started_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._queued: tuple[float, float] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether it was started and its end was not seen yet."""
        return self._process is not None

    @property
    def is_crash_looping(self) -> bool:
        """Whether it died so often that the next start is a second or more away."""
        return not self.running and self._backoff_s > 1.0

    def start(self, now_s: float) -> None:
        """Start it. A command that cannot be executed counts as one that died at once."""
        parent = os.getpid()

        def in_child() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

        self.starts += 1
        self._started_s = now_s
        try:
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, pass_fds=self.pass_fds, preexec_fn=in_child
            )
        except (OSError, subprocess.SubprocessError) as error:
            log.error("child cannot be started", extra={"child": self.name, "reason": str(error)})
            self._schedule(now_s)
            return
        log.info("child started", extra={"child": self.name, "child_pid": self._process.pid, "starts": self.starts})

    def reap(self, now_s: float) -> int | None:
        """Exit code (negative: signal) if it ended since the last call, else None. Then the next start is scheduled."""
        if self._process is None:
            return None
        code = self._process.poll()
        if code is None:
            return None
        self._process = None
        if now_s - self._started_s >= HEALTHY_AFTER_S:
            self._backoff_s = BACKOFF_FIRST_S
        self._schedule(now_s)
        return code

    def send(self, signal_number: int) -> None:
        """Send a signal if it runs."""
        if self._process is not None:
            self._process.send_signal(signal_number)

    def starved(self, now_s: float) -> bool:
        """Whether it waited for a CPU most of the time since the last call; True at the first, which only looks."""
        queued_s = cpu_queue_s(self.pid) if self.pid is not None else None
        if queued_s is None:
            return False
        before, self._queued = self._queued, (now_s, queued_s)
        return before is None or queued_s - before[1] > STARVED_SHARE * (now_s - before[0])

    def watch_no_more(self) -> None:
        """Forget the last call of ``starved``."""
        self._queued = None

    def _schedule(self, now_s: float) -> None:
        self.start_at_s = now_s + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)


def cpu_queue_s(pid: int) -> float | None:
    """Seconds that a process's first thread was ready to run and waited for a CPU; None where that cannot be read."""
    try:
        with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
