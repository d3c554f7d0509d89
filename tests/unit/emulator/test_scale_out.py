"""Tool calls piece by piece, and decoding with a state that is carried: the same as all at once."""

import contextlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.server.derender import Window
from emulator.server.derender_checks import validate
from emulator.server.errors import ApiError
from emulator.server.hermes import HermesStream, call_frame, parse
from emulator.tokens import EOS_ID, decode, encode

_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=8)


def pieces(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(borders)]


@given(NAMES, _VALUES, st.text("abc <", max_size=6), st.lists(st.integers(0, 120), max_size=12))
def test_a_streamed_call_is_the_parsed_call(name: str, arguments: Any, before: str, cuts: list[int]) -> None:
    begin, end = call_frame(name)
    text = before + begin + json.dumps(arguments) + end
    content, calls = parse(text)
    assert (content, [(call.name, json.loads(call.arguments)) for call in calls]) == (
        before or None,
        [(name, arguments)],
    )
    stream = HermesStream()
    said, names, written = "", [], ""
    for piece in pieces(text, cuts):
        shown, deltas = stream.take(piece)
        said += shown or ""
        for delta in deltas:
            assert delta["index"] == 0
            names += [delta["function"]["name"]] if "id" in delta else []
            written += delta["function"].get("arguments", "")
    assert (said, names, json.loads(written)) == (before, [name], arguments)


@pytest.mark.parametrize(
    "text", ["no call", "a < b", "<tool_call>{broken</tool_call>", "<tool_call>{}", "<tool_call>3"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert parse(text) == (text, [])


@given(st.text(max_size=12), st.lists(st.integers(0, 30), max_size=6), st.lists(st.integers(0, EOS_ID), max_size=9))
def test_a_carried_window_decodes_like_one_go(text: str, cuts: list[int], prompt: list[int]) -> None:
    ids = encode(text)
    borders = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    state = Window.after(prompt).state()
    got = ""
    for start, end in itertools.pairwise(borders):
        window = Window(json.loads(json.dumps(state)))
        got += window.take(ids[start:end])
        state = window.state()
        assert len(state["prev_tokens"]) <= 12 + 4 * 4
    whole = Window.after(prompt).take(ids)
    assert got == whole
    if "\ufffd" not in text and not decode(prompt[-7:]).endswith("\ufffd"):
        assert got == text


def test_special_ids_are_text_only_where_a_parser_wants_them() -> None:
    assert Window.after([]).take([97, EOS_ID, 98]) == "ab"
    assert Window.after([], special=True).take([97, EOS_ID, 98]) == "a<|eos|>b"


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 99) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("choices", "index", "token_ids", "logprobs", "content", "token_id", "logprob", "top_logprobs"),
                    *("output_mode", "usage", "prev_tokens", "read_offset", "output_chunk_lens", "output_token_ids"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["stream", "generate_response", "generate_chunk", "stream_state", "prompt_token_ids"]), _JSON
    )
)
def test_any_body_passes_or_is_refused(body: dict[str, Any]) -> None:
    with contextlib.suppress(ApiError):
        validate(body, "generate_response", "body.DerenderChatRequest", "DerenderChatStreamRequest")
