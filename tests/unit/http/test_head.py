"""Request heads: what is accepted, what is refused, and above all what smugglers try."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.head import HttpError, RequestHead, parse_head
from router.http.known_heads import request_heads, response_heads
from router.http.response_head import BadResponse, parse_response_head


def parse(*lines: str, request: str = "POST /x HTTP/1.1") -> RequestHead:
    return parse_head("\r\n".join((request, *lines, "", "")).encode("latin-1"), 100)


def test_plain_head() -> None:
    head = parse("Host: a", "X-Custom: V", "Content-Length: 12", request="POST /v1/completions?a=b HTTP/1.1")
    assert (head.method, head.target, head.path) == (b"POST", b"/v1/completions?a=b", b"/v1/completions")
    assert head.headers == [(b"host", b"a"), (b"x-custom", b"V")]
    assert (head.content_length, head.chunked, head.keep_alive, head.http10) == (12, False, True, False)


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 5"],
        ["Content-Length: +5"],
        ["Content-Length: -1"],
        ["Content-Length: 0x5"],
        ["Content-Length: 5 5"],
        ["Content-Length:"],
        ["Content-Length: 99999999999999999999999999"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding : chunked"],
        ["Transfer-Encoding: \x0bchunked"],
        ["A: b", " folded: c"],
        ["A: b\r\n\tTransfer-Encoding: chunked"],
        [" A: b"],
        ["A: b\nTransfer-Encoding: chunked"],
        ["A: b\rTransfer-Encoding: chunked"],
        ["A: b\x00c"],
        ["A\x00: b"],
        ["A b: c"],
        [": c"],
        ["NoColon"],
        ["Host: b"],
        ["Content-Type: a", "Content-Type: b"],
    ],
)
def test_malformed_or_ambiguous_heads_are_refused(lines: list[str]) -> None:
    with pytest.raises(HttpError) as caught:
        parse("Host: a", *lines)
    assert caught.value.status in (400, 501)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("POST /x HTTP/2.0", 505),
        ("POST /x", 505),
        ("POST /x HTTP/1.9", 400),
        ("POST /x HTTP/1.1 ", 400),
        ("NOTAMETHOD /x HTTP/1.1", 501),
        ("post /x HTTP/1.1", 501),
        ("CONNECT a:80 HTTP/1.1", 400),
        ("GET ftp://a/x HTTP/1.1", 400),
        ("PRI * HTTP/2.0", 400),
    ],
)
def test_request_lines_that_are_refused(request_line: str, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        parse("Host: a", request=request_line)
    assert caught.value.status == status


def test_missing_host_is_refused_in_http11_only() -> None:
    with pytest.raises(HttpError):
        parse()
    assert not parse(request="GET /x HTTP/1.0").keep_alive
    assert parse("Connection: Keep-Alive", request="GET /x HTTP/1.0").keep_alive


def test_chunked_is_refused_in_http10() -> None:
    with pytest.raises(HttpError):
        parse("Transfer-Encoding: chunked", request="POST /x HTTP/1.0")


def test_absolute_form_and_upgrade_offers() -> None:
    assert parse("Host: a", request="GET http://a/x?y HTTP/1.1").target == b"/x?y"
    assert parse("Host: a", request="GET http://a HTTP/1.1").target == b"/"
    assert parse("Host: a", request="GET http://a?y HTTP/1.1").target == b"/?y"
    head = parse("Host: a", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "Content-Length: 3")
    assert (head.content_length, head.keep_alive) == (3, True)


def test_connection_close_and_header_count() -> None:
    assert not parse("Host: a", "Connection: keep-alive, Close").keep_alive
    with pytest.raises(HttpError) as caught:
        parse("Host: a", *[f"x{i}: y" for i in range(100)])
    assert caught.value.status == 431


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parse_head(data + b"\r\n\r\n", 100)
    except HttpError as error:
        refused = error.status
        assert 400 <= refused <= 505


_TOKENS = st.sampled_from(
    [b"Content-Length", b"Transfer-Encoding", b"Host", b"chunked", b"5", b":", b" ", b"\t", b"\r\n", b"\n", b"\r", b","]
)


@given(st.lists(_TOKENS, max_size=25))
def test_an_accepted_head_has_one_framing(tokens: list[bytes]) -> None:
    data = b"POST /x HTTP/1.1\r\nHost: a\r\n" + b"".join(tokens) + b"\r\n\r\n"
    end = data.index(b"\r\n\r\n") + 4
    try:
        head = parse_head(data[:end], 100)
    except HttpError:
        return
    lengths = [line for line in data[:end].lower().split(b"\r\n") if line.startswith(b"content-length:")]
    encodings = [value for name, value in head.headers if name == b"transfer-encoding"]
    assert len(lengths) + len(encodings) <= 1
    assert head.chunked == bool(encodings)
    assert (head.content_length is not None) == bool(lengths)
    assert b"content-length" not in head.fields


_LINES = st.lists(
    st.sampled_from(
        [
            *(
                b"Host: a",
                b"Host: b",
                b"Accept: */*",
                b"Content-Length: 5",
                b"Content-Length: 17",
                b"content-length: 0",
            ),
            *(b"Content-Length: 5, 5", b"Content-Length:", b"Content-Length: +5", b"Content-Length: 0x5", b"a: b\rc"),
            *(
                b"CONTENT-LENGTH: 9",
                b"Transfer-Encoding: chunked",
                b"Connection: close",
                b"X-Request-Id: one",
                b" folded",
            ),
            *(b"Content-Length: 99999999999999999999", b"X-Y: \r\nContent-Length: 7", b"Cookie: Content-Length: 3"),
        ]
    ),
    max_size=5,
)


def _plain(head: RequestHead) -> tuple[object, ...]:
    return (
        *(head.method, head.target, head.path, head.http10, head.headers, head.fields),
        *(head.content_length, head.chunked, head.keep_alive),
    )


@given(st.lists(st.tuples(_LINES, st.sampled_from([b"", b"5", b"Content-Length: 8\r\n\r\n"])), max_size=8))
def test_a_remembered_request_head_is_what_the_parser_makes_of_it(met: list[tuple[list[bytes], bytes]]) -> None:
    known = request_heads(100)
    for lines, behind in met:
        data = b"\r\n".join((b"POST /x?y HTTP/1.1", *lines, b"", b""))
        data = data[: data.index(b"\r\n\r\n") + 4]
        recalled = known.recall(data + behind)
        try:
            parsed = _plain(parse_head(data, 100))
        except HttpError:
            assert recalled is None
            with pytest.raises(HttpError):
                known.read(data)
            continue
        if recalled is not None:
            assert (_plain(recalled[0]), recalled[1]) == (parsed, len(data))
        head = known.read(data)
        assert _plain(head) == parsed
        assert head.request_id == (b"one" if b"X-Request-Id: one" in lines else b"")


@given(st.lists(_LINES, max_size=8))
def test_a_remembered_response_head_is_what_the_parser_makes_of_it(met: list[list[bytes]]) -> None:
    known = response_heads()
    for lines in met:
        data = b"\r\n".join((b"HTTP/1.1 200 OK", *lines))
        whole = data + b"\r\n\r\n"
        if whole.index(b"\r\n\r\n") + 4 != len(whole):
            continue
        recalled = known.recall(whole + b"{}")
        try:
            parsed = parse_response_head(data)
        except BadResponse:
            assert recalled is None
            with pytest.raises(BadResponse):
                known.read(whole)
            continue
        for head in (known.read(whole), *((recalled[0],) if recalled else ())):
            assert (head.status, head.headers, head.content_type) == (
                parsed.status,
                parsed.headers,
                parsed.content_type,
            )
            assert (head.content_length, head.chunked, head.keep_alive) == (
                *(parsed.content_length, parsed.chunked, parsed.keep_alive),
            )


def test_what_is_remembered_is_bounded_and_met_again() -> None:
    known = request_heads(100)
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    first = known.read(head % 5)
    assert known.recall(head % 77) == (known.read(head % 77), len(head % 77))
    assert known.read(head % 77).headers is first.headers
    for number in range(2000):
        known.read(b"POST /x HTTP/1.1\r\nHost: a\r\nX-Request-Id: %d\r\n\r\n" % number)
    assert known.remembered <= 256
    known.read(b"POST /x HTTP/1.1\r\nHost: a\r\nX-Long: %b\r\n\r\n" % (b"x" * 9000))
    assert known.remembered <= 256
