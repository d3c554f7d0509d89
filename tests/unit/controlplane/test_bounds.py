"""What reaches a bound of the control plane, or is merged or late, is counted."""

import asyncio
from typing import Any

import pytest

from controlplane import core as core_module
from controlplane.core import Core
from controlplane.discovery import leases as leases_module
from controlplane.discovery.leases import LeaseError, Leases
from controlplane.feed import SnapshotFeed
from controlplane.fleet.events import PolicyChanged
from controlplane.probes import prober as prober_module
from controlplane.probes.prober import Prober
from controlplane.routers import hub as hub_module
from controlplane.routers.hub import HubError, RouterHub
from twofold.model.fleet import FleetSnapshot, RoutingPolicy
from twofold.v1 import router_pb2

from .builders import spec


def policy_event(version: int) -> PolicyChanged:
    return PolicyChanged(at_s=0.0, version=version, policy=RoutingPolicy())


def test_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "MAX_LEASES", 1)
    leases = Leases()
    leases.register(spec("a"), 10.0, now_s=0.0)
    with pytest.raises(LeaseError):
        leases.register(spec("b"), 10.0, now_s=0.0)
    leases.expire(11.0)
    assert (leases.refused, leases.expired) == (1, 1)


def test_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "MAX_PENDING", 2)
    core = Core(1)
    for version in (1, 2, 3):
        core.push(policy_event(version))
    assert (core.pending, core.dropped) == (2, 1)
    core.flush()
    assert (core.pending, core.dropped) == (0, 1)
    assert core.batch_max.get(0.0) == 2
    assert core.reduce_s == core.reduce_max.get(0.0) > 0.0


async def test_watchers_that_lag() -> None:
    feed = SnapshotFeed(history=3)
    feed.publish(FleetSnapshot(epoch=1, version=1))
    reader = feed.read(0, 0)
    await anext(reader)
    assert feed.snapshot_bytes > 0
    for version in (2, 3, 4, 5):
        feed.publish(FleetSnapshot(epoch=1, version=version))
        if version == 3:
            await anext(reader)
            assert feed.merged == 1
    await anext(reader)
    assert feed.merged == 2
    assert feed.kept == 3
    assert feed.encode_s >= feed.encode_max.get(0.0) > 0.0
    await reader.aclose()


async def test_sessions_and_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_REPLICAS", 1)
    monkeypatch.setattr(hub_module, "MAX_COMMANDS", 1)
    hub = RouterHub(lambda: 1, lambda *_: None, lambda _: None)
    session = hub.connect(router_pb2.RouterHello(replica_id="r0"))
    with pytest.raises(HubError):
        hub.connect(router_pb2.RouterHello(replica_id="r1"))
    first = asyncio.create_task(hub.command("r0", router_pb2.RouterCommand(), 30.0))
    await asyncio.sleep(0)
    assert hub.pending_commands == 1
    with pytest.raises(HubError):
        await hub.command("r0", router_pb2.RouterCommand(), 30.0)
    assert (hub.refused_sessions, hub.refused_commands) == (1, 1)
    hub.disconnect(session)
    with pytest.raises(HubError):
        await first
    assert hub.pending_commands == 0
    hub.close()


async def test_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober_module, "MAX_CONCURRENT", 1)
    monkeypatch.setattr(prober_module, "JITTER", 0.0)

    class Hangs:
        async def probe(self, *_: Any) -> None:
            await asyncio.Event().wait()

    prober = Prober(Hangs(), lambda _: None, lambda _: None, lambda _: (0, 0), lambda: True)  # type: ignore[arg-type]
    prober.set_workers((name, "http://127.0.0.1:1", "m") for name in ("a", "b", "c"))
    prober.start()
    async with asyncio.timeout(10):
        while not prober.deferred:
            await asyncio.sleep(0)
    assert prober.running == 1
    await prober.stop()
