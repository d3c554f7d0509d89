"""Who may call what, what is refused and how, and messages made of random bytes."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from controlplane.rpc.auth import is_loopback, listening_fault
from twofold.v1 import admin_pb2, autoscaler_pb2, fleet_pb2, router_pb2

from .conftest import Running, Start, until, watching
from .stub_engine import StubEngine

Engines = Callable[[int], Awaitable[list[StubEngine]]]
Code = grpc.StatusCode
TOKEN = "s3cret-token"


async def refusal(call: Awaitable[Any]) -> tuple[Code, str, str]:
    """Code, message and offending field of a refused call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    fields = []
    for detail in (rpc_status.from_call(caught.value) or _NO_STATUS).details:
        violations = error_details_pb2.BadRequest()
        assert detail.Unpack(violations)
        fields += [violation.field for violation in violations.field_violations]
    return caught.value.code(), caught.value.details() or "", ",".join(fields)


class _NO_STATUS:
    details: tuple[Any, ...] = ()


def lease(**changes: Any) -> fleet_pb2.RegisterRequest:
    """A good registration with some fields changed."""
    fields = {"worker_id": "w", "url": "http://127.0.0.1:9", "pool": "p", "profile": "cpu-tiny", "lease_ttl_s": 30}
    return fleet_pb2.RegisterRequest(**{**fields, **changes})


@pytest.fixture
async def fleet(start: Start) -> Running:
    """A control plane of one pool without workers."""
    running = await start(watching())
    await until(lambda: running.app.core.state.config_version)
    return running


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"worker_id": ""}, Code.INVALID_ARGUMENT, "worker_id"),
        ({"worker_id": "a/b"}, Code.INVALID_ARGUMENT, "worker_id"),
        ({"worker_id": "a\n"}, Code.INVALID_ARGUMENT, "worker_id"),
        ({"url": "file:///etc/passwd"}, Code.INVALID_ARGUMENT, "url"),
        ({"url": "http://a:1/x"}, Code.INVALID_ARGUMENT, "url"),
        ({"lease_ttl_s": 4.9}, Code.INVALID_ARGUMENT, "lease_ttl_s"),
        ({"lease_ttl_s": float("nan")}, Code.INVALID_ARGUMENT, "lease_ttl_s"),
        ({"profile": "nope"}, Code.INVALID_ARGUMENT, "profile"),
        ({"zone": "a\x00b"}, Code.INVALID_ARGUMENT, "zone"),
        ({"data_parallel_size": 5000}, Code.INVALID_ARGUMENT, "data_parallel_size"),
        ({"incarnation": (1 << 64) - 1}, Code.INVALID_ARGUMENT, "incarnation"),
        ({"pool": "nope"}, Code.NOT_FOUND, "pool"),
    ],
)
async def test_bad_registrations_name_the_field(
    fleet: Running, changes: dict[str, Any], code: Code, field: str
) -> None:
    assert (await refusal(fleet.fleet.Register(lease(**changes))))[::2] == (code, field)
    assert not len(fleet.app.leases)


async def test_a_leased_worker_may_use_any_known_profile_and_ranks(fleet: Running) -> None:
    await fleet.fleet.Register(lease(profile="h100-8b-tp1", data_parallel_size=2))
    await until(lambda: "w" in fleet.app.core.state.workers)
    fleet.app.core.flush()
    assert [t.target_id for t in fleet.app.core.snapshot.targets] == ["w/0", "w/1"]
    assert [t.data_parallel_rank for t in fleet.app.core.snapshot.targets] == [0, 1]


async def test_a_lease_cannot_take_over_a_worker_of_the_file(start: Start, engines: Engines) -> None:
    (engine,) = await engines(1)
    running = await start(watching(engine))
    name = (await until(lambda: list(running.app.core.state.workers)))[0]
    code, _, field = await refusal(running.fleet.Register(lease(worker_id=name)))
    assert (code, field) == (Code.ALREADY_EXISTS, "worker_id")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "magic"}, "fields.name"),
        ({"nope": "1"}, "fields.nope"),
        ({"alpha": "much"}, "fields.alpha"),
        ({"alpha": "1.5"}, "fields.alpha"),
        ({"margin_s": "nan"}, "fields.margin_s"),
        ({"shed_ttft_s": "-1"}, "fields.shed_ttft_s"),
    ],
)
async def test_bad_policies_name_the_field_and_change_nothing(
    fleet: Running, fields: dict[str, str], field: str
) -> None:
    before = await fleet.admin.GetPolicy(admin_pb2.GetPolicyRequest())
    code, message, found = await refusal(fleet.admin.SetPolicy(admin_pb2.SetPolicyRequest(fields=fields)))
    assert (code, found) == (Code.INVALID_ARGUMENT, field)
    assert field in message
    assert await fleet.admin.GetPolicy(admin_pb2.GetPolicyRequest()) == before


async def test_unknown_workers_are_not_found(fleet: Running) -> None:
    calls = [
        fleet.admin.DescribeWorker(admin_pb2.DescribeWorkerRequest(worker_id="x")),
        fleet.admin.Cordon(admin_pb2.CordonRequest(worker_id="x")),
        fleet.admin.Uncordon(admin_pb2.UncordonRequest(worker_id="x")),
        fleet.admin.Drain(admin_pb2.DrainRequest(worker_id="x")),
    ]
    for call in calls:
        assert (await refusal(call))[::2] == (Code.NOT_FOUND, "worker_id")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (admin_pb2.ExplainRequest(), "subject"),
        (admin_pb2.ExplainRequest(subject=router_pb2.ExplainCommand(request_id="x"), deadline_s=31), "deadline_s"),
        (admin_pb2.ExplainRequest(subject=router_pb2.ExplainCommand(request_id="")), "subject.request_id"),
        (
            admin_pb2.ExplainRequest(
                subject=router_pb2.ExplainCommand(request=router_pb2.HypotheticalRequest(path="/metrics"))
            ),
            "subject.request.path",
        ),
    ],
)
async def test_bad_explain_requests(fleet: Running, request_: admin_pb2.ExplainRequest, field: str) -> None:
    assert (await refusal(fleet.admin.Explain(request_)))[::2] == (Code.INVALID_ARGUMENT, field)


async def test_plans(fleet: Running) -> None:
    plan = autoscaler_pb2.Plan(
        pools=[autoscaler_pb2.DesiredPool(pool="p", profile="cpu-tiny", replicas=1, generation=9)]
    )
    assert (await refusal(fleet.autoscaler.SubmitPlan(plan)))[::2] == (Code.INVALID_ARGUMENT, "pools[0].pool")
    assert not (await fleet.autoscaler.GetPlan(autoscaler_pb2.GetPlanRequest())).pools
    call = fleet.autoscaler.WatchDemand(autoscaler_pb2.WatchDemandRequest(interval_s=0))
    assert (await refusal(call.read()))[0] is Code.INVALID_ARGUMENT


def everything(running: Running, metadata: list[tuple[str, str]]) -> dict[str, Callable[[], Any]]:
    """One call of every method, by name."""

    async def no_requests() -> Any:
        await asyncio.sleep(30)
        yield router_pb2.ReportRequest()

    f, a, s = running.fleet, running.admin, running.autoscaler
    m: dict[str, Any] = {"metadata": metadata, "timeout": 5}
    return {
        "Watch": lambda: f.Watch(fleet_pb2.WatchRequest(replica_id="r"), **m).read(),
        "Register": lambda: f.Register(lease(), **m),
        "Deregister": lambda: f.Deregister(fleet_pb2.DeregisterRequest(), **m),
        "Report": lambda: running.router.Report(no_requests(), **m).read(),
        "Cordon": lambda: a.Cordon(admin_pb2.CordonRequest(), **m),
        "Uncordon": lambda: a.Uncordon(admin_pb2.UncordonRequest(), **m),
        "Drain": lambda: a.Drain(admin_pb2.DrainRequest(), **m),
        "Explain": lambda: a.Explain(admin_pb2.ExplainRequest(), **m),
        "SetPolicy": lambda: a.SetPolicy(admin_pb2.SetPolicyRequest(), **m),
        "SubmitPlan": lambda: s.SubmitPlan(autoscaler_pb2.Plan(), **m),
    }


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", TOKEN)],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {TOKEN}x")],
        [("x-authorization", f"Bearer {TOKEN}")],
    ],
)
async def test_without_the_token_nothing_can_be_changed_or_followed(
    start: Start, metadata: list[tuple[str, str]]
) -> None:
    running = await start(watching(), token=TOKEN)
    for name, call in everything(running, metadata).items():
        code, message, _ = await refusal(call())
        assert (name, code) == (name, Code.UNAUTHENTICATED)
        assert TOKEN not in message
    assert not len(running.app.leases)
    await running.admin.GetFleet(admin_pb2.GetFleetRequest())


async def test_with_the_token_all_calls_get_through(start: Start) -> None:
    running = await start(watching(), token=TOKEN)
    await until(lambda: running.app.core.state.config_version)
    for name, call in everything(running, running.metadata).items():
        if name in ("Report", "Explain", "Deregister", "Cordon", "Uncordon", "Drain"):
            continue
        await call()
    code, _, _ = await refusal(running.admin.Cordon(admin_pb2.CordonRequest(), metadata=running.metadata))
    assert code is Code.NOT_FOUND


@pytest.mark.parametrize(
    ("host", "token", "tls", "mutual", "insecure", "allowed"),
    [
        ("127.0.0.1", "", False, False, False, True),
        ("localhost", "", False, False, False, True),
        ("::1", "", False, False, False, True),
        ("0.0.0.0", "", False, False, False, False),
        ("0.0.0.0", "", False, False, True, False),
        ("10.0.0.1", "t", False, False, False, False),
        ("10.0.0.1", "t", False, False, True, True),
        ("10.0.0.1", "t", True, False, False, True),
        ("10.0.0.1", "", True, False, False, False),
        ("10.0.0.1", "", True, True, False, True),
        ("127.example.com", "", False, False, False, False),
    ],
)
def test_where_plaintext_and_no_token_are_allowed(
    host: str, token: str, tls: bool, mutual: bool, insecure: bool, allowed: bool
) -> None:
    fault = listening_fault(host, token=token, tls=tls, mutual=mutual, insecure_plaintext=insecure)
    assert (fault == "") is allowed
    assert is_loopback("127.0.0.53")


async def test_health_and_reflection(fleet: Running) -> None:
    health: Any = health_pb2_grpc.HealthStub(fleet.channel)
    for service in ("", "twofold.v1.FleetService", "twofold.v1.AdminService"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(fleet.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in (await call.read()).list_services_response.service}
    expected = {f"twofold.v1.{name}Service" for name in ("Fleet", "Router", "Admin", "Autoscaler")}
    assert expected <= names
    call.cancel()


METHODS = [
    ("FleetService/Watch", fleet_pb2.WatchRequest, "unary_stream"),
    ("FleetService/Register", fleet_pb2.RegisterRequest, "unary_unary"),
    ("FleetService/Deregister", fleet_pb2.DeregisterRequest, "unary_unary"),
    ("RouterService/Report", router_pb2.ReportRequest, "stream_stream"),
    ("AdminService/GetFleet", admin_pb2.GetFleetRequest, "unary_unary"),
    ("AdminService/ListRouters", admin_pb2.ListRoutersRequest, "unary_unary"),
    ("AdminService/DescribeWorker", admin_pb2.DescribeWorkerRequest, "unary_unary"),
    ("AdminService/Cordon", admin_pb2.CordonRequest, "unary_unary"),
    ("AdminService/Drain", admin_pb2.DrainRequest, "unary_unary"),
    ("AdminService/Explain", admin_pb2.ExplainRequest, "unary_unary"),
    ("AdminService/SetPolicy", admin_pb2.SetPolicyRequest, "unary_unary"),
    ("AdminService/Top", admin_pb2.TopRequest, "unary_unary"),
    ("AutoscalerService/SubmitPlan", autoscaler_pb2.Plan, "unary_unary"),
    ("AutoscalerService/WatchDemand", autoscaler_pb2.WatchDemandRequest, "unary_stream"),
]


async def send_raw(fleet: Running, path: str, kind: str, messages: list[bytes]) -> Code:
    """Send raw bytes as the messages of a call; the status, OK when it went on for a while."""
    method: Any = getattr(fleet.channel, kind)(f"/twofold.v1.{path}")
    try:
        if kind == "unary_unary":
            await method(messages[0], timeout=5)
        elif kind == "unary_stream":
            await asyncio.wait_for(method(messages[0], timeout=5).read(), 0.05)
        else:
            call = method(iter(messages), timeout=5)
            while await asyncio.wait_for(call.read(), 0.2) is not grpc.aio.EOF:
                pass
            return await call.code()  # type: ignore[no-any-return]
    except grpc.aio.AioRpcError as error:
        return error.code()  # type: ignore[return-value]
    except TimeoutError:
        pass
    return Code.OK


def scrambled(message: Message, dice: random.Random) -> bytes:
    """A valid message with some of its bytes changed, cut or doubled."""
    raw = bytearray(message.SerializeToString())
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(raw) + 1)
        kind = dice.randrange(3)
        if kind == 0:
            raw[at:at] = dice.randbytes(dice.randint(1, 8))
        elif kind == 1:
            del raw[at : at + dice.randint(1, 8)]
        elif raw:
            raw[at % len(raw)] = dice.randrange(256)
    return bytes(raw)


EXAMPLES: dict[type[Message], Message] = {
    fleet_pb2.WatchRequest: fleet_pb2.WatchRequest(replica_id="r", epoch=1, version=2),
    fleet_pb2.RegisterRequest: lease(zone="z", node="n", incarnation=4),
    admin_pb2.SetPolicyRequest: admin_pb2.SetPolicyRequest(fields={"alpha": "0.5"}),
    admin_pb2.ExplainRequest: admin_pb2.ExplainRequest(
        subject=router_pb2.ExplainCommand(
            request=router_pb2.HypotheticalRequest(path="/v1/completions", body=b"{}", headers={"a": "b"})
        )
    ),
    autoscaler_pb2.Plan: autoscaler_pb2.Plan(pools=[autoscaler_pb2.DesiredPool(pool="p", victims=["a"])], reason="x"),
    router_pb2.ReportRequest: router_pb2.ReportRequest(
        load=router_pb2.LoadTick(epoch=1, sequence=1, ordinals=[1, 2], inflight=[1, 2], kv_tokens=[1.0, 2.0])
    ),
}
HELLO = router_pb2.ReportRequest(hello=router_pb2.RouterHello(replica_id="r")).SerializeToString()


@pytest.mark.parametrize(("path", "message", "kind"), METHODS)
async def test_random_bytes_are_answered_with_a_status(
    fleet: Running, caplog: pytest.LogCaptureFixture, path: str, message: type[Message], kind: str
) -> None:
    dice = random.Random(path)
    for number in range(40):
        raw = dice.randbytes(dice.randint(0, 60)) if number % 2 else scrambled(EXAMPLES.get(message, message()), dice)
        messages = [HELLO, raw] if path.endswith("Report") and number % 3 else [raw]
        code = await send_raw(fleet, path, kind, messages)
        assert code not in (Code.INTERNAL, Code.UNKNOWN), raw
    assert not [record for record in caplog.records if record.exc_info]
    await fleet.admin.GetFleet(admin_pb2.GetFleetRequest())


async def test_too_large_a_message_is_refused(fleet: Running) -> None:
    request = admin_pb2.DescribeWorkerRequest(worker_id="x" * (5 << 20))
    code, _, _ = await refusal(fleet.admin.DescribeWorker(request))
    assert code is Code.RESOURCE_EXHAUSTED


async def test_changes_that_cannot_be_kept_say_so(start: Start, engines: Engines) -> None:
    (engine,) = await engines(1)
    running = await start(watching(engine))
    name = (await until(lambda: list(running.app.core.state.workers)))[0]

    def full(value: object) -> None:
        raise OSError(28, "No space left on device")

    running.app._store.save = full  # type: ignore[method-assign]
    code, message, _ = await refusal(running.admin.Cordon(admin_pb2.CordonRequest(worker_id=name)))
    assert (code, message) == (Code.DATA_LOSS, "in force, but it will not survive a restart: No space left on device")
