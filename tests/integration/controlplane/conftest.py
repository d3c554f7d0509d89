"""A control plane in this process, with real sockets, and stub engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from controlplane.app import ControlPlane
from controlplane.discovery.fleet_file import load_fleet_file
from controlplane.fleet.values import FleetRules
from controlplane.server import Server
from controlplane.store import FileStore
from twofold.v1 import admin_pb2_grpc, autoscaler_pb2_grpc, fleet_pb2_grpc, router_pb2_grpc

from .stub_engine import StubEngine

RULES = FleetRules(gone_after_s=1.0, stall_after_s=0.5)


class Running:
    """A control plane, its server and a channel to it."""

    def __init__(self, run_dir: Path, token: str) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "fleet.yaml"
        self.token = token
        self.metadata = [("authorization", f"Bearer {token}")] if token else []

    async def start(self, mapping: dict[str, Any] | None = None) -> "Running":
        """Start with the fleet file as it is, or with ``mapping`` written to it."""
        if mapping is not None:
            self.path.write_text(yaml.safe_dump(mapping))
        file = load_fleet_file(self.path)
        store = FileStore(self.run_dir / "state.json")
        self.app = ControlPlane(file, self.path, self.run_dir, store, RULES)
        self.server = Server(self.app, token=self.token)
        await self.server.start("127.0.0.1", 0)
        await self.app.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.fleet: Any = fleet_pb2_grpc.FleetServiceStub(self.channel)
        self.router: Any = router_pb2_grpc.RouterServiceStub(self.channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.autoscaler: Any = autoscaler_pb2_grpc.AutoscalerServiceStub(self.channel)
        return self

    async def stop(self) -> None:
        """Stop gracefully."""
        await self.channel.close()
        await self.server.stop()
        await self.app.stop()

    async def restart(self) -> None:
        """Stop, and start anew from the same directory."""
        await self.stop()
        await self.start()


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """``await start(mapping, token="")``: a running control plane, stopped after the test."""
    started: list[Running] = []

    async def begin(mapping: dict[str, Any], token: str = "") -> Running:
        run_dir = tmp_path / f"run{len(started)}"
        run_dir.mkdir()
        running = await Running(run_dir, token).start(mapping)
        started.append(running)
        return running

    yield begin
    for running in started:
        await running.stop()


@pytest.fixture
async def engines() -> AsyncIterator[Callable[[int], Awaitable[list[StubEngine]]]]:
    """``await engines(n)``: n stub engines, stopped after the test."""
    made: list[StubEngine] = []

    async def begin(count: int) -> list[StubEngine]:
        new = [await StubEngine().start() for _ in range(count)]
        made.extend(new)
        return new

    yield begin
    for engine in made:
        await engine.stop()


def watching(*engines: StubEngine, **pool: Any) -> dict[str, Any]:
    """A fleet file that watches these engines."""
    group = {"profile": "cpu-tiny", "urls": [engine.url for engine in engines]}
    return {"pools": [{"name": "p", "models": ["m", "alias"], "workers": [group] if engines else [], **pool}]}


async def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Wait until ``condition()`` is true (it may be awaitable); its value. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.02)
