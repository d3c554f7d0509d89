"""Child processes of ``twofold up``: started, restarted with backoff, stopped in order."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
HEALTHY_AFTER_S = 30.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Supervised:
    """One child that is started again whenever it ends, until ``stop``.

    ``output`` is the file that takes what the child prints itself; its log goes where its own flags say.
    """

    def __init__(self, name: str, argv: Sequence[str], *, output: str, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.restarts = 0
        self._argv = list(argv)
        self._output = output
        self._env = dict(os.environ if env is None else env)
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the running child, None between two lives."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start the child; raises OSError when it cannot be executed at all."""
        await self._spawn()
        self._task = asyncio.create_task(self._keep_alive(), name=f"supervise-{self.name}")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``; returns when the child is gone."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), grace_s)
            except TimeoutError:
                log.warning("child did not stop in time, killing it", extra={"child": self.name, "grace_s": grace_s})
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _spawn(self) -> None:
        descriptor = os.open(self._output, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=self._env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        finally:
            os.close(descriptor)
        log.info("child started", extra={"child": self.name, "child_pid": self._process.pid})

    async def _keep_alive(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        while not self._stopping:
            assert self._process is not None
            started_s = time.monotonic()
            code = await self._process.wait()
            if self._stopping:
                return
            lived_s = time.monotonic() - started_s
            backoff_s = BACKOFF_FIRST_S if lived_s >= HEALTHY_AFTER_S else min(BACKOFF_MAX_S, backoff_s * 2)
            log.error(
                "child ended, starting it again",
                extra={"child": self.name, "code": code, "lived_s": round(lived_s, 1), "backoff_s": backoff_s},
            )
            await asyncio.sleep(backoff_s)
            self.restarts += 1
            try:
                await self._spawn()
            except OSError:
                log.exception("child cannot be started", extra={"child": self.name})
