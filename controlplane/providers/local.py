"""Runs engines as supervised processes on this machine, so that the fleet is what is desired.

Engines live in sessions of their own: a control plane that is killed leaves them serving, and the next one adopts them
by their state files. A graceful stop ends them all.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from controlplane.fleet.values import WorkerSpec
from controlplane.plan import Desired, Key, LaunchGroup
from controlplane.providers.processes import Handle, boot_id, members, start_ticks
from controlplane.providers.runner import Phase, Runner, Surroundings, marked
from controlplane.providers.state_file import EngineFile, EngineFiles
from controlplane.providers.units import Unit, desired_units, fingerprint

log = logging.getLogger(__name__)

STOP_BOUND_S = 15.0
RECONCILE_RETRY_S = 5.0


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is there of one desired group; numbers are workers."""

    desired: Desired
    running: int = 0
    ready: int = 0
    restarting: int = 0
    message: str = ""


class LocalProvider:
    """Reconciles desired groups into processes.

    ``declare`` takes the full list of workers whenever it changes; ``ready`` says whether a worker takes work, and
    ``inflight`` how many requests routers have on it.
    """

    def __init__(
        self,
        run_dir: Path,
        declare: Callable[[tuple[WorkerSpec, ...]], None],
        *,
        ready: Callable[[str], bool] = lambda worker_id: False,
        inflight: Callable[[str], int] = lambda worker_id: 0,
    ) -> None:
        self._declare = declare
        self._ready = ready
        self._files = EngineFiles(run_dir)
        self._marker = str(run_dir.absolute())
        self._around = Surroundings(
            files=self._files,
            changed=self._changed,
            inflight=inflight,
            taken_ports=self._taken_ports,
            marker=self._marker,
        )
        self._groups: Mapping[Key, LaunchGroup] = {}
        self._desired: Mapping[Key, Desired] = {}
        self._profiles: list[dict[str, Any]] = []
        self._profile_file = ""
        self._runners: dict[str, Runner] = {}
        self._adopted: dict[str, tuple[Handle, EngineFile]] = {}
        self._messages: dict[Key, str] = {}
        self._declared: tuple[WorkerSpec, ...] | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.restarts_total = 0

    async def start(self) -> None:
        """Adopt what an earlier control plane left running, end what cannot be told apart, begin to reconcile."""
        boot = boot_id()
        for state in self._files.read_all():
            handle = Handle.adopt(state.pid, state.start_ticks) if state.boot_id == boot else None
            if handle is None:
                if state.boot_id == boot:
                    # The leader died while nobody watched: what it left behind holds its port.
                    await _sweep_session(state.pid, state.start_ticks)
                self._files.remove(state.unit)
                continue
            log.info("engine adopted", extra={"unit": state.unit, "engine_pid": state.pid, "port": state.port})
            self._adopted[state.unit] = (handle, state)
        await self._end_strays()
        self._task = asyncio.create_task(self._reconcile_loop(), name="local-provider")

    def set_desired(
        self,
        groups: Mapping[Key, LaunchGroup],
        desired: Mapping[Key, Desired],
        profiles: list[dict[str, Any]] | None = None,
    ) -> None:
        """What should run from now on. ``profiles`` are the fleet file's own ones, as mappings."""
        self._groups, self._desired = groups, desired
        if profiles is not None and (profiles != self._profiles or not self._profile_file):
            self._profiles = profiles
            self._profile_file = self._files.write_profiles(profiles)
        self._wake.set()

    def status(self) -> list[GroupStatus]:
        """Desired and actual state of every group."""
        found = []
        for key, desired in self._desired.items():
            runners = [runner for runner in self._runners.values() if runner.unit.launch.key == key]
            running = [runner for runner in runners if runner.pid is not None]
            restarting = [runner for runner in runners if runner.phase is Phase.BACKOFF]
            message = next((runner.message for runner in restarting if runner.message), "")
            found.append(
                GroupStatus(
                    desired=desired,
                    running=sum(len(runner.unit.indices) for runner in running),
                    ready=sum(self._ready(worker_id) for runner in running for worker_id in runner.unit.worker_ids),
                    restarting=sum(len(runner.unit.indices) for runner in restarting),
                    message=message or self._messages.get(key, ""),
                )
            )
        return found

    def pids(self) -> dict[str, int]:
        """Leader of each unit's process group."""
        return {name: runner.pid for name, runner in self._runners.items() if runner.pid is not None}

    async def stop(self) -> None:
        """End every engine, in parallel and within a bound; ports are free afterwards."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for handle, _ in self._adopted.values():
            handle.terminate()
        for runner in self._runners.values():
            runner.retire(hurry=True)
        waits = [asyncio.ensure_future(runner.wait()) for runner in self._runners.values()]
        waits += [asyncio.ensure_future(self._end_adopted(name, 1.0)) for name in list(self._adopted)]
        if waits:
            _, late = await asyncio.wait(waits, timeout=STOP_BOUND_S)
            if late:
                log.warning("engines did not end in time, killing them", extra={"units": len(late)})
                await asyncio.gather(*(self._kill(runner) for runner in self._runners.values()))

    async def _kill(self, runner: Runner) -> None:
        pid = runner.pid
        ticks = start_ticks(pid) if pid is not None else None
        if pid is not None and ticks is not None:
            await _sweep_session(pid, ticks)
            self._files.remove(runner.unit.name)

    def _changed(self) -> None:
        if not self._stopping:
            self._wake.set()

    def _taken_ports(self) -> set[int]:
        taken: set[int] = set()
        for runner in self._runners.values():
            taken.update(range(runner.port, runner.port + len(runner.unit.indices)))
        return taken

    async def _reconcile_loop(self) -> None:
        while True:
            self._wake.clear()
            try:
                self._reconcile()
                self._publish()
            except Exception:
                log.exception("reconciling failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_RETRY_S):
                    await self._wake.wait()

    def _reconcile(self) -> None:
        self._clear_ended()
        wanted: dict[str, Unit] = {}
        for key, launch in self._groups.items():
            desired = self._desired.get(key)
            if desired is not None:
                wanted |= {unit.name: unit for unit in desired_units(launch, desired, self._present(key))}
        rolling = {runner.unit.launch.key for runner in self._runners.values() if runner.retiring}
        for name, runner in self._runners.items():
            unit = wanted.get(name)
            if unit is None:
                runner.retire()
            elif runner.fingerprint != fingerprint(unit, self._profiles) and unit.launch.key not in rolling:
                # Replaced one by one, so that a changed flag does not empty the pool.
                rolling.add(unit.launch.key)
                runner.retire()
        for name in [name for name in self._adopted if name not in wanted]:
            self._end_later(name)
        for name, unit in wanted.items():
            if name not in self._runners:
                self._runners[name] = Runner(
                    unit,
                    fingerprint(unit, self._profiles),
                    self._profile_file,
                    self._around,
                    self._adopted.pop(name, None),
                )

    def _clear_ended(self) -> None:
        for name in [name for name, runner in self._runners.items() if runner.done]:
            runner = self._runners.pop(name)
            self.restarts_total += runner.restarts

    def _present(self, key: Key) -> set[int]:
        present: set[int] = set()
        for runner in self._runners.values():
            if runner.unit.launch.key == key and not runner.retiring:
                present.update(runner.unit.indices)
        for _, state in self._adopted.values():
            if (state.pool, state.profile, state.zone) == key:
                present.update(state.indices)
        return present

    def _publish(self) -> None:
        specs = [spec for runner in self._runners.values() for spec in runner.specs()]
        declared = tuple(sorted(specs, key=lambda spec: spec.worker_id))
        if declared != self._declared:
            self._declared = declared
            self._declare(declared)

    def _end_later(self, name: str) -> None:
        log.info("ending an engine that nobody wants any more", extra={"unit": name})
        task = asyncio.create_task(self._end_adopted(name, 5.0), name=f"end-{name}")
        task.add_done_callback(lambda _: self._changed())

    async def _end_adopted(self, name: str, grace_s: float) -> None:
        entry = self._adopted.pop(name, None)
        if entry is not None:
            await entry[0].end(grace_s)
            self._files.remove(name)

    async def _end_strays(self) -> None:
        """End engines of this run directory without a state file: a control plane died between start and writing it."""
        known = {handle.pid for handle, _ in self._adopted.values()}
        for pid in await asyncio.to_thread(_marked_leaders, self._marker):
            ticks = start_ticks(pid)
            if pid not in known and ticks is not None:
                log.warning("ending an engine without state", extra={"engine_pid": pid})
                await _sweep_session(pid, ticks)


def _marked_leaders(marker: str) -> list[int]:
    """Session leaders whose environment names ``marker`` as the run directory they belong to."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            if os.getsid(int(entry)) == int(entry) and marked(Path(f"/proc/{entry}/environ").read_bytes(), marker):
                found.append(int(entry))
    return found


async def _sweep_session(leader: int, ticks: int) -> None:
    """SIGKILL all of a session until none is left, bounded."""
    for _ in range(100):
        left = members(leader, ticks)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, 9)
        await asyncio.sleep(0.05)
