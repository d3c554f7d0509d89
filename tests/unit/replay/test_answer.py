"""SSE taken apart however it is cut, and garbage without a crash."""

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from emulator.tokens import ChainChecker, TokenChain, decode
from twofold.replay.answer import Answer
from twofold.replay.client import parse_url

PROMPT = [300, 301, 302]


def stream(tokens: int, newline: str = "\n") -> bytes:
    chain = TokenChain(PROMPT)
    events = [{"choices": [{"text": decode([chain.next()]), "finish_reason": None}]} for _ in range(tokens)]
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}
    lines = [": comment", *(f"data: {json.dumps(event)}" for event in [*events, {"choices": [], "usage": usage}])]
    return "".join(line + 2 * newline for line in [*lines, "data: [DONE]"]).encode()


def answer() -> Answer:
    taken = Answer(ChainChecker(PROMPT), keep_text=True, streamed=True, on_gap=lambda _gap_s: None)
    taken.status = 200
    return taken


@given(cuts=st.lists(st.integers(0, 1000), max_size=12), newline=st.sampled_from(["\n", "\r\n"]))
def test_a_stream_cut_anywhere_is_the_same_answer(cuts: list[int], newline: str) -> None:
    data = stream(6, newline)
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    taken = answer()
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        taken.on_body(data[start:end], float(number))
    taken.on_complete(99.0)
    assert (taken.failure, taken.sse_done) == ("", True)
    assert (taken.tokens, taken.cached_tokens, taken.prompt_tokens) == (6, 2, 3)
    assert taken.checker is not None
    assert taken.checker.verified == 6
    assert len(taken.text) == 24


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_garbage_is_a_failure_not_a_crash(pieces: list[bytes]) -> None:
    taken = answer()
    for piece in pieces:
        taken.on_body(piece, 0.0)
    taken.on_complete(0.0)
    assert taken.failure in ("truncated", "bad-event")
    assert taken.tokens == 0


def test_an_answer_without_end_is_truncated() -> None:
    taken = answer()
    taken.on_body(stream(3).replace(b"data: [DONE]\n\n", b""), 0.0)
    taken.on_complete(0.0)
    assert taken.failure == "truncated"


def test_events_after_the_end_are_a_failure() -> None:
    taken = answer()
    taken.on_body(stream(2) + b'data: {"choices": []}\n\n', 0.0)
    taken.on_complete(0.0)
    assert taken.failure == "bad-event"


def test_times_are_those_of_text_not_of_other_events() -> None:
    gaps: list[float] = []
    taken = Answer(None, keep_text=False, streamed=True, on_gap=gaps.append)
    taken.status = 200
    for now_s, text in ((1.0, ""), (2.0, "a"), (3.5, "b"), (3.5, "")):
        taken.on_body(b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n", now_s)
    assert (taken.first_s, taken.last_s, taken.events, gaps) == (2.0, 3.5, 2, [1.5])
    assert taken.tokens == 2


def test_base_urls() -> None:
    assert parse_url("http://h:8000/v1").prefix == ""
    assert parse_url("https://h/api/v1/").prefix == "/api"
    assert (parse_url("h:8000").host, parse_url("h:8000").port) == ("h", 8000)
    assert parse_url("https://h").authority == "h"
    assert parse_url("http://[::1]:81").authority == "[::1]:81"
