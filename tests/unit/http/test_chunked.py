"""Body framings: incremental decoding equals decoding at once, and only the strict grammar passes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.chunked import (
    LAST_CHUNK,
    ChunkedDecoder,
    CloseDecoder,
    FramingError,
    LengthDecoder,
    encode_chunk,
    whole_chunks,
)

_PAYLOADS = st.lists(st.binary(min_size=1, max_size=50), max_size=8)


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def _feed(decoder: ChunkedDecoder, pieces: list[bytes]) -> bytes:
    return b"".join(decoder.feed(piece) for piece in pieces)


@given(_PAYLOADS, st.lists(st.integers(0, 500)), st.binary(max_size=20))
def test_chunked_decoding_in_any_cut(payloads: list[bytes], cuts: list[int], behind: bytes) -> None:
    wire = b"".join(map(encode_chunk, payloads)) + LAST_CHUNK + behind
    decoder = ChunkedDecoder()
    got = b"".join(decoder.feed(piece) for piece in _pieces(wire, cuts))
    assert got == b"".join(payloads)
    assert decoder.done
    assert decoder.rest == behind


@pytest.mark.parametrize(
    "wire",
    [
        b"5\nhello\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhelloo\r\n",
        b"g\r\n",
        b"+5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"-1\r\n",
        b" 5\r\nhello\r\n",
        b"\r\n",
        b"123456789\r\n",
        b"5_0\r\n",
        b"5\rhello\r\n",
        b"5;" + b"x" * 5000 + b"\r\n",
        b"0\r\n" + b"".join(b"t%d: %b\r\n" % (i, b"v" * 3000) for i in range(6)),
    ],
)
@pytest.mark.parametrize("step", [1, 10_000])
def test_malformed_chunks_are_refused(wire: bytes, step: int) -> None:
    wire += b"\r\n\r\n"
    with pytest.raises(FramingError):
        _feed(ChunkedDecoder(), [wire[at : at + step] for at in range(0, len(wire), step)])


def test_extensions_and_trailers_are_dropped() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b'5;name="v"\r\nhello\r\n0;x\r\nA: b\r\n\r\nrest') == b"hello"
    assert decoder.done
    assert decoder.rest == b"rest"


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_any_bytes_decode_or_are_refused_with_bounded_state(wire: bytes, cuts: list[int]) -> None:
    decoder = ChunkedDecoder()
    try:
        total = sum(len(decoder.feed(piece)) for piece in _pieces(wire, cuts))
    except FramingError:
        return
    assert total <= len(wire)


@given(st.binary(max_size=100), st.integers(0, 100), st.lists(st.integers(0, 100)))
def test_length_decoder(data: bytes, length: int, cuts: list[int]) -> None:
    decoder = LengthDecoder(length)
    got = b"".join(decoder.feed(piece) for piece in _pieces(data, cuts))
    assert got == data[:length]
    assert decoder.done == (len(data) >= length)
    assert decoder.eof() == decoder.done
    assert decoder.rest == data[length:]


def test_close_decoder() -> None:
    decoder = CloseDecoder()
    assert decoder.feed(b"abc") == b"abc"
    assert not decoder.done
    assert decoder.eof()


def test_whole_chunks_accepts_only_whole_events() -> None:
    event = encode_chunk(b"data: x\n\n")
    assert whole_chunks(event) == len(event)
    assert whole_chunks(event + event) == 2 * len(event)
    assert whole_chunks(event + LAST_CHUNK) == len(event)
    assert whole_chunks(LAST_CHUNK) == 0
    for wire in (
        event[:-1],
        event[:-2],
        event + b"5",
        event + b"0\r\n",
        event + LAST_CHUNK + b"x",
        encode_chunk(b"data: x\n") + encode_chunk(b"\ndata"),
        encode_chunk(b"data: x"),
        b"9;ext\r\ndata: x\n\n\r\n",
        b"a\r\ndata: x\n\n\r\n",
    ):
        assert whole_chunks(wire) == -1


@given(st.lists(st.binary(min_size=1, max_size=30).filter(lambda p: b"\n" not in p), min_size=1, max_size=6))
def test_whole_chunks_agrees_with_the_decoder(texts: list[bytes]) -> None:
    wire = b"".join(encode_chunk(b"data: " + text + b"\n\n") for text in texts)
    assert whole_chunks(wire) == len(wire)
    assert ChunkedDecoder().feed(wire) == b"".join(b"data: " + text + b"\n\n" for text in texts)
