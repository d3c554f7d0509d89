"""The local provider with real processes: supervision, orphans, ports, adoption, scaling."""

import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.fleets import free_port_base

from controlplane.discovery.fleet_file import fleet_file_from_mapping
from controlplane.fleet.values import WorkerSpec
from controlplane.plan import launch_groups, settle
from controlplane.providers.local import LocalProvider
from controlplane.providers.processes import boot_id, members, port_is_free, spawn, start_ticks

from .conftest import until

FAKE = Path(__file__).parent / "fake_vllm.py"


class Bench:
    """A provider on a run directory, with the desired state of one group."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.python = run_dir / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        self.port = free_port_base(12)
        self.core_port = self.port + 10
        self.workers: dict[str, WorkerSpec] = {}
        self.inflight: dict[str, int] = {}
        self.group: dict[str, Any] = {}
        self.provider = self._provider()

    def _provider(self) -> LocalProvider:
        return LocalProvider(
            self.run_dir,
            self._declare,
            ready=lambda worker_id: True,
            inflight=lambda worker_id: self.inflight.get(worker_id, 0),
        )

    def _declare(self, workers: tuple[WorkerSpec, ...]) -> None:
        self.workers = {spec.worker_id: spec for spec in workers}

    def want(self, replicas: int, *args: str, victims: tuple[str, ...] = (), **group: Any) -> None:
        """Desire so many fake vLLM engines with these arguments."""
        self.group = {
            "profile": "cpu-tiny",
            "engine": "vllm",
            "python": str(self.python),
            "port_base": self.port,
            "engine_args": list(args),
            "stop_grace_s": 1,
            **group,
        }
        file = fleet_file_from_mapping({"pools": [{"name": "p", "models": ["m"], "workers": [self.group]}]})
        groups = launch_groups(file)
        desired = {key: replace(item, replicas=replicas, victims=victims) for key, item in settle(groups, {}).items()}
        self.provider.set_desired(groups, desired, [])

    def abandon(self) -> None:
        """Forget the provider as a SIGKILL would: nothing is ended, nothing is written."""
        if self.provider._task is not None:
            self.provider._task.cancel()
        for runner in self.provider._runners.values():
            runner._task.cancel()
        self.provider = self._provider()

    def state(self, index: int = 0) -> dict[str, Any]:
        """The state file of a worker."""
        found: dict[str, Any] = json.loads((self.run_dir / "engines" / f"p-cpu-tiny-{index}.json").read_text())
        return found

    async def serving(self, count: int) -> dict[str, int]:
        """Wait until so many engines listen; their pids."""

        def listening() -> bool:
            ports = [int(spec.url.rpartition(":")[2]) for spec in self.workers.values()]
            return len(self.provider.pids()) == count == len(ports) and not any(
                port_is_free("127.0.0.1", port) for port in ports
            )

        await until(listening)
        return self.provider.pids()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A started provider; after the test nothing of it runs and its ports are free."""
    made = Bench(tmp_path)
    await made.provider.start()
    yield made
    await made.provider.stop()
    assert made.provider.pids() == {}
    assert all(port_is_free("127.0.0.1", made.port + offset) for offset in range(12))
    assert not list((tmp_path / "engines").glob("*.json"))


async def test_engines_run_in_sessions_of_their_own_and_are_written_down(bench: Bench) -> None:
    bench.want(2)
    pids = await bench.serving(2)
    assert set(bench.workers) == {"p-cpu-tiny-0", "p-cpu-tiny-1"}
    assert bench.workers["p-cpu-tiny-1"].url == f"http://127.0.0.1:{bench.port + 1}"
    for index, pid in enumerate(pids[f"p-cpu-tiny-{i}"] for i in range(2)):
        state = bench.state(index)
        assert (state["pid"], state["start_ticks"], state["boot_id"]) == (pid, start_ticks(pid), boot_id())
        assert os.getsid(pid) == pid
    status = bench.provider.status()[0]
    assert (status.running, status.ready, status.restarting, status.message) == (2, 2, 0, "")


async def test_a_killed_api_server_leaves_no_orphan_and_is_replaced_on_its_port(bench: Bench) -> None:
    bench.want(1, "--core-port", str(bench.core_port))
    pid = (await bench.serving(1))["p-cpu-tiny-0"]
    ticks = start_ticks(pid)
    assert ticks is not None
    await until(lambda: len(members(pid, ticks)) == 2)
    orphan = next(member for member in members(pid, ticks) if member != pid)
    assert os.getpgid(orphan) != pid
    before = bench.workers["p-cpu-tiny-0"].incarnation
    os.kill(pid, signal.SIGKILL)
    await until(lambda: bench.provider.pids().get("p-cpu-tiny-0") not in (None, pid))
    after = (await bench.serving(1))["p-cpu-tiny-0"]
    assert start_ticks(orphan) is None
    assert after != pid
    assert bench.workers["p-cpu-tiny-0"].incarnation > before
    assert bench.workers["p-cpu-tiny-0"].url.endswith(f":{bench.port}")
    assert bench.state()["pid"] == after


async def test_an_engine_that_cannot_start_is_tried_again_and_says_why(bench: Bench) -> None:
    bench.want(1, "--die-at-start")
    status = await until(lambda: [s for s in bench.provider.status() if s.restarting and s.message])
    assert status[0].message == "engine exited with 3: ValueError: no model here"
    await until(lambda: bench.provider._runners["p-cpu-tiny-0"].restarts >= 2)
    bench.want(1)
    await bench.serving(1)
    assert bench.provider.status()[0].restarting == 0


async def test_an_interpreter_that_is_missing_is_a_message(bench: Bench) -> None:
    bench.want(1, python="/nonexistent/python")
    status = await until(lambda: [s for s in bench.provider.status() if s.message])
    assert status[0].message == "cannot start: No such file or directory"


async def test_an_engine_that_ignores_sigterm_is_killed_in_time(bench: Bench) -> None:
    bench.want(1, "--ignore-sigterm", "--core-port", str(bench.core_port))
    pid = (await bench.serving(1))["p-cpu-tiny-0"]
    await bench.provider.stop()
    assert start_ticks(pid) is None
    assert port_is_free("127.0.0.1", bench.core_port)


async def test_the_next_control_plane_adopts_what_runs(bench: Bench) -> None:
    bench.want(2)
    pids = await bench.serving(2)
    incarnations = {name: spec.incarnation for name, spec in bench.workers.items()}
    bench.abandon()
    bench.workers = {}
    await bench.provider.start()
    bench.want(2)
    assert await bench.serving(2) == pids
    assert {name: spec.incarnation for name, spec in bench.workers.items()} == incarnations
    os.kill(pids["p-cpu-tiny-1"], signal.SIGKILL)
    await until(lambda: bench.provider.pids().get("p-cpu-tiny-1") not in (None, pids["p-cpu-tiny-1"]))
    await bench.serving(2)


async def test_orphans_of_an_engine_that_died_while_nobody_watched_are_ended(bench: Bench) -> None:
    bench.want(1, "--core-port", str(bench.core_port))
    pid = (await bench.serving(1))["p-cpu-tiny-0"]
    child = bench.provider._runners["p-cpu-tiny-0"]._handle
    bench.abandon()
    os.kill(pid, signal.SIGKILL)
    assert child is not None
    assert child._child is not None
    child._child.wait()
    assert not port_is_free("127.0.0.1", bench.core_port)
    await bench.provider.start()
    assert port_is_free("127.0.0.1", bench.core_port)
    bench.want(1, "--core-port", str(bench.core_port))
    assert (await bench.serving(1))["p-cpu-tiny-0"] != pid


async def test_engines_that_nobody_wants_any_more_are_ended_at_start(bench: Bench) -> None:
    bench.want(3)
    pids = await bench.serving(3)
    bench.abandon()
    await bench.provider.start()
    bench.want(1)
    await until(lambda: start_ticks(pids["p-cpu-tiny-1"]) is None and start_ticks(pids["p-cpu-tiny-2"]) is None)
    assert await bench.serving(1) == {"p-cpu-tiny-0": pids["p-cpu-tiny-0"]}


async def test_a_state_file_of_another_process_harms_nobody(bench: Bench) -> None:
    bench.want(1)
    await bench.serving(1)
    path = bench.run_dir / "engines" / "p-cpu-tiny-0.json"
    mine = {**bench.state(), "pid": os.getpid(), "unit": "p-cpu-tiny-7"}
    bench.abandon()
    (bench.run_dir / "engines" / "p-cpu-tiny-7.json").write_text(json.dumps(mine))
    (bench.run_dir / "engines" / "p-cpu-tiny-8.json").write_text("{garbage")
    await bench.provider.start()
    bench.want(1)
    await bench.serving(1)
    (bench.run_dir / "engines" / "p-cpu-tiny-8.json").unlink()
    assert path.exists()


async def test_an_engine_started_just_before_a_crash_is_found_by_its_mark(bench: Bench) -> None:
    env = {**os.environ, "TWOFOLD_ENGINE": f"{bench.run_dir}:p-cpu-tiny-5"}
    argv = [str(bench.python), "-m", "x", "--host", "127.0.0.1", "--port", str(bench.port), "--served-model-name", "m"]
    stray = spawn(argv, env, bench.run_dir / "stray.log", "/")
    await until(lambda: not port_is_free("127.0.0.1", bench.port))
    bench.abandon()
    await bench.provider.start()
    assert stray.wait(5) == -signal.SIGKILL


async def test_a_changed_flag_replaces_engines_one_after_the_other(bench: Bench) -> None:
    bench.want(2)
    pids = await bench.serving(2)
    bench.want(2, "--label", "new")
    least = 2

    def replaced() -> bool:
        nonlocal least
        taking = sum(not spec.draining for spec in bench.workers.values())
        least = min(least, taking)
        now = bench.provider.pids()
        return len(now) == 2 and not set(now.values()) & set(pids.values())

    await until(replaced)
    await bench.serving(2)
    assert least == 1


async def test_shrinking_drains_the_victim_first(bench: Bench) -> None:
    bench.want(3)
    pids = await bench.serving(3)
    bench.inflight["p-cpu-tiny-0"] = 1
    bench.want(2, victims=("p-cpu-tiny-0",))
    await until(lambda: bench.workers["p-cpu-tiny-0"].draining)
    assert not bench.workers["p-cpu-tiny-2"].draining
    assert start_ticks(pids["p-cpu-tiny-0"]) is not None
    bench.inflight.clear()
    await until(lambda: "p-cpu-tiny-0" not in bench.workers)
    assert start_ticks(pids["p-cpu-tiny-0"]) is None
    bench.want(3)
    assert (await bench.serving(3))["p-cpu-tiny-2"] == pids["p-cpu-tiny-2"]


async def test_a_port_held_by_a_stranger_is_a_message_and_no_crash(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr("controlplane.providers.runner.PORT_WAIT_S", 0.3)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", bench.port))
        stranger.listen()
        bench.want(1)
        status = await until(lambda: [s for s in bench.provider.status() if s.message])
        assert status[0].message == f"cannot start: port {bench.port} is in use by another process"
    await bench.serving(1)


async def test_without_ports_free_ones_are_picked_and_kept(bench: Bench) -> None:
    bench.want(2, port_base=0)
    pids = await bench.serving(2)
    urls = {name: spec.url for name, spec in bench.workers.items()}
    assert len(set(urls.values())) == 2
    os.kill(pids["p-cpu-tiny-0"], signal.SIGKILL)
    await until(lambda: bench.provider.pids().get("p-cpu-tiny-0") not in (None, pids["p-cpu-tiny-0"]))
    await bench.serving(2)
    assert {name: spec.url for name, spec in bench.workers.items()} == urls
