"""From bytes to facts: what counts as the same prompt, which headers are known, and that garbage does no harm."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing import features
from router.routing.canonical import chat_prompt
from router.routing.features import MAX_FIELD_CHARS, PATHS, parse_request, to_features
from router.routing.types import BadRequest, Endpoint, ParsedRequest, Resolved
from twofold.model.fleet import Pool

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
FIELDS = [
    "model", "stream", "prompt", "messages", "tools", "input", "instructions", "system", "query", "documents",
    "text_1", "text_2", "tokens", "prompt_embeds", "max_tokens", "max_completion_tokens", "max_output_tokens", "n",
    "best_of", "priority", "cache_salt", "seed", "presence_penalty", "logprobs", "stop", "echo", "response_format",
    "previous_response_id", "return_token_ids",
]  # fmt: skip
MESSAGE_LIKE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.text(max_size=8) | JSON,
        "content": st.text() | st.lists(st.fixed_dictionaries({}, optional={"text": JSON, "image_url": JSON})) | JSON,
        "tool_calls": JSON,
        "type": JSON,
        "name": JSON,
    },
)


def parse(endpoint: Endpoint, body: Any, headers: dict[bytes, bytes] | None = None) -> ParsedRequest:
    return parse_request(endpoint, headers or {}, json.dumps(body).encode())


def chat(messages: Any, **fields: Any) -> bytes:
    return parse(Endpoint.CHAT, {"model": "m", "messages": messages, **fields}).prompt


def only_bad_request(endpoint: Endpoint, headers: dict[bytes, bytes], body: bytes) -> None:
    refused: BadRequest | None = None
    try:
        parsed = parse_request(endpoint, headers, body)
    except BadRequest as error:
        refused = error
    if refused is not None:
        assert refused.status == 400
        assert len(refused.message) < 600
        return
    features = to_features(
        parsed, Resolved(pool=Pool(name="p", models=("m",))), request_id="r", sequence=0, arrival_s=0.0
    )
    assert features.prompt_tokens >= 1
    assert len(parsed.prompt) <= 4 * len(body) + 64
    assert (
        max(map(len, (parsed.session_id, parsed.objective, parsed.fairness_id, parsed.cache_salt))) <= MAX_FIELD_CHARS
    )


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(Endpoint), st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_bad_request(endpoint: Endpoint, body: bytes) -> None:
    only_bad_request(endpoint, {}, body)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(Endpoint),
    st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(MESSAGE_LIKE, max_size=4), max_size=8),
    st.dictionaries(
        st.sampled_from(
            [b"x-session-id", b"x-slo-ttft-ms", b"x-llm-d-slo-tpot-ms", b"x-vllm-priority", b"x-data-parallel-rank"]
        ),
        st.binary(max_size=400) | st.sampled_from([b"1e999", b"nan", b"-5", b"5", b"\xb2", b"9" * 5000]),
    ),
)
def test_known_fields_of_any_type_raise_nothing_but_bad_request(
    endpoint: Endpoint, body: dict[str, Any], headers: dict[bytes, bytes]
) -> None:
    only_bad_request(endpoint, headers, json.dumps(body).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("endpoint", list(Endpoint))
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"model":' + b"[" * 200_000,
        b'{"messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"input":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
        b'{"prompt":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"n":' + b"9" * 100_000 + b"}",
    ],
)
def test_deep_nesting_and_endless_numbers_are_refused_or_passed_on(endpoint: Endpoint, body: bytes) -> None:
    only_bad_request(endpoint, {}, body)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"", "not valid JSON", None),
        (b"{", "not valid JSON", None),
        (b"[]", "must be a JSON object", None),
        (b'"x"', "must be a JSON object", None),
        (b'{"model": 5}', "model must be a string", "model"),
        (b'{"model": "' + b"x" * 600 + b'"}', "longer than", "model"),
        (b"[" * 100_000, "must be a JSON object", None),
        (b'{"n": ' + b"9" * 9000 + b"}", "cannot be read", None),
        (b'{"a":' * 100_000, "nested too deeply", None),
    ],
)
def test_bad_bodies_are_named_precisely(body: bytes, message: str, param: str | None) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        parse_request(Endpoint.CHAT, {}, body)
    assert caught.value.param == param


def test_a_growing_conversation_extends_its_prompt() -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    before = chat(turns)
    after = chat([*turns, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}])
    assert after.startswith(before)
    assert after != before


def test_spelling_of_the_json_does_not_matter() -> None:
    one = b'{"model":"m","messages":[{"role":"user","content":"gr\\u00fc\\u00df dich"}]}'
    other = '{ "messages" : [ { "content" : "grüß dich", "role" : "user" } ], "model":"m" }'.encode()
    parts = '{"messages":[{"role":"user","content":[{"type":"text","text":"grüß "},{"type":"text","text":"dich"}]}]}'
    prompts = {parse_request(Endpoint.CHAT, {}, body).prompt for body in (one, other, parts.encode())}
    assert len(prompts) == 1


def test_tools_come_first_and_roles_and_messages_stay_apart() -> None:
    message = [{"role": "user", "content": "ab"}]
    with_tools = chat(message, tools=[{"type": "function", "function": {"name": "f"}}])
    assert with_tools.index(b'"f"') < with_tools.index(b"ab")
    assert with_tools.endswith(chat(message))
    assert chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]) != chat(message)
    assert chat([{"role": "system", "content": "ab"}]) != chat(message)
    assert chat([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]) != chat(
        [{"role": "assistant", "content": None}]
    )


def test_images_count_by_digest_and_text_counts_whole() -> None:
    def with_image(data: str) -> bytes:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
        return chat([{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}])

    one, other = with_image("A" * 100_000), with_image("B" * 100_000)
    assert one != other
    assert len(one) < 200
    assert one == with_image("A" * 100_000)
    result = [{"type": "tool_result", "tool_use_id": "1", "content": "x" * 5000}]
    assert len(chat([{"role": "user", "content": result}])) > 5000


def test_anthropic_and_responses_bodies_name_their_prompt_too() -> None:
    messages = parse(
        Endpoint.MESSAGES, {"system": [{"type": "text", "text": "sys"}], "messages": [{"role": "user", "content": "q"}]}
    )
    assert messages.prompt == chat([{"role": "system", "content": "sys"}, {"role": "user", "content": "q"}])
    text = parse(Endpoint.RESPONSES, {"instructions": "sys", "input": "q"})
    items = parse(Endpoint.RESPONSES, {"instructions": "sys", "input": [{"role": "user", "content": "q"}]})
    assert text.prompt == items.prompt == messages.prompt
    chained = parse(Endpoint.RESPONSES, {"input": "q", "previous_response_id": "resp_1"})
    assert chained.session_id == "resp_1"
    assert chained.resumability.stateful


@pytest.mark.parametrize(
    ("prompt", "expected", "ids", "several"),
    [
        ("hé", "hé".encode(), None, False),
        (["a", "b"], b"a\x1eb", None, True),
        (["a"], b"a", None, False),
        ([1, 258], b"\x01\0\0\0\x02\x01\0\0", 2, False),
        ([[1], [258]], b"\x01\0\0\0\x02\x01\0\0", 2, True),
        ([], b"", 0, False),
        ([-1], b"[-1]", None, False),
        ([2**32], b"[4294967296]", None, False),
        ({"x": 1}, b'{"x": 1}', None, False),
    ],
)
def test_prompts_of_completions(prompt: Any, expected: bytes, ids: int | None, several: bool) -> None:
    parsed = parse(Endpoint.COMPLETIONS, {"prompt": prompt})
    assert (parsed.prompt, parsed.prompt_ids_count) == (expected, ids)
    assert parsed.resumability.several_prompts is several


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.EMBEDDINGS, {"input": "some text"}),
        (Endpoint.EMBEDDINGS, {"messages": [{"role": "user", "content": "some text"}]}),
        (Endpoint.RERANK, {"query": "some text", "documents": ["a"]}),
        (Endpoint.SCORE, {"text_1": "some text", "text_2": "b"}),
        (Endpoint.TOKENIZE, {"prompt": "some text"}),
        (Endpoint.TOKENIZE, {"messages": [{"role": "user", "content": "some text"}]}),
    ],
)
def test_other_endpoints_have_a_prompt_as_well(endpoint: Endpoint, body: dict[str, Any]) -> None:
    assert b"some text" in parse(endpoint, body).prompt


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (b"x-session-id", "session_id"),
        (b"x-session-token", "session_id"),
        (b"x-claude-code-session-id", "session_id"),
        (b"x-session-affinity", "session_id"),
        (b"x-llm-d-inference-objective", "objective"),
        (b"x-gateway-inference-objective", "objective"),
        (b"x-llm-d-inference-fairness-id", "fairness_id"),
        (b"x-gateway-inference-fairness-id", "fairness_id"),
    ],
)
def test_headers_of_other_routers_are_understood(name: bytes, field: str) -> None:
    parsed = parse(Endpoint.CHAT, {}, {name: b" value "})
    assert getattr(parsed, field) == "value"


@pytest.mark.parametrize("prefix", [b"x-llm-d-slo-", b"x-slo-"])
def test_slo_headers_are_milliseconds(prefix: bytes) -> None:
    parsed = parse(Endpoint.CHAT, {}, {prefix + b"ttft-ms": b"1500", prefix + b"tpot-ms": b"25.5"})
    assert (parsed.slo_ttft_s, parsed.slo_tpot_s) == (1.5, 0.0255)
    for bad in (b"", b"-1", b"0", b"nan", b"inf", b"soon"):
        assert parse(Endpoint.CHAT, {}, {prefix + b"ttft-ms": bad}).slo_ttft_s is None


def test_the_priority_header_wins_over_the_field() -> None:
    assert parse(Endpoint.CHAT, {"priority": 3}).priority == 3
    assert parse(Endpoint.CHAT, {"priority": 3}, {b"x-vllm-priority": b"-7"}).priority == -7
    assert parse(Endpoint.CHAT, {"priority": True}, {b"x-vllm-priority": b"--7"}).priority == 0


def test_scalars_are_taken_where_they_make_sense() -> None:
    parsed = parse(
        Endpoint.CHAT,
        {"model": "m", "stream": True, "max_tokens": 5, "max_completion_tokens": 7, "return_token_ids": True, "n": 2},
        {b"x-data-parallel-rank": b"3"},
    )
    assert (parsed.model, parsed.stream, parsed.max_tokens, parsed.return_token_ids) == ("m", True, 7, True)
    assert (parsed.data_parallel_rank, parsed.resumability.n) == (3, 2)
    odd = parse(Endpoint.CHAT, {"stream": "yes", "max_tokens": -1, "n": "two"}, {b"x-data-parallel-rank": b"-1"})
    assert (odd.model, odd.stream, odd.max_tokens, odd.data_parallel_rank, odd.resumability.n) == (
        "",
        False,
        None,
        None,
        1,
    )


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"seed": 0}, "has_seed"),
        ({"presence_penalty": 0.5}, "has_penalties"),
        ({"repetition_penalty": 1.1}, "has_penalties"),
        ({"response_format": {"type": "json_object"}}, "has_structured_output"),
        ({"structured_outputs": {"regex": "a"}}, "has_structured_output"),
        ({"logprobs": True}, "has_logprobs"),
        ({"tools": [{"type": "function"}]}, "has_tools"),
        ({"stop": ["x"]}, "has_stop"),
        ({"echo": True}, "echo"),
        ({"use_beam_search": True}, "beam_search"),
    ],
)
def test_what_bears_on_resuming_is_noted(fields: dict[str, Any], fact: str) -> None:
    assert getattr(parse(Endpoint.COMPLETIONS, {"prompt": "x", **fields}).resumability, fact) is True
    plain = {"prompt": "x", "tools": [], "stop": None, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert getattr(parse(Endpoint.COMPLETIONS, plain).resumability, fact) is False


def test_features_estimate_lengths_from_bytes_and_count_ids_exactly() -> None:
    pool = Pool(name="p", models=("m",), chunk_bytes=64, bytes_per_token=4.0)

    def features(prompt: Any, **changes: Any) -> Any:
        parsed = parse(Endpoint.COMPLETIONS, {"prompt": prompt, **changes.get("body", {})})
        resolved = Resolved(pool=pool, adapter=changes.get("adapter", ""))
        return to_features(parsed, resolved, request_id="r1", sequence=4, arrival_s=2.5)

    text = features("x" * 400)
    assert (text.prompt_tokens, text.prompt_tokens_exact, len(text.chain), text.chunk_tokens) == (101, False, 6, 16.0)
    ids = features(list(range(100)))
    assert (ids.prompt_tokens, ids.prompt_tokens_exact, len(ids.chain), ids.chunk_tokens) == (100, True, 6, 16.0)
    assert (text.pool, text.request_id, text.sequence, text.arrival_s) == ("p", "r1", 4, 2.5)
    assert features("x" * 400, adapter="a").chain != text.chain
    assert features("x" * 400, body={"cache_salt": "s"}).chain != text.chain


def test_a_named_session_shares_its_own_key() -> None:
    resolved = Resolved(pool=Pool(name="p", models=("m",)))

    def key(request_id: str, session: bytes) -> int:
        parsed = parse(Endpoint.CHAT, {}, {b"x-session-id": session})
        return to_features(parsed, resolved, request_id=request_id, sequence=0, arrival_s=0.0).unique_key

    assert key("a", b"s") == key("b", b"s")
    assert key("a", b"") != key("b", b"")


def test_every_routed_path_has_an_endpoint() -> None:
    assert PATHS[b"/v1/chat/completions"] is Endpoint.CHAT
    assert {PATHS[path] for path in PATHS} == set(Endpoint)


_LOOSE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6) | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "type", "tool_calls", "name"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(
    st.fixed_dictionaries(
        {"model": st.just("m")},
        optional={
            "messages": _LOOSE | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": _LOOSE})),
            "tools": _LOOSE,
            "system": _LOOSE,
        },
    )
)
def test_messages_of_any_shape_give_the_prompt_that_their_raw_json_gives(body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    raw = features._decode_body(data)
    assert parse_request(Endpoint.CHAT, {}, data).prompt == chat_prompt(raw.tools, raw.messages)
    assert parse_request(Endpoint.MESSAGES, {}, data).prompt == chat_prompt(raw.tools, raw.messages, raw.system)
