"""``cordon``, ``uncordon``, ``drain`` and ``policy``: what they ask for and how they end."""

import json

import grpc
import pytest
from unit.routerctl import samples
from unit.routerctl.fakes import Ctl, FakeControlPlane, Status

from routerctl.errors import NotFound, Unreachable
from routerctl.options import Options
from routerctl.session import Session
from routerctl.verbs import cordon
from twofold.v1 import admin_pb2, fleet_pb2

NOT_FOUND = Status(grpc.StatusCode.NOT_FOUND, "worker 'w9' is not known")


@pytest.mark.parametrize(("verb", "method"), [("cordon", "Cordon"), ("uncordon", "Uncordon")])
def test_cordon_and_uncordon(ctl: Ctl, control_plane: FakeControlPlane, verb: str, method: str) -> None:
    answer = getattr(admin_pb2, f"{method}Response")
    control_plane.answers[method] = answer(targets=[samples.target("w0", cordoned=verb == "cordon")])
    ran = ctl(verb, "w0")
    state = "healthy,cordoned" if verb == "cordon" else "healthy"
    assert (ran.code, ran.out, ran.err) == (0, f"worker w0 {verb}ed (w0 {state})\n", "")
    assert control_plane.last(method).worker_id == "w0"
    assert json.loads(ctl(verb, "w0", "-o", "json").out)["targets"][0]["cordoned"] is (verb == "cordon")


def test_one_unknown_worker_does_not_keep_the_others_from_being_cordoned(
    ctl: Ctl, control_plane: FakeControlPlane
) -> None:
    control_plane.answers["Cordon"] = lambda request: (
        NOT_FOUND if request.worker_id == "w9" else admin_pb2.CordonResponse(targets=[samples.target("w1")])
    )
    ran = ctl("cordon", "w9", "w1", "w1")
    assert ran.code == 1
    assert ran.err == "routerctl: worker 'w9' is not known\n"
    assert ran.out.startswith("worker w1 cordoned")
    assert [request.worker_id for _, request in control_plane.requests] == ["w9", "w1"]


def drained(inflight: int) -> admin_pb2.DrainResponse:
    return admin_pb2.DrainResponse(
        targets=[samples.target("w0", draining=True)], inflight=inflight, safe_to_delete=inflight == 0
    )


def test_drain_reports_what_still_runs(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Drain"] = drained(3)
    ran = ctl("drain", "w0")
    assert ran.code == 0
    assert ran.out == "worker w0 draining (w0 healthy,draining): 3 requests still run on it\n"
    found = json.loads(ctl("drain", "w0", "-o", "json").out)
    assert (found["worker_id"], found["inflight"], found["safe_to_delete"]) == ("w0", 3, False)


def test_drain_wait_asks_until_nothing_runs(
    ctl: Ctl, control_plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cordon, "POLL_S", 0.0)
    control_plane.answers["Drain"] = [drained(2), drained(2), drained(1), drained(0)]
    ran = ctl("drain", "w0", "--wait")
    assert ran.code == 0
    assert ran.out.endswith(": may be stopped\n")
    assert ran.err.splitlines() == [
        "routerctl: 2 requests still run on w0",
        "routerctl: 1 requests still run on w0",
    ]
    assert len(control_plane.requests) == 4


def test_drain_that_is_not_over_in_time_is_1(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Drain"] = drained(5)
    ran = ctl("drain", "w0", "--wait", "--timeout", "0.1", "-o", "json")
    assert ran.code == 1
    assert json.loads(ran.out)["inflight"] == 5
    assert ran.err.splitlines()[-1] == (
        "routerctl: error: worker w0 is not drained in time: 5 requests still run on it"
    )


def test_drain_of_an_unknown_worker_is_1(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Drain"] = NOT_FOUND
    assert ctl("drain", "w9", "--wait").code == 1


def test_a_worker_that_leaves_the_fleet_while_it_drains_is_drained(
    ctl: Ctl, control_plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cordon, "POLL_S", 0.0)
    control_plane.answers["Drain"] = [drained(1), NOT_FOUND]
    ran = ctl("drain", "w0", "--wait")
    assert ran.code == 0
    assert "worker w0 has left the fleet" in ran.err


class ScriptedClient:
    """Drain answers in turn, an exception where one is scripted; the last one for ever."""

    class admin:
        Drain = None

    def __init__(self, *script: admin_pb2.DrainResponse | Exception) -> None:
        self.script = list(script)

    def call(self, method: object, request: object, timeout_s: float) -> admin_pb2.DrainResponse:
        item = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(item, Exception):
            raise item
        return item


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def wait(*script: admin_pb2.DrainResponse | Exception, limit_s: float = 30.0) -> tuple[admin_pb2.DrainResponse, float]:
    clock = Clock()
    session = Session(Options(), monotonic=clock, sleep=clock.sleep)
    request = admin_pb2.DrainRequest(worker_id="w0")
    client = ScriptedClient(*script)
    answer = cordon._wait(request, drained(9), client, session, limit_s)  # type: ignore[arg-type]
    return answer, clock.now_s


def test_the_wait_outlasts_a_restart_of_the_control_plane(capsys: pytest.CaptureFixture[str]) -> None:
    answer, took_s = wait(Unreachable("away"), Unreachable("away"), drained(4), drained(0))
    assert answer.safe_to_delete
    assert took_s == 4 * cordon.POLL_S
    assert capsys.readouterr().err.count("away; asking again") == 1


def test_the_wait_ends_at_its_deadline() -> None:
    answer, took_s = wait(drained(4), limit_s=7.5)
    assert answer.inflight == 4
    assert took_s == 7.5


def test_a_control_plane_that_stays_away_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="away"):
        wait(drained(4), Unreachable("away"))


def test_the_wait_takes_a_vanished_worker_for_drained() -> None:
    assert wait(drained(4), NotFound("gone"))[0].safe_to_delete


POLICY = fleet_pb2.RoutingPolicy(name="twofold", alpha=0.3, margin_s=0.5, shed_ttft_s=120)


def test_policy_get(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["GetPolicy"] = POLICY
    lines = [line.split() for line in ctl("policy", "get").out.splitlines()]
    assert lines[0] == ["FIELD", "VALUE"]
    assert ["name", "twofold"] in lines
    assert ["shed_ttft_s", "120"] in lines
    found = json.loads(ctl("policy", "get", "-o", "json").out)
    assert list(found) == [field.name for field in fleet_pb2.RoutingPolicy.DESCRIPTOR.fields]
    assert (found["name"], found["alpha"]) == ("twofold", 0.3)


def test_policy_set_sends_the_named_fields_only(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["SetPolicy"] = POLICY
    ran = ctl("policy", "set", "alpha=0.4", "name=a=b")
    assert ran.code == 0
    assert "twofold" in ran.out
    assert dict(control_plane.last("SetPolicy").fields) == {"alpha": "0.4", "name": "a=b"}


@pytest.mark.parametrize("fields", [("alpha",), ("=3",), ("alpha=1", "alpha=2"), ("al pha=1",)])
def test_policy_set_with_bad_syntax_is_2_and_asks_nothing(
    ctl: Ctl, control_plane: FakeControlPlane, fields: tuple[str, ...]
) -> None:
    ran = ctl("policy", "set", *fields)
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert control_plane.requests == []


def test_policy_set_refused_by_the_control_plane_is_1(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["SetPolicy"] = Status(grpc.StatusCode.INVALID_ARGUMENT, "unknown field 'beta'")
    ran = ctl("policy", "set", "beta=1")
    assert (ran.code, ran.err) == (1, "routerctl: error: unknown field 'beta'\n")
