"""Answers that are random bytes, or true messages with flipped bits or without their end, are never a traceback."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.routerctl import samples
from unit.routerctl.fakes import Ctl, FakeControlPlane

from twofold.v1 import admin_pb2

COMMANDS = (
    (("get", "workers"), "GetFleet", samples.fleet()),
    (("get", "models"), "GetFleet", samples.fleet()),
    (("get", "pools"), "GetFleet", samples.fleet()),
    (("get", "routers"), "ListRouters", samples.routers()),
    (("describe", "worker", "w"), "DescribeWorker", samples.described()),
    (("explain", "--request-id", "a"), "Explain", admin_pb2.ExplainResponse(decisions=[samples.decision()])),
    (("cordon", "w"), "Cordon", admin_pb2.CordonResponse(targets=[samples.target("w")])),
    (("drain", "w"), "Drain", admin_pb2.DrainResponse(targets=[samples.target("w")], inflight=3)),
    (("policy", "get"), "GetPolicy", samples.fleet().policy),
    (("top",), "Top", samples.top()),
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    if not whole or draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200))
    cut = bytearray(whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole)
    for _ in range(draw(st.integers(0, 8)) if cut else 0):
        cut[draw(st.integers(0, len(cut) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), command=st.sampled_from(COMMANDS), output=st.sampled_from(["table", "wide", "json", "yaml"]))
def test_damaged_answers(
    ctl: Ctl,
    control_plane: FakeControlPlane,
    data: st.DataObject,
    command: tuple[tuple[str, ...], str, object],
    output: str,
) -> None:
    argv, method, message = command
    control_plane.answers = {method: data.draw(damaged(message.SerializeToString(deterministic=True)))}  # type: ignore[attr-defined]
    ran = ctl(*argv, "-o", output)
    assert ran.code in (0, 1)
    assert "internal error" not in ran.err
    assert all(line.startswith("routerctl: ") for line in ran.err.splitlines())
    assert all(line.isprintable() for line in (ran.out + ran.err).split("\n"))
    assert ran.code == 1 or "routerctl: error:" not in ran.err
    assert ran.code == 0 or ran.err
