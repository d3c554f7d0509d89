"""Heads that the router writes and reads, and error bodies."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.errors import ErrorStyle, error_body, error_event
from router.http.forward import client_request_id, request_to_worker, response_head, response_to_client
from router.http.head import parse_head
from router.http.response_head import BadResponse, parse_response_head
from twofold.model.reasons import RejectReason

_NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,20}", fullmatch=True)
_VALUES = st.from_regex(r"[!-~]([ -~]{0,30}[!-~])?", fullmatch=True)


@given(st.lists(st.tuples(_NAMES, _VALUES), max_size=10))
def test_a_forwarded_head_is_well_formed_and_carries_no_credentials(fields: list[tuple[str, str]]) -> None:
    special = {"host", "content-length", "transfer-encoding", "connection", "content-type", "expect", "upgrade"}
    fields = [field for field in fields if field[0].lower() not in special]
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    head = parse_head(
        f"POST /x HTTP/1.1\r\nHost: a\r\nAuthorization: s\r\nX-Api-Key: s\r\nConnection: x-mine\r\n"
        f"X-Mine: 1\r\n{lines}\r\n".encode(),
        100,
    )
    forwarded = parse_head(request_to_worker(head, b"/base", b"w:1", 7, b"id", 2), 100)
    assert forwarded.target == b"/base/x"
    assert forwarded.content_length == 7
    assert forwarded.fields[b"host"] == b"w:1"
    assert forwarded.fields[b"x-data-parallel-rank"] == b"2"
    assert not {b"authorization", b"x-api-key", b"connection", b"x-mine"} & set(forwarded.fields)
    kept = {name for name, _ in head.headers} & set(forwarded.fields)
    for name in kept - {b"host", b"x-request-id", b"x-data-parallel-rank", b"content-length"}:
        assert [v for n, v in forwarded.headers if n == name] == [v for n, v in head.headers if n == name]


def test_request_ids() -> None:
    def given_id(value: str) -> bytes | None:
        return client_request_id(parse_head(f"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: {value}\r\n\r\n".encode(), 9))

    assert given_id("abc-1.2:3") == b"abc-1.2:3"
    for unsafe in ("a b", "", "x" * 129, "<script>", "a,b", 'a"b'):
        assert given_id(unsafe) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 200 OK\r\nbad",
        b"HTTP/1.1 200 OK\r\na b: c",
        b"HTTP/1.1 200 OK\r\na: b\nc: d",
        b"HTTP/1.1 200 OK\r\na: b\x00",
        b"HTTP/1.1 200 OK\r\ncontent-length: x",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip",
        b"HTTP/1.1 200 OK\r\n folded: x",
    ],
)
def test_bad_response_heads(data: bytes) -> None:
    with pytest.raises(BadResponse):
        parse_response_head(data)


@given(st.binary(max_size=200))
def test_any_response_head_parses_or_is_refused(data: bytes) -> None:
    try:
        parse_response_head(data)
    except BadResponse:
        pass


def test_response_to_client_drops_hop_by_hop() -> None:
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nDate: x\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n"
        b"X-Request-Id: theirs\r\nX-Extra: kept\r\nContent-Type: text/event-stream"
    )
    out = response_to_client(
        head, extra=b"x-request-id: mine\r\n", content_length=None, chunked=True, keep_alive=True, http10=False
    )
    parsed = parse_response_head(out[:-4])
    names = [name for name, _ in parsed.headers]
    assert names == [b"date", b"x-extra", b"content-type", b"x-request-id", b"transfer-encoding"]
    assert head.is_event_stream
    assert b"connection: close" in response_head(200, (), content_length=0, keep_alive=False)


def test_error_shapes() -> None:
    value = msgspec.json.decode(error_body(ErrorStyle.OPENAI, 404, "no", "model"))
    assert value == {"error": {"message": "no", "type": "NotFoundError", "param": "model", "code": 404}}
    value = msgspec.json.decode(error_body(ErrorStyle.ANTHROPIC, 503, "no"))
    assert value == {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}
    event = error_event(ErrorStyle.OPENAI, 502, "a\n\nb", RejectReason.UPSTREAM_FAILED)
    assert event.count(b"\n\n") == 1
    assert msgspec.json.decode(event[6:])["error"]["reason"] == "upstream-failed"
