"""``explain``: the question as it is sent, the answer as it is shown."""

import io
import json
import types
from pathlib import Path

import grpc
import pytest
import yaml
from unit.routerctl import samples
from unit.routerctl.fakes import Ctl, FakeControlPlane, Status

from routerctl.printers.decision import sentence
from routerctl.verbs.explain import routers_deadline_s
from twofold.model.reasons import RejectReason, RouteReason
from twofold.v1 import admin_pb2, router_pb2


@pytest.fixture(autouse=True)
def _explains(control_plane: FakeControlPlane) -> None:
    control_plane.answers["Explain"] = admin_pb2.ExplainResponse(decisions=[samples.decision()])


def asked(control_plane: FakeControlPlane) -> router_pb2.HypotheticalRequest:
    request = control_plane.last("Explain").subject.request
    assert isinstance(request, router_pb2.HypotheticalRequest)
    return request


def test_a_past_request_shows_key_homes_prices_and_why(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    ran = ctl("explain", "--request-id", "req-1")
    assert (ran.code, ran.err) == (0, "")
    assert control_plane.last("Explain").subject.request_id == "req-1"
    assert "00f1e2d3c4b5a697 (depth 3 chunks)" in ran.out
    assert "home-a1 w0, home-a2 w1, home-b1 w2/0\n" in ran.out
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["home-a1", "w0", "0", "1,200", "0.5000", "0.5000", "0.0000", "0.5000", "-"] in lines
    assert ["*", "home-b1", "w2/0", "1,024", "176", "0.0875", "0.0625", "0.2500", "0.1187", "chosen"] in lines
    assert ["home-a2", "w1", "0", "0", "0.0000", "0.0000", "0.0000", "-", "cordoned"] in lines
    assert "Observed TTFT:" in ran.out
    assert ran.out.splitlines()[-1] == (
        "Request req-1 went to w2/0 because the home home-b1 was the cheapest of the targets examined: "
        "1,024 of 1,200 prompt tokens cached, 87.5 ms of own prefill behind 250 ms of waiting, "
        "price 0.1187 s against 0.5000 s for w0, the best of the others."
    )


@pytest.mark.parametrize(("form", "load"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_a_decision_for_programs(ctl: Ctl, form: str, load: types.FunctionType) -> None:
    found = load(ctl("explain", "--request-id", "req-1", "-o", form).out)
    assert set(found) == {"decisions", "silent_replicas"}
    decision = found["decisions"][0]
    assert set(decision) == {field.name for field in router_pb2.Decision.DESCRIPTOR.fields}
    assert [examined["chosen"] for examined in decision["examined"]] == [False, False, True, False]
    assert decision["examined"][2]["price_s"] == 0.1187


def test_a_prompt_is_asked_as_a_completion(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    ran = ctl(
        "explain", "--model", "m", "--prompt", "h\u00e9 \u4e16", "--max-tokens", "5", "--header", "X-Session: a:b"
    )
    assert ran.code == 0
    assert "hypothetical, not sent" in ran.out
    assert "Observed TTFT" not in ran.out
    assert "The request would go to w2/0" in ran.out
    request = asked(control_plane)
    assert request.path == "/v1/completions"
    assert json.loads(request.body) == {"model": "m", "max_tokens": 5, "prompt": "h\u00e9 \u4e16"}
    assert dict(request.headers) == {"x-session": "a:b"}


def test_a_prompt_as_chat(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    assert ctl("explain", "--model", "m", "--prompt", "hi", "--chat").code == 0
    request = asked(control_plane)
    assert request.path == "/v1/chat/completions"
    assert json.loads(request.body) == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_an_argument_that_is_not_utf8_is_no_failure(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    assert ctl("explain", "--model", "m", "--prompt", "a\udcff").code == 0
    assert json.loads(asked(control_plane).body)["prompt"] == "a\ufffd"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"model":"m",  "prompt":"x"}', "/v1/completions"),
        (b'{"messages":[] ,"model":"m"}', "/v1/chat/completions"),
    ],
)
def test_a_file_is_sent_byte_for_byte_to_its_endpoint(
    ctl: Ctl, control_plane: FakeControlPlane, tmp_path: Path, body: bytes, path: str
) -> None:
    file = tmp_path / "body.json"
    file.write_bytes(body)
    assert ctl("explain", "--file", str(file)).code == 0
    assert (asked(control_plane).path, asked(control_plane).body) == (path, body)


def test_a_body_from_standard_input_takes_another_model(
    ctl: Ctl, control_plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b'{"model":"m","prompt":"x"}'))
    monkeypatch.setattr("sys.stdin", stdin)
    assert ctl("explain", "--file", "-", "--model", "other").code == 0
    assert json.loads(asked(control_plane).body) == {"model": "other", "prompt": "x"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b'{"prompt":"x"}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"model":"m","prompt":"' + b"x" * (4 << 20) + b'"}',
    ],
    ids=["empty", "text", "list", "no model", "not utf-8", "deep", "too large"],
)
def test_a_bad_body_is_2_and_asks_nothing(
    ctl: Ctl, control_plane: FakeControlPlane, tmp_path: Path, body: bytes
) -> None:
    file = tmp_path / "body.json"
    file.write_bytes(body)
    ran = ctl("explain", "--file", str(file))
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.splitlines()) == 1
    assert len(ran.err) < 500
    assert control_plane.requests == []


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--prompt", "x"),
        ("--request-id", ""),
        ("--request-id", "a", "--prompt", "x", "--model", "m"),
        ("--request-id", "a", "--model", "m"),
        ("--request-id", "a", "--chat"),
        ("--file", "/nonexistent/body.json"),
        ("--model", "m", "--prompt", "x", "--header", "nocolon"),
        ("--model", "m", "--prompt", "x", "--header", "a: b\nc: d"),
        ("--model", "m", "--prompt", "x", "--max-tokens", "0"),
    ],
)
def test_bad_usage_is_2(ctl: Ctl, control_plane: FakeControlPlane, argv: tuple[str, ...]) -> None:
    ran = ctl("explain", *argv)
    assert (ran.code, ran.out) == (2, "")
    assert "error:" in ran.err
    assert control_plane.requests == []


def test_an_unknown_request_is_1(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Explain"] = Status(grpc.StatusCode.NOT_FOUND, "no router remembers 'gone'")
    ran = ctl("explain", "--request-id", "gone")
    assert (ran.code, ran.err) == (1, "routerctl: error: no router remembers 'gone'\n")


def test_no_connected_router_is_1_and_not_an_unreachable_control_plane(
    ctl: Ctl, control_plane: FakeControlPlane
) -> None:
    control_plane.answers["GetPolicy"] = samples.fleet().policy
    control_plane.answers["Explain"] = Status(grpc.StatusCode.UNAVAILABLE, "no router is connected")
    ran = ctl("explain", "--request-id", "req-1")
    assert (ran.code, ran.err) == (1, "routerctl: error: no router is connected\n")


def test_silent_routers_are_named(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Explain"] = admin_pb2.ExplainResponse(
        decisions=[samples.decision()], silent_replicas=["r1", "r2"]
    )
    ran = ctl("explain", "--request-id", "req-1")
    assert (ran.code, ran.err) == (0, "routerctl: no answer from r1, r2\n")
    control_plane.answers["Explain"] = admin_pb2.ExplainResponse(silent_replicas=["r1"])
    ran = ctl("explain", "--request-id", "req-1")
    assert (ran.code, ran.err) == (1, "routerctl: error: no router gave a decision; no answer from r1\n")


@pytest.mark.parametrize(("timeout_s", "deadline_s"), [(5, 3.0), (0.1, 0.1), (600, 30.0)])
def test_the_routers_deadline_ends_before_the_call_and_keeps_its_bounds(timeout_s: float, deadline_s: float) -> None:
    assert routers_deadline_s(timeout_s) == pytest.approx(deadline_s)


def test_the_routers_deadline_follows_the_timeout(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    assert ctl("explain", "--request-id", "a", "--timeout", "20").code == 0
    assert control_plane.last("Explain").deadline_s == 12.0


@pytest.mark.parametrize("reason", [reason.value for reason in RouteReason])
def test_every_route_reason_has_words(reason: str) -> None:
    text = sentence(samples.decision(reason=reason), past=True)
    assert "the router says" not in text
    assert "{" not in text


def test_a_reason_of_a_newer_router_is_shown_as_it_is() -> None:
    assert "because the router says moonphase" in sentence(samples.decision(reason="moonphase"), past=False)


@pytest.mark.parametrize(
    "reason", [RejectReason.NO_ENDPOINTS, RejectReason.SATURATED, RejectReason.MODEL_NOT_FOUND, "moonphase"]
)
def test_a_rejection_counts_what_was_in_the_way(reason: str) -> None:
    examined = [
        router_pb2.ExaminedTarget(target_id="a", ineligible="cordoned"),
        router_pb2.ExaminedTarget(target_id="b", ineligible="circuit-open"),
        router_pb2.ExaminedTarget(target_id="c", ineligible="cordoned"),
    ]
    text = sentence(samples.decision(target_id="", reason=reason, examined=examined), past=True)
    assert text.startswith(f"Request req-1 was rejected ({reason}) because ")
    assert text.endswith("; of 3 examined: 2 cordoned, 1 circuit-open.")


def test_a_decision_without_examined_targets_is_still_explained(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Explain"] = admin_pb2.ExplainResponse(decisions=[samples.decision(examined=[])])
    ran = ctl("explain", "--request-id", "req-1")
    assert ran.code == 0
    assert "no target was examined" in ran.out
