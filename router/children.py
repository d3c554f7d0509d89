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

    def _schedule(self, now_s: float) -> None:
        self.start_at_s = now_s + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)
