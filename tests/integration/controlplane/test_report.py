"""Report: load to the other replicas, failures to the fleet, commands and their answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from controlplane.routers.load import RECENT_TICKS
from twofold.model.fleet import Health
from twofold.v1 import admin_pb2, autoscaler_pb2, router_pb2

from .conftest import Running, Start, until, watching
from .stub_engine import StubEngine

Engines = Callable[[int], Awaitable[list[StubEngine]]]
ANSWER = router_pb2.Decision(request_id="q", target_id="t", reason="home")


class Replica:
    """A router agent's Report stream. It answers commands unless ``mute``."""

    def __init__(self, running: Running, name: str, *, mute: bool = False) -> None:
        self.name = name
        self.running = running
        self.mute = mute
        self.peers: dict[str, dict[int, int]] = {}
        self.prefixes: list[router_pb2.SentPrefix] = []
        self.gone: list[str] = []
        self.messages = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self.sequence = 0
        self._out: asyncio.Queue[router_pb2.ReportRequest | None] = asyncio.Queue()
        hello = router_pb2.RouterHello(replica_id=name, version="1", relays=1)
        self._out.put_nowait(router_pb2.ReportRequest(hello=hello))
        self.call = running.router.Report(self._requests(), metadata=running.metadata)
        self.task = asyncio.create_task(self._read())

    async def _requests(self) -> AsyncIterator[router_pb2.ReportRequest]:
        while (request := await self._out.get()) is not None:
            yield request

    async def _read(self) -> None:
        async for message in self.call:
            self.messages += 1
            for gone in message.gone:
                self.gone.append(gone.replica_id)
                self.peers.pop(gone.replica_id, None)
            for peer in message.peers:
                rows = {} if peer.full else self.peers.setdefault(peer.replica_id, {})
                rows.update(zip(peer.load.ordinals, peer.load.inflight, strict=True))
                self.peers[peer.replica_id] = rows
                self.prefixes += peer.load.prefixes
            if message.HasField("command") and not self.mute:
                self._answer(message.command)
            await self.reading.wait()

    def _answer(self, command: router_pb2.RouterCommand) -> None:
        result = router_pb2.CommandResult(command_id=command.command_id, replica_id=self.name)
        if command.WhichOneof("command") == "top":
            result.top.requests_per_s = 5
        elif command.explain.request_id in ("", f"of-{self.name}"):
            result.decisions.add().CopyFrom(ANSWER)
        else:
            result.code = grpc.StatusCode.NOT_FOUND.value[0]
        self._out.put_nowait(router_pb2.ReportRequest(result=result))

    def send(self, rows: dict[int, int], *, failures: int = 0, epoch: int | None = None, **extra: Any) -> None:
        """Send a tick: requests in flight by ordinal."""
        self.sequence += 1
        count = len(rows)
        tick = router_pb2.LoadTick(
            epoch=self.running.app.core.epoch if epoch is None else epoch,
            sequence=self.sequence,
            ordinals=list(rows),
            inflight=list(rows.values()),
            decodes=[0] * count,
            queued_prefill_tokens=[1.0] * count,
            queued_prefill_s=[0.5] * count,
            kv_tokens=[0.0] * count,
            stored_tokens=[0.0] * count,
            failures=[failures] * count,
            **extra,
        )
        self._out.put_nowait(router_pb2.ReportRequest(load=tick))

    def put(self, request: router_pb2.ReportRequest) -> None:
        """Send anything."""
        self._out.put_nowait(request)

    async def close(self) -> None:
        """End the stream as a dying process would."""
        self.call.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the control plane ended the stream."""
        await asyncio.gather(self.task, return_exceptions=True)
        return await self.call.code(), await self.call.details()


@pytest.fixture
async def fleet(start: Start, engines: Engines) -> Running:
    """A control plane with two healthy engines."""
    running = await start(watching(*await engines(2)))
    await until(lambda: [r.health for r in running.app.core.state.workers.values()] == [Health.HEALTHY] * 2)
    return running


async def test_load_reaches_the_other_replicas_and_not_its_sender(fleet: Running) -> None:
    one, two, three = (Replica(fleet, name) for name in ("r1", "r2", "r3"))
    await until(lambda: len(fleet.app.hub.connected()) == 3)
    one.send({0: 4, 1: 2}, prefixes=[router_pb2.SentPrefix(ordinal=0, hashes=[11, 12])])
    two.send({0: 1})
    await until(lambda: three.peers == {"r1": {0: 4, 1: 2}, "r2": {0: 1}} and two.peers == {"r1": {0: 4, 1: 2}})
    await until(lambda: one.peers == {"r2": {0: 1}})
    assert [list(prefix.hashes) for prefix in two.prefixes] == [[11, 12]]
    one.send({0: 0})
    await until(lambda: two.peers["r1"] == {0: 0, 1: 2})
    assert fleet.app.hub.inflight(0) == (1, 1)
    for replica in (one, two, three):
        await replica.close()


async def test_a_replica_that_joins_late_learns_everything(fleet: Running) -> None:
    one = Replica(fleet, "r1")
    for value in range(3 * RECENT_TICKS):
        one.send({value % 7: value})
    await until(lambda: fleet.app.hub.ticks == 3 * RECENT_TICKS)
    late = Replica(fleet, "r2")
    await until(lambda: len(late.peers.get("r1", {})) == 7)
    assert late.peers["r1"] == {value % 7: value for value in range(3 * RECENT_TICKS)}
    assert late.messages == 1
    await one.close()
    await late.close()


async def test_a_slow_reader_is_sent_merged_values_not_a_queue(fleet: Running) -> None:
    one, slow = Replica(fleet, "r1"), Replica(fleet, "r2")
    await until(lambda: len(fleet.app.hub.connected()) == 2)
    slow.reading.clear()
    total = 20_000
    for value in range(total):
        one.send(dict.fromkeys(range(40), value))
        if value % 100 == 0:
            await asyncio.sleep(0)
    await until(lambda: fleet.app.hub.ticks >= total, 60)
    slow.reading.set()
    await until(lambda: slow.peers.get("r1", {}).get(39) == total - 1, 60)
    assert slow.peers["r1"] == dict.fromkeys(range(40), total - 1)
    assert slow.messages < total / 4
    await one.close()
    await slow.close()


async def test_a_replica_that_leaves_is_forgotten_after_a_moment(fleet: Running) -> None:
    one, two = Replica(fleet, "r1"), Replica(fleet, "r2")
    one.send({0: 4})
    await until(lambda: two.peers == {"r1": {0: 4}})
    await one.close()
    await until(lambda: two.gone == ["r1"])
    assert fleet.app.hub.inflight(0) == (0, 0)
    await two.close()


async def test_a_replica_that_comes_straight_back_starts_anew(fleet: Running) -> None:
    one, two = Replica(fleet, "r1"), Replica(fleet, "r2")
    one.send({0: 4, 1: 7})
    await until(lambda: two.peers == {"r1": {0: 4, 1: 7}})
    again = Replica(fleet, "r1")
    assert await one.status() == (grpc.StatusCode.ABORTED, "replaced by a newer stream of the same replica")
    again.send({1: 1})
    await until(lambda: two.peers == {"r1": {1: 1}})
    assert fleet.app.hub.connected() == ["r1", "r2"]
    await again.close()
    await two.close()


async def test_ticks_of_another_epoch_are_dropped(fleet: Running) -> None:
    one, two = Replica(fleet, "r1"), Replica(fleet, "r2")
    one.send({0: 9}, epoch=1)
    one.send({1: 3})
    await until(lambda: two.peers == {"r1": {1: 3}})
    assert fleet.app.hub.stale_ticks == 1
    await one.close()
    await two.close()


async def test_two_replicas_that_fail_make_a_worker_suspect(fleet: Running) -> None:
    one, two = Replica(fleet, "r1"), Replica(fleet, "r2")
    name = next(n for n, ordinal in fleet.app.core.state.ordinals.held.items() if ordinal == 0)
    one.send({0: 1}, failures=1)
    two.send({0: 1}, failures=1)
    reasons = []

    def was_suspect() -> bool:
        reasons[:] = [entry.reason for entry in fleet.app.core.state.logs[name]]
        return "suspect" in reasons and reasons[-1] in ("healthy", "unreachable-by-routers")

    await until(was_suspect)
    await until(lambda: fleet.app.core.state.workers[name].health is Health.HEALTHY)
    await one.close()
    await two.close()


async def test_a_hung_engine_is_found_by_what_routers_have_on_it(start: Start, engines: Engines) -> None:
    (engine,) = await engines(1)
    engine.running, engine.iterations = 1, 100
    running = await start(watching(engine))
    await until(lambda: running.app.core.warm)
    one = Replica(running, "r1")
    one.send({0: 1})
    await until(lambda: any(t.health is Health.SUSPECT for t in running.app.core.snapshot.targets))
    assert [c.value for t in running.app.core.snapshot.targets for c in t.conditions] == ["stalled"]
    engine.iterations += 1
    await until(lambda: all(t.takes_work for t in running.app.core.snapshot.targets))
    await one.close()


async def test_explain_asks_all_for_a_past_request_and_one_for_a_hypothetical(fleet: Running) -> None:
    one, two = Replica(fleet, "r1"), Replica(fleet, "r2")
    await until(lambda: len(fleet.app.hub.connected()) == 2)
    subject = router_pb2.ExplainCommand(request_id="of-r2")
    reply = await fleet.admin.Explain(admin_pb2.ExplainRequest(subject=subject))
    assert list(reply.decisions) == [ANSWER]
    subject = router_pb2.ExplainCommand(request=router_pb2.HypotheticalRequest(path="/v1/completions", body=b"{}"))
    reply = await fleet.admin.Explain(admin_pb2.ExplainRequest(subject=subject))
    assert list(reply.decisions) == [ANSWER]
    unknown = admin_pb2.ExplainRequest(subject=router_pb2.ExplainCommand(request_id="nobody"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.admin.Explain(unknown)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    one.mute = True
    reply = await fleet.admin.Explain(
        admin_pb2.ExplainRequest(subject=router_pb2.ExplainCommand(request_id="of-r2"), deadline_s=0.2)
    )
    assert list(reply.silent_replicas) == ["r1"]
    await one.close()
    await two.close()


async def test_explain_without_routers_is_unavailable(fleet: Running) -> None:
    request = admin_pb2.ExplainRequest(subject=router_pb2.ExplainCommand(request_id="x"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.admin.Explain(request)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_commands_of_a_replica_that_dies_do_not_wait_for_their_deadline(fleet: Running) -> None:
    one = Replica(fleet, "r1", mute=True)
    await until(lambda: fleet.app.hub.connected())
    request = admin_pb2.ExplainRequest(subject=router_pb2.ExplainCommand(request_id="x"), deadline_s=30)
    asked = asyncio.ensure_future(fleet.admin.Explain(request))
    await until(lambda: one.messages == 1)
    await one.close()
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(asked, 10)
    assert not fleet.app.hub._pending


async def test_top_and_routers_and_describe_show_the_load(fleet: Running) -> None:
    one = Replica(fleet, "r1")
    one.send({0: 3, 1: 0})
    await until(lambda: fleet.app.hub.ticks == 1)
    top = await fleet.admin.Top(admin_pb2.TopRequest())
    assert [entry.top.requests_per_s for entry in top.routers] == [5]
    assert [load.inflight for load in top.loads if load.inflight] == [3]
    routers = await fleet.admin.ListRouters(admin_pb2.ListRoutersRequest())
    assert [(r.hello.replica_id, r.connected, r.inflight) for r in routers.routers] == [("r1", True, 3)]
    name = next(n for n, ordinal in fleet.app.core.state.ordinals.held.items() if ordinal == 0)
    described = await fleet.admin.DescribeWorker(admin_pb2.DescribeWorkerRequest(worker_id=name))
    assert [(load.replica_id, load.inflight) for load in described.loads] == [("r1", 3)]
    assert described.profile.name == "cpu-tiny"
    await one.close()


async def test_drain_says_when_a_worker_may_be_stopped(fleet: Running) -> None:
    one = Replica(fleet, "r1")
    one.send({0: 2})
    await until(lambda: fleet.app.hub.ticks == 1)
    name = next(n for n, ordinal in fleet.app.core.state.ordinals.held.items() if ordinal == 0)
    reply = await fleet.admin.Drain(admin_pb2.DrainRequest(worker_id=name))
    assert (reply.inflight, reply.safe_to_delete, reply.targets[0].draining) == (2, False, True)
    one.send({0: 0})
    await until(lambda: fleet.app.hub.inflight(0) == (0, 0))
    # The replica never watched: it cannot know that the worker drains.
    await asyncio.sleep(0.6)
    assert not (await fleet.admin.Drain(admin_pb2.DrainRequest(worker_id=name))).safe_to_delete
    fleet.app.hub.saw_snapshot("r1", fleet.app.core.epoch, fleet.app.core.snapshot.version)
    assert (await fleet.admin.Drain(admin_pb2.DrainRequest(worker_id=name))).safe_to_delete
    reply = await fleet.admin.Uncordon(admin_pb2.UncordonRequest(worker_id=name))
    assert not reply.targets[0].draining
    await one.close()


async def test_demand_is_summed_over_replicas(fleet: Running) -> None:
    one, two = Replica(fleet, "r1"), Replica(fleet, "r2")
    await until(lambda: len(fleet.app.hub.connected()) == 2)
    call = fleet.autoscaler.WatchDemand(autoscaler_pb2.WatchDemandRequest(interval_s=1))
    first = asyncio.ensure_future(call.read())
    await asyncio.sleep(0.2)
    tick = router_pb2.DemandTick(interval_s=1, pools=[router_pb2.PoolDemand(pool="p", requests=3)])
    for replica in (one, two):
        replica.put(router_pb2.ReportRequest(demand=tick))
    demand = await first
    assert [(pool.pool, pool.requests) for pool in demand.pools] == [("p", 6)]
    assert len(demand.targets) == 2
    assert [pool.requests for pool in (await call.read()).pools] == [0]
    call.cancel()
    await one.close()
    await two.close()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (router_pb2.ReportRequest(), None),
        (router_pb2.ReportRequest(hello=router_pb2.RouterHello(replica_id="r1")), "hello"),
        (router_pb2.ReportRequest(demand=router_pb2.DemandTick(interval_s=float("inf"))), "demand.interval_s"),
        (router_pb2.ReportRequest(result=router_pb2.CommandResult(command_id="c999")), None),
    ],
)
async def test_messages_that_no_router_would_send(
    fleet: Running, request_: router_pb2.ReportRequest, field: str | None
) -> None:
    one = Replica(fleet, "r1")
    await until(lambda: fleet.app.hub.connected())
    one.put(request_)
    if field is None:
        one.send({0: 1})
        await until(lambda: fleet.app.hub.ticks == 1)
        await one.close()
    else:
        code, details = await one.status()
        assert (code, details.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    await until(lambda: not fleet.app.hub.connected())


async def test_a_tick_with_uneven_columns_ends_the_stream(fleet: Running) -> None:
    one = Replica(fleet, "r1")
    tick = router_pb2.LoadTick(epoch=fleet.app.core.epoch, sequence=1, ordinals=[1, 2], inflight=[1])
    one.put(router_pb2.ReportRequest(load=tick))
    assert await one.status() == (grpc.StatusCode.INVALID_ARGUMENT, "load.inflight: 1 values for 2 ordinals")


@pytest.mark.parametrize("name", ["", "a b", "x" * 200, "a/b"])
async def test_replica_ids_are_checked(fleet: Running, name: str) -> None:
    code, details = await Replica(fleet, name).status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("hello.replica_id")
