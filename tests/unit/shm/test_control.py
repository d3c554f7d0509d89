"""Frames of the control channel."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing.types import Decision, ExaminedTarget
from router.shm.control import (
    MAX_FRAME_BYTES,
    ControlError,
    Done,
    Explained,
    ExplainedDecision,
    ExplainPast,
    ExplainRequest,
    Failed,
    Hello,
    ResolveHomes,
    SetLogLevel,
    Stop,
    agent_side,
    encode_frame,
    relay_side,
)
from twofold.model.reasons import RejectReason, RouteReason, TargetRole

COMMANDS = (
    ExplainPast(id=1, request_id="r"),
    ExplainRequest(id=2, path="/v1/completions", headers={"a": "b"}, body=b"{}"),
    SetLogLevel(id=3, level="debug"),
    ResolveHomes(id=5, pool="p", keys=(1, 2**64 - 1)),
    Stop(id=4, grace_s=1.5),
)


def decision(reason: RouteReason | RejectReason) -> Decision:
    examined = ExaminedTarget(slot=1, target_id="t", role=TargetRole.HOME_A1, cached_tokens=4)
    return Decision(
        slot=1,
        target_id="t",
        reason=reason,
        request_id="r",
        pool="p",
        policy="twofold",
        at_s=1.0,
        prompt_tokens=9,
        examined=(examined,),
        key=2**64 - 1,
    )


ANSWERS = (
    Hello(relay=0, pid=7),
    Explained(id=1, decisions=(ExplainedDecision.of(decision(RouteReason.HOME), at_s=1e9, observed_ttft_s=0.5),)),
    Explained(id=1, decisions=(ExplainedDecision.of(decision(RejectReason.SATURATED), at_s=1e9),)),
    Done(id=2),
    Failed(id=3, message="no", invalid=True),
)


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 2000), max_size=20))
def test_messages_survive_any_cut_of_the_stream(cuts: list[int]) -> None:
    for decoder, messages in ((relay_side(), COMMANDS), (agent_side(), ANSWERS)):
        stream = b"".join(encode_frame(message) for message in messages)
        edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        got = [m for a, b in pairwise(edges) for m in decoder.feed(stream[a:b])]
        assert tuple(got) == messages


@settings(deadline=None)
@given(data=st.binary(max_size=64))
def test_garbage_is_an_error_or_an_unfinished_frame(data: bytes) -> None:
    decoder = agent_side()
    try:
        assert decoder.feed(data) == []
    except ControlError:
        pass


def test_bounds() -> None:
    with pytest.raises(ControlError, match="exceeds"):
        encode_frame(ExplainRequest(id=1, path="/", body=bytes(MAX_FRAME_BYTES)))
    with pytest.raises(ControlError, match="exceeds"):
        relay_side().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ControlError, match="not a message"):
        relay_side().feed(encode_frame(Hello(relay=0, pid=1)))


def test_an_explained_decision_names_what_was_chosen() -> None:
    explained = ExplainedDecision.of(decision(RouteReason.ESCAPE), at_s=2.0, snapshot_epoch=3, snapshot_version=4)
    assert (explained.reason, explained.target_id, explained.snapshot_version) == ("escape", "t", 4)
    assert [(t.role, t.chosen, t.cached_tokens) for t in explained.examined] == [("home-a1", True, 4)]
