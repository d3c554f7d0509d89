"""One engine process kept alive: started, watched, started again with backoff, drained and ended."""

import asyncio
import contextlib
import enum
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from controlplane.fleet.values import WorkerSpec
from controlplane.providers.processes import Handle, boot_id, free_ports, port_is_free, spawn, start_ticks
from controlplane.providers.state_file import EngineFile, EngineFiles
from controlplane.providers.units import HOST, Unit, command

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
HEALTHY_AFTER_S = 60.0
DRAIN_BOUND_S = 30.0
DRAIN_LEAST_S = 1.0
PORT_WAIT_S = 10.0
POLL_S = 0.1
LOG_LIMIT_BYTES = 64 << 20
MARKER = "TWOFOLD_ENGINE"


class Phase(enum.StrEnum):
    """Where in its life a unit is."""

    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    DRAINING = "draining"
    ENDED = "ended"


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What every runner of a provider shares."""

    files: EngineFiles
    changed: Callable[[], None]
    """Called whenever a runner's workers or phase changed."""
    inflight: Callable[[str], int]
    """Requests that routers have running on a worker."""
    taken_ports: Callable[[], set[int]]
    marker: str
    """Value of the environment variable that marks this run directory's engines."""


class Runner:
    """Keeps one unit's process alive until retired. ``adopted`` is a process that an earlier control plane started."""

    def __init__(
        self,
        unit: Unit,
        fingerprint: str,
        profile_file: str,
        around: Surroundings,
        adopted: tuple[Handle, EngineFile] | None = None,
    ) -> None:
        self.unit = unit
        self.fingerprint = fingerprint
        self.phase = Phase.STARTING
        self.restarts = 0
        self.message = ""
        self.port = unit.port
        self._profile_file = profile_file
        self._around = around
        self._handle: Handle | None = None
        self._incarnation = 0
        self._retire = asyncio.Event()
        self._hurry = False
        if adopted is not None:
            self._handle, state = adopted
            self.fingerprint, self.port, self._incarnation = state.fingerprint, state.port, state.incarnation
            self.phase = Phase.RUNNING
        self._task = asyncio.create_task(self._run(), name=f"engine-{unit.name}")

    @property
    def pid(self) -> int | None:
        """Leader of the running process group."""
        return self._handle.pid if self._handle is not None and self._handle.alive else None

    @property
    def retiring(self) -> bool:
        """Whether it is on its way out."""
        return self._retire.is_set()

    @property
    def done(self) -> bool:
        """Whether the process is gone for good."""
        return self._task.done()

    def specs(self) -> list[WorkerSpec]:
        """The unit's workers; none before it has a port."""
        if not self.port or self.phase is Phase.ENDED:
            return []
        launch = self.unit.launch
        return [
            WorkerSpec(
                worker_id=worker_id,
                url=f"http://{HOST}:{self.port + offset}",
                pool=launch.pool,
                profile=launch.profile,
                data_parallel_size=launch.data_parallel_size,
                zone=launch.group.zone,
                node="local",
                incarnation=self._incarnation,
                draining=self.retiring,
            )
            for offset, worker_id in enumerate(self.unit.worker_ids)
        ]

    def retire(self, *, hurry: bool = False) -> None:
        """Begin to end the unit: drained first, at once with ``hurry``."""
        self._hurry |= hurry
        if not self._retire.is_set():
            self._retire.set()
            self._around.changed()

    async def wait(self) -> None:
        """Wait until the process is gone for good."""
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        try:
            while not self.retiring:
                if self._handle is None:
                    try:
                        await self._start()
                    except OSError as error:
                        self._failed(f"cannot start: {error.strerror or error}")
                if self._handle is not None:
                    begun_s = time.monotonic()
                    await self._watch(self._handle)
                    if self.retiring:
                        break
                    if time.monotonic() - begun_s >= HEALTHY_AFTER_S:
                        backoff_s = BACKOFF_FIRST_S
                    await self._bury(self._handle)
                self.restarts += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff_s * random.uniform(0.8, 1.2)):
                        await self._retire.wait()
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
            await self._end()
        except Exception:
            log.exception("the supervision of an engine broke", extra={"unit": self.unit.name})
            await self._end()
        finally:
            self.phase = Phase.ENDED
            self._around.changed()

    async def _start(self) -> None:
        self.phase = Phase.STARTING
        count = len(self.unit.indices)
        if not self.port:
            self.port = free_ports(HOST, count, self._around.taken_ports())
        await self._wait_for_ports()
        argv, extra = command(self.unit, self.port, self._profile_file)
        env = {key: value for key, value in os.environ.items() if not key.startswith("TWOFOLD_")}
        env |= {**extra, MARKER: f"{self._around.marker}:{self.unit.name}"}
        log_path = self._around.files.log_path(self.unit.name)
        _cut(log_path)
        incarnation = max(self._incarnation + 1, int(time.time() * 1000))
        child = spawn(argv, env, log_path, os.getcwd())
        ticks = start_ticks(child.pid, zombies=True) or 0
        self._handle = Handle(child.pid, ticks, child)
        self._incarnation = incarnation
        self._around.files.write(self._state(child.pid, ticks))
        self.phase = Phase.RUNNING
        log.info("engine started", extra={"unit": self.unit.name, "engine_pid": child.pid, "port": self.port})
        self._around.changed()

    async def _wait_for_ports(self) -> None:
        """Wait a while for the ports of a predecessor. Raises OSError when somebody else keeps one."""
        deadline_s = time.monotonic() + PORT_WAIT_S
        for port in range(self.port, self.port + len(self.unit.indices)):
            while not port_is_free(HOST, port):
                if time.monotonic() >= deadline_s:
                    raise OSError(f"port {port} is in use by another process")
                if self.retiring:
                    raise OSError("retired while waiting for its port")
                await asyncio.sleep(POLL_S)

    async def _watch(self, handle: Handle) -> None:
        gone = asyncio.ensure_future(handle.wait())
        retired = asyncio.ensure_future(self._retire.wait())
        try:
            await asyncio.wait({gone, retired}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            retired.cancel()

    async def _bury(self, handle: Handle) -> None:
        """The process ended by itself: nothing of it may stay, and routers shall know at once."""
        tail = await asyncio.to_thread(_last_line, self._around.files.log_path(self.unit.name))
        self._handle = None
        self._incarnation = max(self._incarnation + 1, int(time.time() * 1000))
        self._failed(f"engine {handle.exit_text or 'ended'}" + (f": {tail}" if tail else ""))
        await handle.sweep()
        handle.close()
        self._around.files.remove(self.unit.name)

    def _failed(self, message: str) -> None:
        self.phase = Phase.BACKOFF
        self.message = message[:500]
        log.error("engine down", extra={"unit": self.unit.name, "reason": self.message, "restarts": self.restarts})
        self._around.changed()

    async def _end(self) -> None:
        self.phase = Phase.DRAINING
        handle = self._handle
        if handle is None:
            return
        if not self._hurry:
            await self._drain()
        await handle.end(self.unit.launch.group.stop_grace_s + 1.0)
        self._handle = None
        self._around.files.remove(self.unit.name)
        log.info("engine ended", extra={"unit": self.unit.name, "engine_pid": handle.pid})

    async def _drain(self) -> None:
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < DRAIN_BOUND_S and not self._hurry:
            idle = sum(self._around.inflight(worker_id) for worker_id in self.unit.worker_ids) == 0
            if idle and time.monotonic() - begun_s >= DRAIN_LEAST_S:
                return
            if self._handle is None or not self._handle.alive:
                return
            await asyncio.sleep(POLL_S)

    def _state(self, pid: int, ticks: int) -> EngineFile:
        launch = self.unit.launch
        return EngineFile(
            pid=pid,
            start_ticks=ticks,
            boot_id=boot_id(),
            unit=self.unit.name,
            pool=launch.pool,
            profile=launch.profile,
            zone=launch.group.zone,
            indices=self.unit.indices,
            worker_ids=self.unit.worker_ids,
            port=self.port,
            fingerprint=self.fingerprint,
            incarnation=self._incarnation,
        )


def _cut(path: Path) -> None:
    """Keep a log that grew too large as ``.old``."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > LOG_LIMIT_BYTES:
            os.replace(path, path.with_suffix(".log.old"))


def _last_line(path: Path) -> str:
    """Last line that an engine printed, for the status of a failed start."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def marked(environ: bytes, marker: str) -> bool:
    """Whether a process's raw environment names ``marker`` as the run directory it belongs to."""
    return f"{MARKER}={marker}:".encode() in environ
