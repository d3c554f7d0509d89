"""A replica and its control plane: snapshots, outages, load of peers, demand, commands."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import msgspec

from router.routing import table as tables
from router.routing.accounts import AccountsReader
from router.routing.table import RoutingTable
from router.shm.layout import regions_of
from router.shm.replica import AGENT, SharedReplica
from twofold.model.fleet import EngineLoad, Health, RoutingPolicy
from twofold.v1 import router_pb2

from .fakes import FakeControlPlane, FakeWorker, Replica, fleet, target, until
from .test_lifecycle import complete


def attached(replica: Replica) -> SharedReplica:
    (directory,) = replica.shared_directories()
    return SharedReplica.attach(directory)


def published(shared: SharedReplica) -> RoutingTable:
    read = shared.board.read()
    assert read is not None
    return tables.decode(read[1])


async def test_changes_are_published_and_engine_loads_are_not(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0"), target("t-1")))
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 2)
        shared = attached(replica)
        slots = published(shared).slots
        assert sorted(slots) == ["t-0", "t-1"]
        for version in range(2, 12):
            load = EngineLoad(observed_s=float(version), running=version)
            await control_plane.set(fleet(target("t-0", load=load), target("t-1"), version=version))
        await until(lambda: received(replica, session, 11), "the load figures arrive")
        assert shared.board.version == 1

        await control_plane.set(fleet(target("t-0", cordoned=True), target("t-1"), target("t-2"), version=12))
        await until(lambda: shared.board.version == 2, "the change is published")
        await replica.usable(session, 2)
        table = published(shared)
        assert {name: table.slots[name] for name in slots} == slots, "a target changed its slot"
        assert table.snapshot.version == 12
        assert table.snapshot.targets[0].cordoned

        await control_plane.set(fleet(target("t-1"), target("t-2"), version=13))
        await until(lambda: shared.board.version == 3, "the removal is published")
        assert sorted(published(shared).slots) == ["t-1", "t-2"]
        shared.close()


async def received(replica: Replica, session: aiohttp.ClientSession, version: int) -> bool:
    state = await replica.state(session)
    return bool(state["received"]) and state["received"]["version"] >= version


async def test_an_outage_of_the_control_plane_is_survived_and_the_watch_resumes(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    worker.release.set()
    await control_plane.set(fleet(target("t-0", worker.url), epoch=5, version=40))
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 1)
        await control_plane.stop()
        await until(lambda: disconnected(replica, session), "the agent notices")
        assert "[DONE]" in await complete(replica, session)
        async with session.get(f"{replica.admin}/ready") as reply:
            assert reply.status == 200
        await control_plane.set(fleet(target("t-0", worker.url), target("t-1", worker.url), epoch=5, version=41))
        await control_plane.start()
        await replica.usable(session, 2)
        assert control_plane.watches == [(0, 0), (5, 40)]
        assert "[DONE]" in await complete(replica, session)


async def disconnected(replica: Replica, session: aiohttp.ClientSession) -> bool:
    return not (await replica.state(session))["control_plane"]["connected"]


async def test_a_new_control_plane_that_knows_nothing_yet_does_not_empty_the_fleet(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    worker.release.set()
    await control_plane.set(fleet(target("t-0", worker.url), target("t-1", worker.url), epoch=1))
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 2)
        for version, targets in enumerate(
            ((), (target("t-0", worker.url, health=Health.STARTING),), (target("t-0", worker.url),)), start=1
        ):
            await control_plane.set(fleet(*targets, epoch=2, version=version))
            await until(lambda version=version: received_epoch(replica, session, 2, version), "the new epoch arrives")
            assert (await replica.state(session))["usable_targets"] == 2
            assert "[DONE]" in await complete(replica, session)
        gone = target("t-1", worker.url, health=Health.GONE)
        await control_plane.set(fleet(target("t-0", worker.url), gone, epoch=2, version=4))
        await replica.usable(session, 1)
        assert (await replica.state(session))["snapshot"]["epoch"] == 2


async def received_epoch(replica: Replica, session: aiohttp.ClientSession, epoch: int, version: int) -> bool:
    return (await replica.state(session))["received"] == {"epoch": epoch, "version": version}


async def test_a_replica_that_starts_without_control_plane_serves_from_disk(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    worker.release.set()
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 1)
        await until((tmp_path / "routers" / "r0" / "snapshot.msgpack").exists, "the snapshot on disk")
    await control_plane.stop()
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 1)
        assert (await replica.state(session))["source"] == "disk"
        assert "[DONE]" in await complete(replica, session)
        await control_plane.set(fleet(target("t-0", worker.url), target("t-1", worker.url), epoch=9))
        await control_plane.start()
        await replica.usable(session, 2)
        assert (await replica.state(session))["source"] == "control plane"


async def test_a_damaged_snapshot_on_disk_is_passed_over(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession
) -> None:
    path = tmp_path / "routers" / "r0" / "snapshot.msgpack"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x00garbage")
    async with Replica(tmp_path, control_plane.address) as replica:
        log = tmp_path / "log"
        await until(lambda: "stored snapshot cannot be used" in log.read_text(), "the damage is logged")
        await control_plane.set(fleet(target("t-0")))
        await replica.usable(session, 1)


async def test_a_wrong_token_is_refused_and_the_right_one_taken(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    control_plane = await FakeControlPlane(token="s3cret").start()
    try:
        await control_plane.set(fleet(target("t-0")))
        token = tmp_path / "token"
        token.write_text("wrong\n")
        async with Replica(tmp_path, control_plane.address, token_file=str(token)) as replica:
            log = tmp_path / "log"
            await until(lambda: log.exists() and "UNAUTHENTICATED" in log.read_text(), "the refusal is logged")
            assert (await replica.state(session))["received"] is None
        token.write_text("s3cret\n")
        async with Replica(tmp_path, control_plane.address, token_file=str(token)) as replica:
            await replica.usable(session, 1)
        assert "s3cret" not in (tmp_path / "log").read_text()
    finally:
        await control_plane.stop()


async def test_replicas_see_one_another(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with (
        Replica(tmp_path, control_plane.address, name="r0") as first,
        Replica(tmp_path, control_plane.address, name="r1") as second,
    ):
        await first.usable(session, 1)
        await second.usable(session, 1)
        await until(lambda: len(control_plane.hellos) == 2, "both report")
        assert control_plane.hellos["r1"].serving_url == second.url
        assert control_plane.hellos["r1"].relays == 1
        shared = attached(second)
        remote = AccountsReader((regions_of(shared, AGENT).accounts,))
        slot = published(shared).slots["t-0"]
        tasks = [asyncio.create_task(complete(first, session)) for _ in range(3)]
        await until(lambda: remote.row(slot).inflight == 3, "the load of the other replica")
        assert (await second.state(session))["peers"].keys() == {"r0"}
        worker.release.set()
        assert all("[DONE]" in text for text in await asyncio.gather(*tasks))
        await until(lambda: remote.row(slot).inflight == 0, "the other replica's accounts return to zero")
        worker.release.clear()
        tasks = [asyncio.create_task(complete(first, session))]
        await until(lambda: remote.row(slot).inflight == 1, "load again")
        stored = remote.row(slot).stored_tokens
        await control_plane.stop()
        await until(lambda: remote.row(slot).inflight == 0, "a silent replica is forgotten")
        assert remote.row(slot).stored_tokens >= stored
        worker.release.set()
        await asyncio.gather(*tasks)
        shared.close()


async def test_a_replica_that_joins_later_learns_of_standing_load(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address, name="r0") as first:
        await first.usable(session, 1)
        tasks = [asyncio.create_task(complete(first, session)) for _ in range(2)]
        await until(lambda: control_plane.loads.get("r0", {}).get(0, {}).get("inflight") == 2, "load is reported")
        async with Replica(tmp_path, control_plane.address, name="r1") as second:
            await second.usable(session, 1)
            shared = attached(second)
            remote = AccountsReader((regions_of(shared, AGENT).accounts,))
            await until(lambda: remote.row(published(shared).slots["t-0"]).inflight == 2, "the standing load")
            shared.close()
        worker.release.set()
        await asyncio.gather(*tasks)


async def test_senseless_ticks_of_peers_do_no_harm(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession
) -> None:
    await control_plane.set(fleet(target("t-0")))
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 1)
        await until(lambda: "r0" in control_plane.hellos, "the replica reports")
        shared = attached(replica)
        remote = AccountsReader((regions_of(shared, AGENT).accounts,))
        good: dict[str, Any] = {
            "ordinals": [0],
            "inflight": [4],
            "decodes": [1],
            "queued_prefill_tokens": [10.0],
            "queued_prefill_s": [0.5],
            "kv_tokens": [20.0],
            "stored_tokens": [5.0],
            "failures": [0],
        }
        for changes in (
            {"epoch": 99},
            {"inflight": [1, 2]},
            {"ordinals": [7_000_000]},
            {"ordinals": [], "inflight": [1]},
        ):
            tick = router_pb2.LoadTick(**{"epoch": 1, **good, **changes})
            peer = router_pb2.PeerLoad(replica_id="x", load=tick)
            control_plane.tell("r0", router_pb2.ReportResponse(peers=[peer]))
        odd = {**good, "queued_prefill_s": [float("nan")], "kv_tokens": [float("inf")], "decodes": [400]}
        tick = router_pb2.LoadTick(epoch=1, **odd, prefixes=[router_pb2.SentPrefix(ordinal=0, hashes=[1])])
        control_plane.tell("r0", router_pb2.ReportResponse(peers=[router_pb2.PeerLoad(replica_id="x", load=tick)]))
        slot = published(shared).slots["t-0"]
        await until(lambda: remote.row(slot).inflight == 4, "the last tick is taken")
        row = remote.row(slot)
        assert (row.decodes, row.queued_prefill_s, row.kv_tokens) == (4, 0.0, 0.0)
        assert sum(remote.row(other).inflight for other in range(64)) == 4
        control_plane.tell("r0", router_pb2.ReportResponse(gone=[router_pb2.PeerGone(replica_id="x")]))
        await until(lambda: remote.row(slot).inflight == 0, "a replica that left is forgotten")
        shared.close()


async def test_demand_top_and_metrics_count_what_was_served(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    worker.release.set()
    await control_plane.set(fleet(target("t-0", worker.url)))
    async with Replica(tmp_path, control_plane.address, relays=2) as replica:
        await replica.usable(session, 1)
        await until(lambda: control_plane.demand, "demand is reported")
        for _ in range(12):
            await complete(replica, session)

        def counted() -> dict[str, float]:
            pools = [pool for tick in control_plane.demand for pool in tick.pools if pool.pool == "pool"]
            names = ("requests", "output_tokens", "prompt_tokens", "ttft_within_slo", "failed", "rejected")
            return {name: sum(getattr(pool, name) for pool in pools) for name in names}

        await until(lambda: counted()["requests"] == 12, "all requests are reported")
        total = counted()
        assert total["output_tokens"] >= 12
        assert total["prompt_tokens"] >= 12
        assert total["ttft_within_slo"] == 12
        assert (total["failed"], total["rejected"]) == (0, 0)
        control_plane.command("r0", router_pb2.RouterCommand(command_id="t", top=router_pb2.TopCommand()))
        await until(lambda: "t" in control_plane.results, "top is answered")
        top = control_plane.results["t"].top
        assert top.requests_per_s > 0
        assert top.ttft_p50_s > 0
        assert (top.inflight, top.error_ratio) == (0, 0)
        metrics = await replica.metrics(session)
        assert 'twofold_requests_total{pool="pool",code="200"} 12' in metrics
        assert 'twofold_process_resident_memory_bytes{process="relay-1"}' in metrics


async def test_explain_reaches_the_relay_that_decided(
    tmp_path: Path, control_plane: FakeControlPlane, worker: FakeWorker, session: aiohttp.ClientSession
) -> None:
    worker.release.set()
    await control_plane.set(fleet(target("t-0", worker.url), target("t-1", worker.url)))
    async with Replica(tmp_path, control_plane.address, relays=2) as replica:
        await replica.usable(session, 2)
        ids = [f"req-{number}" for number in range(8)]
        for request_id in ids:
            body = {"model": "m", "prompt": "hello", "stream": True}
            headers = {"x-request-id": request_id}
            async with session.post(f"{replica.url}/v1/completions", json=body, headers=headers) as reply:
                await reply.read()

        async def both_connected() -> bool:
            return (await replica.state(session))["control_channel"] == [0, 1]

        await until(both_connected, "both relays on the control channel")
        relays = set()
        for request_id in ids:
            async with session.post(f"{replica.admin}/explain", json={"request_id": request_id}) as reply:
                answer = await reply.json()
                assert reply.status == 200, answer
            (decision,) = answer["decisions"]
            assert decision["request_id"] == request_id
            assert decision["target_id"] in ("t-0", "t-1")
            assert decision["observed_ttft_s"] > 0
            assert decision["examined"]
            relays.add(decision.get("relay", 0))
        assert relays <= {0, 1}
        body = {"path": "/v1/completions", "body": {"model": "m", "prompt": "hello"}}
        async with session.post(f"{replica.admin}/explain", json=body) as reply:
            assert reply.status == 200, await reply.text()
            assert len((await reply.json())["decisions"]) == 1
        assert worker.requests == len(ids), "a hypothetical request was sent"
        await commands_over_grpc(control_plane)
        await explain_errors(replica, session)


async def commands_over_grpc(control_plane: FakeControlPlane) -> None:
    command = router_pb2.RouterCommand
    hypothetical = router_pb2.HypotheticalRequest(
        path="/v1/completions", body=json.dumps({"model": "m", "prompt": "x"}).encode()
    )
    nonsense = router_pb2.HypotheticalRequest(path="/v1/completions", body=b"{")
    for command_id, sent, code in (
        ("past", command(explain=router_pb2.ExplainCommand(request_id="req-1")), grpc.StatusCode.OK),
        ("new", command(explain=router_pb2.ExplainCommand(request=hypothetical)), grpc.StatusCode.OK),
        ("unknown", command(explain=router_pb2.ExplainCommand(request_id="no")), grpc.StatusCode.NOT_FOUND),
        ("bad", command(explain=router_pb2.ExplainCommand(request=nonsense)), grpc.StatusCode.INVALID_ARGUMENT),
        ("empty", command(explain=router_pb2.ExplainCommand()), grpc.StatusCode.INVALID_ARGUMENT),
        ("drain", command(drain=router_pb2.DrainCommand(target_id="t-0")), grpc.StatusCode.UNIMPLEMENTED),
        ("none", command(), grpc.StatusCode.UNIMPLEMENTED),
    ):
        sent.command_id = command_id
        control_plane.command("r0", sent)
        await until(lambda command_id=command_id: command_id in control_plane.results, f"{command_id} is answered")
        result = control_plane.results[command_id]
        assert result.code == code.value[0], (command_id, result)
        assert result.replica_id == "r0"
        assert bool(result.decisions) == (code is grpc.StatusCode.OK)


async def explain_errors(replica: Replica, session: aiohttp.ClientSession) -> None:
    for body, status in (
        (b"{", 400),
        (b"{}", 400),
        (b'{"request_id":"a","body":{}}', 400),
        (b'{"request_id":"a","surprise":1}', 400),
        (b'{"request_id":"unknown"}', 404),
        (msgspec.json.encode({"body": {"model": "nope", "prompt": "x"}}), None),
    ):
        async with session.post(f"{replica.admin}/explain", data=body) as reply:
            text = await reply.text()
            assert reply.status == (status or reply.status), text
            assert reply.status != 500
            assert "Traceback" not in text
    async with session.get(f"{replica.admin}/nowhere") as reply:
        assert reply.status == 404
        assert "error" in await reply.json()


async def test_policy_changes_reach_the_relays(
    tmp_path: Path, control_plane: FakeControlPlane, session: aiohttp.ClientSession
) -> None:
    snapshot = fleet(target("t-0"))
    await control_plane.set(snapshot)
    async with Replica(tmp_path, control_plane.address) as replica:
        await replica.usable(session, 1)
        policy = RoutingPolicy(name="round_robin")
        await control_plane.set(msgspec.structs.replace(snapshot, version=2, policy=policy))

        async def switched() -> bool:
            state = await replica.state(session)
            same = state["relays"]["relay-0"]["snapshot_version"] == state["board_version"]
            return same and state["snapshot"]["policy"] == "round_robin"

        await until(switched, "the relay has the new policy")
