"""A whole fleet on this machine: control plane, router replicas and (through the control plane) engines."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import grpc
import msgspec
import yaml

from controlplane.discovery.fleet_file import FleetFile
from controlplane.providers.processes import members
from twofold import wire
from twofold.cli.processes import Supervised
from twofold.model.fleet import FleetSnapshot
from twofold.v1 import admin_pb2, admin_pb2_grpc

log = logging.getLogger(__name__)

ROUTER_GRACE_S = 10.0
CONTROL_PLANE_GRACE_S = 20.0
POLL_S = 0.1
CALL_TIMEOUT_S = 3.0


class FleetStartError(RuntimeError):
    """The fleet did not come up; the message says which part and why."""


class Fleet:
    """Runs the processes of a fleet file. Use as ``async with Fleet(...) as fleet: await fleet.wait_ready(60)``.

    ``run_dir`` takes state, logs (``twofold.log``) and the token; a second fleet in the same directory is refused.
    Leaving the context stops routers, then the control plane with its engines, then sweeps what was left behind.
    """

    def __init__(self, file: FleetFile, run_dir: Path | str, *, log_level: str = "info") -> None:
        self.file = file
        self.run_dir = Path(run_dir).absolute()
        self.log_file = self.run_dir / "twofold.log"
        self.token_file = self.run_dir / "token"
        self.log_level = log_level
        self.control_plane: Supervised | None = None
        self.routers: list[Supervised] = []
        self._lock_fd = -1
        self._channel: grpc.aio.Channel | None = None

    @property
    def admin_address(self) -> str:
        """host:port of the control plane's gRPC server."""
        return self.file.control_plane.listen

    @property
    def router_urls(self) -> list[str]:
        """Base URL of each router replica."""
        routers = self.file.routers
        return [f"http://{routers.host}:{routers.port + i}" for i in range(routers.replicas)]

    @property
    def router_admin_urls(self) -> list[str]:
        """Base URL of each replica's admin port."""
        routers = self.file.routers
        return [f"http://127.0.0.1:{routers.admin_port + i}" for i in range(routers.replicas)]

    async def __aenter__(self) -> "Fleet":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start all processes; returns without waiting for them to be ready."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock()
        token = secrets.token_hex(24)
        self.token_file.touch(mode=0o600, exist_ok=True)
        if not self.token_file.read_text().strip():
            self.token_file.write_text(token + "\n")
        fleet_path = self.run_dir / "fleet.yaml"
        fleet_path.write_text(yaml.safe_dump(msgspec.to_builtins(self.file), sort_keys=False))
        try:
            self.control_plane = Supervised(
                "control-plane", self._control_plane_argv(fleet_path), output=self._output()
            )
            await self.control_plane.start()
            for index in range(self.file.routers.replicas):
                router = Supervised(f"router-{index}", self._router_argv(index), output=self._output())
                self.routers.append(router)
                await router.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop everything within bounds; afterwards no process of the fleet runs and its ports are free."""
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None
        await asyncio.gather(*(router.stop(ROUTER_GRACE_S + 5) for router in self.routers))
        self.routers = []
        if self.control_plane is not None:
            await self.control_plane.stop(CONTROL_PLANE_GRACE_S)
            self.control_plane = None
        sweep_engines(self.run_dir)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def snapshot(self) -> FleetSnapshot:
        """The fleet as the control plane sees it. Raises grpc.aio.AioRpcError when it cannot be reached."""
        reply = await self.admin().GetFleet(
            admin_pb2.GetFleetRequest(), timeout=CALL_TIMEOUT_S, metadata=self.metadata()
        )
        return wire.snapshot_from_proto(reply)

    async def set_policy(self, name: str) -> None:
        """Switch the routing policy of the whole fleet."""
        request = admin_pb2.SetPolicyRequest(fields={"name": name})
        await self.admin().SetPolicy(request, timeout=CALL_TIMEOUT_S, metadata=self.metadata())

    def admin(self) -> Any:
        """Stub of AdminService; pass ``metadata=fleet.metadata()`` with each call."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.admin_address)
        return admin_pb2_grpc.AdminServiceStub(self._channel)

    def metadata(self) -> list[tuple[str, str]]:
        """Call metadata with the fleet's token."""
        return [("authorization", "Bearer " + self.token_file.read_text().strip())]

    async def wait_ready(self, timeout_s: float) -> FleetSnapshot:
        """Wait until every worker takes work and every replica says so. Raises FleetStartError on timeout."""
        deadline_s = time.monotonic() + timeout_s
        missing = "the control plane does not answer"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)) as session:
            while time.monotonic() < deadline_s:
                try:
                    snapshot = await self.snapshot()
                    missing = self._not_ready(snapshot) or await self._routers_not_ready(session, snapshot)
                except grpc.aio.AioRpcError as error:
                    missing = f"the control plane does not answer ({error.code().name.lower()})"
                if not missing:
                    return snapshot
                await asyncio.sleep(POLL_S)
        raise FleetStartError(f"the fleet is not ready after {timeout_s:g} s: {missing}; see {self.log_file}")

    def expected_workers(self) -> int:
        """Workers that the fleet file names."""
        groups = [group for pool in self.file.pools for group in pool.workers]
        return sum(len(group.urls) or group.replicas for group in groups)

    def _not_ready(self, snapshot: FleetSnapshot) -> str:
        ready = {target.worker_id for target in snapshot.targets if target.takes_work}
        expected = self.expected_workers()
        return "" if len(ready) >= expected else f"{len(ready)} of {expected} workers are ready"

    async def _routers_not_ready(self, session: aiohttp.ClientSession, snapshot: FleetSnapshot) -> str:
        targets = sum(target.takes_work for target in snapshot.targets)
        for url, admin_url in zip(self.router_urls, self.router_admin_urls, strict=True):
            try:
                async with session.get(f"{url}/ready") as reply:
                    if reply.status != 200:
                        return f"router {url} is not ready ({reply.status})"
                async with session.get(f"{admin_url}/debug/state") as reply:
                    state = await reply.json()
                    if state.get("usable_targets", 0) < targets:
                        return f"router {url} knows {state.get('usable_targets', 0)} of {targets} targets"
                    if len(state.get("control_channel", ())) < self.file.routers.relays:
                        return f"not all relays of router {url} have met their agent"
            except (aiohttp.ClientError, TimeoutError):
                return f"router {url} does not answer"
        return ""

    def _output(self) -> str:
        return str(self.run_dir / "output.log")

    def _control_plane_argv(self, fleet_path: Path) -> list[str]:
        control = self.file.control_plane
        return [
            *(sys.executable, "-m", "controlplane"),
            *("--fleet", str(fleet_path)),
            *("--listen", control.listen),
            *("--metrics-listen", control.metrics),
            *("--run-dir", str(self.run_dir)),
            *("--token-file", str(self.token_file)),
            *("--log-file", str(self.log_file)),
            *("--log-level", self.log_level),
        ]

    def _router_argv(self, index: int) -> list[str]:
        routers = self.file.routers
        return [
            *(sys.executable, "-m", "router"),
            *("--replica-id", f"router-{index}"),
            *("--host", routers.host),
            *("--port", str(routers.port + index)),
            *("--relays", str(routers.relays)),
            *("--control-plane", self.file.control_plane.listen),
            *("--admin-port", str(routers.admin_port + index)),
            *("--run-dir", str(self.run_dir)),
            *("--token-file", str(self.token_file)),
            *("--grace-s", str(ROUTER_GRACE_S)),
            *("--log-file", str(self.log_file)),
            *("--log-level", self.log_level),
        ]

    def _lock(self) -> None:
        import fcntl

        self._lock_fd = os.open(self.run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise FleetStartError(f"a fleet already runs in {self.run_dir}") from None


def sweep_engines(run_dir: Path) -> None:
    """Kill what is left of engines whose state files are still in the run directory (a control plane that was killed).

    All processes of the engine's session die: vLLM's engine core is in another process group than its API server.
    """
    for path in sorted((run_dir / "engines").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text())
            for pid in members(int(state["pid"]), int(state["start_ticks"])):
                log.warning("ending an engine that was left behind", extra={"engine_pid": pid, "state": path.name})
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        path.unlink(missing_ok=True)
