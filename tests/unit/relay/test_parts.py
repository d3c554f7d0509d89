"""The relay's small parts: model splice, event stream, retry budget, decision log, settings."""

import itertools
import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from router.http.chunked import LAST_CHUNK, ChunkedDecoder, encode_chunk
from router.http.limits import BufferBudget
from router.http.response_head import parse_response_head
from router.relay.decisions import DecisionLog
from router.relay.events import EventStream, count_events
from router.relay.fleet import public_id
from router.relay.retry import RetryBudget
from router.relay.settings import RelaySettings
from router.relay.splice import replace_model
from router.relay.upstream import Address, parse_url
from router.routing.types import Decision, ExaminedTarget
from twofold.model.reasons import RejectReason, RouteReason, TargetRole
from twofold.settings import resolve

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "a", 'b"', "\\model"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["tools", "x", 'y"', "messages"]), _JSON, max_size=4),
    st.text(max_size=8),
    st.text(max_size=8),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_splice_changes_the_model_and_nothing_else(
    rest: dict[str, Any], old: str, new: str, indent: int | None, ascii_only: bool
) -> None:
    value = {**rest, "model": old}
    body = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        body.decode("utf-8")
        new.encode()
    except UnicodeError:
        return
    spliced = replace_model(body, new)
    assert json.loads(spliced) == {**rest, "model": new}
    tail = body[body.rindex(b'"model"') + len(b'"model"') :]
    assert spliced.startswith(body[: len(body) - len(tail)])


def test_splice_of_duplicate_escaped_and_missing_keys() -> None:
    assert replace_model(b'{"model":"a","model" : "b"}', "x") == b'{"model":"x","model" : "x"}'
    assert replace_model(rb'{"mod\u0065l":"a"}', "x") == rb'{"mod\u0065l":"x"}'
    nested = (b'{"a":{"model":"a"}}', b'{"a":"model","b":[{"model":"a"}]}')
    for untouched in (*nested, b"{}", b"[]", b'{"model":5}', b'{"model'):
        assert replace_model(untouched, "x") == untouched


@given(st.binary(max_size=80))
def test_splice_of_any_bytes_ends(body: bytes) -> None:
    replace_model(body, "x")


CHUNKED = parse_response_head(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked")
CLOSING = parse_response_head(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream")
_TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1, max_size=30)


def _stream(chunked_out: bool, budget: BufferBudget, *, chunked_in: bool = True, limit: int = 1000) -> EventStream:
    head = CHUNKED if chunked_in else CLOSING
    return EventStream(head, chunked_out=chunked_out, max_event_bytes=limit, budget=budget)


@given(
    st.lists(st.lists(_TEXT, min_size=1, max_size=3), min_size=1, max_size=6),
    st.lists(st.integers(0, 900), max_size=12),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
)
def test_events_leave_whole_whatever_the_cuts(
    groups: list[list[str]], cuts: list[int], chunked_out: bool, chunked_in: bool, split: int
) -> None:
    events = [b"data: " + text.encode() + b"\n\n" for group in groups for text in group]
    payload = b"".join(events)
    if chunked_in:
        wire = b"".join(encode_chunk(payload[i : i + split]) for i in range(0, len(payload), split)) + LAST_CHUNK
    else:
        wire = payload
    edges = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
    budget = BufferBudget(1 << 20)
    stream = _stream(chunked_out, budget, chunked_in=chunked_in)
    decoder = ChunkedDecoder()
    got = b""
    for a, b in itertools.pairwise(edges):
        out = stream.feed(wire[a:b])
        plain = decoder.feed(out) if chunked_out else out
        assert plain == b"" or plain.endswith(b"\n\n")
        got += plain
        if chunked_out:
            assert decoder.at_boundary
    assert got == payload
    assert stream.complete == chunked_in
    assert stream.eof()
    assert budget.held_bytes == 0


def test_whole_chunks_pass_as_the_very_same_object() -> None:
    stream = _stream(True, BufferBudget(1000))
    data = encode_chunk(b"data: x\n\n")
    assert stream.feed(data) is data
    # After a cut event the verbatim path is taken up again.
    assert stream.feed(data[:5]) == b""
    assert stream.feed(data[5:]) == data
    assert stream.feed(data) is data
    assert stream.feed(data + LAST_CHUNK) == data
    assert stream.complete


def test_events_beyond_the_bound_pass_in_pieces() -> None:
    for budget, limit in ((BufferBudget(1 << 20), 100), (BufferBudget(50), 10_000)):
        stream = _stream(True, budget, limit=limit)
        decoder = ChunkedDecoder()
        got = b"".join(decoder.feed(stream.feed(encode_chunk(b"x" * 40))) for _ in range(20))
        assert len(got) >= 600
        assert budget.held_bytes <= 100
        stream.close()
        assert budget.held_bytes == 0


def test_unterminated_last_event_is_kept_apart() -> None:
    budget = BufferBudget(1000)
    stream = _stream(False, budget)
    assert stream.feed(encode_chunk(b"data: a\n\ndata: b\n") + LAST_CHUNK) == b"data: a\n\n"
    assert stream.complete
    assert stream.rest() == b"data: b\n"
    assert budget.held_bytes == 0


def test_count_events() -> None:
    assert count_events(encode_chunk(b"data: a\n\n") * 3) == 3
    assert count_events(b"data: a\r\n\r\n") == 1


def test_retry_budget() -> None:
    budget = RetryBudget(3.0)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    for _ in range(11):
        budget.request(0.2)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(1000):
        budget.request(0.2)
    assert sum(budget.take() for _ in range(100)) == 3


def _decision(request_id: str, slot: int | None = 1) -> Decision:
    return Decision(
        slot=slot,
        target_id="w1" if slot else "",
        reason=RouteReason.HOME if slot else RejectReason.SATURATED,
        request_id=request_id,
        pool="p",
        policy="twofold",
        at_s=1.0,
        prompt_tokens=10,
        examined=(ExaminedTarget(1, "w1", TargetRole.HOME_A1, price_s=0.5),),
        key=(1 << 64) - 1,
    )


def test_decision_log_is_bounded_and_finds_by_id() -> None:
    log = DecisionLog(100, lambda: 5.0)
    for i in range(1000):
        entry = log.add(_decision(f"r{i}"), 3, 4)
        entry.observed_ttft_s = i / 10
    assert len(log) == 100
    assert log.find("r899") == ()
    (found,) = log.find("r999")
    assert (found.observed_ttft_s, found.snapshot_epoch, found.snapshot_version, found.at_s) == (99.9, 3, 4, 5.0)
    assert (found.target_id, found.reason, found.key) == ("w1", "home", (1 << 64) - 1)
    assert found.examined[0].chosen
    log.add(_decision("r999", slot=None), 3, 4)
    assert [one.reason for one in log.find("r999")] == ["home", "rejected-saturated"]
    for _ in range(500):
        log.add(_decision("same"), 3, 4)
    assert len(log.find("same")) == 8


def test_addresses_and_public_ids() -> None:
    assert parse_url("http://10.0.0.1:8000") == Address("10.0.0.1", 8000)
    assert parse_url("https://h/base/") == Address("h", 443, True, b"/base")
    assert parse_url("http://[::1]:80").host_header == b"[::1]:80"
    assert public_id(b"k", "w0") == public_id(b"k", "w0")
    assert len({public_id(b"k", "w0"), public_id(b"k", "w1"), public_id(b"l", "w0")}) == 3


def test_settings_load_from_every_source() -> None:
    settings = resolve(RelaySettings, {"index": "3"}, {"TWOFOLD_GRACE_S": "1.5"}, {"max_body_bytes": 10})
    assert (settings.index, settings.grace_s, settings.http_limits().body_bytes) == (3, 1.5, 10)
    assert all(isinstance(value, int | float | str | bool) for value in msgspec.structs.astuple(settings))
