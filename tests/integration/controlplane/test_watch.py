"""Watch: snapshot, deltas, resume, coalescing, warm-up; what probes make of engines."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
import yaml

from twofold import wire
from twofold.model.fleet import FleetSnapshot, Health
from twofold.model.reasons import TargetCondition
from twofold.v1 import admin_pb2, fleet_pb2

from .conftest import Start, until, watching
from .stub_engine import StubEngine

Engines = Callable[[int], Awaitable[list[StubEngine]]]


class Watcher:
    """Follows Watch as a router agent would."""

    def __init__(self, running: Any, replica: str = "r1", epoch: int = 0, version: int = 0) -> None:
        request = fleet_pb2.WatchRequest(replica_id=replica, epoch=epoch, version=version)
        self.call = running.fleet.Watch(request, metadata=running.metadata)
        self.snapshot: FleetSnapshot | None = None
        self.kinds: list[str | None] = []
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async for message in self.call:
            kind = message.WhichOneof("update")
            if kind == "snapshot":
                self.snapshot = wire.snapshot_from_proto(message.snapshot)
            elif kind == "delta":
                assert self.snapshot is not None
                self.snapshot = wire.apply_delta(self.snapshot, message.delta)
            self.kinds.append(kind)

    def health(self) -> list[Health]:
        """Health of all targets."""
        return [target.health for target in self.snapshot.targets] if self.snapshot is not None else []

    def conditions(self) -> set[TargetCondition]:
        """Conditions of all targets."""
        targets = self.snapshot.targets if self.snapshot is not None else ()
        return {condition for target in targets for condition in target.conditions}

    async def close(self) -> None:
        """End the call."""
        self.call.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_engines_are_found_probed_and_published(start: Start, engines: Engines) -> None:
    two = await engines(2)
    running = await start(watching(*two))
    watcher = Watcher(running)
    await until(lambda: watcher.health() == [Health.HEALTHY] * 2)
    assert watcher.snapshot is not None
    target = watcher.snapshot.targets[0]
    assert (target.facts.version, target.facts.block_size_tokens, target.facts.kv_capacity_tokens) == (
        "0.32.0",
        16,
        1600,
    )
    assert target.facts.served_models == ("m",)
    assert len(target.facts.tokenizer_digest) == 32
    assert target.incarnation == 1_000_000
    assert watcher.snapshot.pools[0].max_model_len_tokens == 2048
    assert {target.ordinal for target in watcher.snapshot.targets} == {0, 1}
    assert await _same_as_get_fleet(running, watcher)
    await watcher.close()


async def _same_as_get_fleet(running: Any, watcher: Watcher) -> bool:
    fleet = wire.snapshot_from_proto(await running.admin.GetFleet(admin_pb2.GetFleetRequest()))
    assert watcher.snapshot is not None
    return [t.target_id for t in fleet.targets] == [t.target_id for t in watcher.snapshot.targets]


async def test_a_dead_engine_becomes_suspect_then_gone_then_returns(start: Start, engines: Engines) -> None:
    (engine,) = await engines(1)
    running = await start(watching(engine))
    watcher = Watcher(running)
    await until(lambda: watcher.health() == [Health.HEALTHY])
    await engine.stop()
    await until(lambda: watcher.health() == [Health.SUSPECT])
    await until(lambda: watcher.health() == [Health.GONE])
    assert TargetCondition.PROBE_FAILING in watcher.conditions()
    engine.started_s += 50
    await engine.start()
    await until(lambda: watcher.health() == [Health.HEALTHY])
    assert watcher.snapshot is not None
    assert watcher.snapshot.targets[0].incarnation == 1_050_000
    reply = await running.admin.DescribeWorker(
        admin_pb2.DescribeWorkerRequest(worker_id=watcher.snapshot.targets[0].worker_id)
    )
    reasons = [event.reason for event in reply.events if event.reason in ("healthy", "suspect", "gone")]
    assert reasons == ["healthy", "gone", "suspect", "healthy"]
    await watcher.close()


async def test_an_engine_that_scales_is_reconfiguring(start: Start, engines: Engines) -> None:
    (engine,) = await engines(1)
    running = await start(watching(engine))
    watcher = Watcher(running)
    await until(lambda: watcher.health() == [Health.HEALTHY])
    engine.scaling = True
    await until(lambda: watcher.health() == [Health.RECONFIGURING])
    engine.scaling = False
    await until(lambda: watcher.health() == [Health.HEALTHY])
    await watcher.close()


async def test_odd_engines_are_visible(start: Start, engines: Engines) -> None:
    three = await engines(3)
    three[2].block_size, three[2].tokens = 32, [9, 9]
    running = await start(watching(*three))
    watcher = Watcher(running)
    await until(lambda: watcher.health() == [Health.HEALTHY] * 3)
    await until(
        lambda: watcher.conditions() == {TargetCondition.BLOCK_SIZE_MISMATCH, TargetCondition.TOKENIZER_MISMATCH}
    )
    await watcher.close()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"null", b'{"data": 7}', b"\xff\xfe", b"[" * 100_000, b"x" * 1_000_000]
)
async def test_garbage_from_an_engine_is_a_failed_probe_and_nothing_more(
    start: Start, engines: Engines, body: bytes
) -> None:
    bad, good = await engines(2)
    bad.models_body = body
    running = await start(watching(bad, good))
    watcher = Watcher(running)
    await until(lambda: sorted(watcher.health()) == [Health.HEALTHY, Health.STARTING])
    await watcher.close()


async def test_endless_metrics_are_cut_off(start: Start, engines: Engines) -> None:
    (engine,) = await engines(1)
    engine.metrics_body = b"vllm:num_requests_running 1\n" * 200_000
    running = await start(watching(engine))
    await until(lambda: any(r.message for r in running.app.core.state.workers.values()))
    assert "more than" in next(iter(running.app.core.state.workers.values())).message


async def test_a_slow_engine_has_one_probe_in_flight(start: Start, engines: Engines) -> None:
    (engine,) = await engines(1)
    engine.delay_s = 0.4
    running = await start(watching(engine))
    await until(lambda: engine.requests.get("/metrics", 0) >= 2)
    worker = next(iter(running.app.core.state.workers))
    for _ in range(20):
        running.app._prober.probe_soon(worker)
        await asyncio.sleep(0)
    await until(lambda: engine.requests.get("/metrics", 0) >= 3)
    assert engine.most_in_flight == 1


async def test_a_router_resumes_where_it_was_and_a_stranger_starts_over(start: Start, engines: Engines) -> None:
    two = await engines(2)
    running = await start(watching(*two))
    first = Watcher(running)
    await until(lambda: first.health() == [Health.HEALTHY] * 2)
    held = first.snapshot
    assert held is not None
    await first.close()
    worker = held.targets[0].worker_id
    await running.admin.Cordon(admin_pb2.CordonRequest(worker_id=worker))
    again = Watcher(running, epoch=held.epoch, version=held.version)
    again.snapshot = held
    await until(lambda: again.snapshot is not None and again.snapshot.targets[0].cordoned)
    assert again.kinds == ["delta"]
    stranger = Watcher(running, replica="r2", epoch=held.epoch - 1, version=held.version)
    await until(lambda: stranger.snapshot is not None)
    assert stranger.kinds == ["snapshot"]
    await again.close()
    await stranger.close()


async def test_after_a_restart_routers_hear_nothing_until_the_fleet_is_known(start: Start, engines: Engines) -> None:
    """A control plane that just started must not tell routers that nothing is usable."""
    three = await engines(3)
    running = await start(watching(*three))
    before = Watcher(running)
    await until(lambda: before.health() == [Health.HEALTHY] * 3)
    held = before.snapshot
    assert held is not None
    await before.close()
    for engine in three:
        engine.delay_s = 0.3
    await running.restart()
    after = Watcher(running, epoch=held.epoch, version=held.version)
    await until(lambda: after.snapshot is not None)
    assert next(kind for kind in after.kinds if kind) == "snapshot", "keepalives apart"
    assert after.health() == [Health.HEALTHY] * 3
    assert after.snapshot is not None
    assert after.snapshot.epoch > held.epoch
    assert [t.incarnation for t in after.snapshot.targets] == [t.incarnation for t in held.targets]
    await after.close()


async def test_cordons_policy_and_leases_survive_a_restart(start: Start, engines: Engines) -> None:
    listed, leased = await engines(2)
    running = await start(watching(listed))
    request = fleet_pb2.RegisterRequest(
        worker_id="w", url=leased.url, pool="p", profile="h100-8b-tp1", lease_ttl_s=60, zone="z", incarnation=5
    )
    await until(lambda: running.app.core.state.config_version)
    lease = await running.fleet.Register(request)
    assert lease.renew_within_s == pytest.approx(20)
    watcher = Watcher(running)
    await until(lambda: watcher.health() == [Health.HEALTHY] * 2)
    await running.admin.Cordon(admin_pb2.CordonRequest(worker_id="w"))
    await running.admin.SetPolicy(admin_pb2.SetPolicyRequest(fields={"name": "round_robin", "alpha": "0.5"}))
    await watcher.close()
    await running.restart()
    watcher = Watcher(running)
    await until(lambda: watcher.health() == [Health.HEALTHY] * 2)
    assert watcher.snapshot is not None
    assert (watcher.snapshot.policy.name, watcher.snapshot.policy.alpha) == ("round_robin", 0.5)
    found = {target.worker_id: target for target in watcher.snapshot.targets}
    assert (found["w"].cordoned, found["w"].zone) == (True, "z")
    await running.fleet.Deregister(fleet_pb2.DeregisterRequest(worker_id="w", lease_id=lease.lease_id))
    await until(lambda: len(watcher.health()) == 1)
    await watcher.close()


async def test_the_fleet_file_is_taken_over_when_it_changes_and_kept_when_it_is_bad(
    start: Start, engines: Engines
) -> None:
    one, two = await engines(2)
    running = await start(watching(one))
    watcher = Watcher(running)
    await until(lambda: watcher.health() == [Health.HEALTHY])
    running.path.write_text("pools: [{name: p}]")
    await until(lambda: running.app.watch.fault)
    assert running.app.watch.fault.startswith(f"{running.path}:1: pools[0]: ")
    assert watcher.health() == [Health.HEALTHY]
    running.path.write_text(yaml.safe_dump(watching(one, two)))
    running.app.watch.reload()
    await until(lambda: watcher.health() == [Health.HEALTHY] * 2)
    assert running.app.watch.fault == ""
    running.path.write_text(yaml.safe_dump(watching(two)))
    await until(lambda: len(watcher.health()) == 1)
    assert "delta" in watcher.kinds
    await watcher.close()


async def test_stopping_ends_the_streams(start: Start, engines: Engines) -> None:
    running = await start(watching(*await engines(1)))
    call = running.fleet.Watch(fleet_pb2.WatchRequest(replica_id="r1"))
    await call.read()
    stop = asyncio.create_task(running.server.stop())
    assert await call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await stop
