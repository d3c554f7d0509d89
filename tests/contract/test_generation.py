"""What a router relies on of logprobs, constraints, generate, render and derender. Runs on real engines too."""

import json
import math
import random
import re
import threading
import time
from typing import Any

import pytest

from .client import Response, exchange, open_request, read_response
from .conftest import Engine
from .test_behaviour import completion, metric, numbered, wait_until


def generate(engine: Engine, ids: list[int], sampling: dict[str, Any], **fields: Any) -> Response:
    body = {"model": engine.model, "token_ids": ids, "sampling_params": {"temperature": 0, **sampling}, **fields}
    return exchange(engine.url, "POST", "/inference/v1/generate", body)


def chat(engine: Engine, text: str, **fields: Any) -> Response:
    body = {"model": engine.model, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    return exchange(engine.url, "POST", "/v1/chat/completions", body)


def prompt_of(number: int) -> str:
    """A prompt that ends with a whole character: vLLM shows what is left of one before its first constrained text."""
    return f"task {number}: import os, sys"


def ids_of(engine: Engine, text: str) -> list[int]:
    answer = exchange(engine.url, "POST", "/tokenize", {"model": engine.model, "prompt": text}).json()
    return list(answer["tokens"])


def test_logprobs_of_a_completion_fit_its_text_and_each_other(engine: Engine) -> None:
    prompt = numbered(21, 30)
    answer = completion(engine, prompt, max_tokens=12, logprobs=5, return_token_ids=True).json()["choices"][0]
    found = answer["logprobs"]
    assert {len(values) for values in found.values()} == {12}
    offset = 0
    for place, (token, own, top) in enumerate(
        zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    ):
        assert found["text_offset"][place] == offset
        offset += len(token)
        assert own == max(top.values()), "greedy sampling takes the best"
        assert own <= 0
        assert sum(math.exp(value) for value in top.values()) <= 1.0 + 1e-6
    assert len(found["tokens"]) == len(answer["token_ids"])


def test_streamed_logprobs_are_those_of_the_whole_answer(engine: Engine) -> None:
    prompt = numbered(22, 30)
    whole = completion(engine, prompt, max_tokens=8, logprobs=2).json()["choices"][0]["logprobs"]
    deltas = completion(engine, prompt, max_tokens=8, logprobs=2, stream=True).deltas()
    for name, values in whole.items():
        streamed = [value for delta in deltas for value in delta["choices"][0]["logprobs"][name]]
        if name in ("tokens", "text_offset"):
            assert streamed == values
        elif name == "token_logprobs":
            assert streamed == pytest.approx(values, abs=1e-4)
        else:
            assert [set(one) for one in streamed] == [set(one) for one in values]


@pytest.mark.parametrize("cut", [1, 7])
def test_logprobs_go_on_where_a_resumed_request_goes_on(engine: Engine, cut: int) -> None:
    prompt = numbered(23, 40)
    whole = completion(engine, prompt, max_tokens=10, logprobs=1, return_token_ids=True).json()["choices"][0]
    rest = completion(engine, prompt + whole["token_ids"][:cut], max_tokens=10 - cut, logprobs=1).json()
    expected = whole["logprobs"]["token_logprobs"][cut:]
    assert rest["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_tokens_as_ids_are_the_token_ids(engine: Engine) -> None:
    options = {"logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = completion(engine, numbered(24, 9), max_tokens=6, **options).json()["choices"][0]
    assert answer["logprobs"]["tokens"] == [f"token_id:{token}" for token in answer["token_ids"]]


def test_chat_logprobs_spell_the_answer(engine: Engine) -> None:
    choice = chat(engine, "say something", max_tokens=10, ignore_eos=True, logprobs=True, top_logprobs=3).json()
    entries = choice["choices"][0]["logprobs"]["content"]
    assert len(entries) == 10
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in entries)
    text = choice["choices"][0]["message"]["content"]
    if "\ufffd" not in text:
        assert "".join(entry["token"] for entry in entries) == text


def test_echoed_prompt_has_logprobs_of_its_own(engine: Engine) -> None:
    prompt = numbered(25, 20)
    options = {"max_tokens": 3, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    found = completion(engine, prompt, return_token_ids=True, **options).json()["choices"][0]
    ids = prompt + found["token_ids"]
    assert found["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert found["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in found["logprobs"]["token_logprobs"][1:])
    assert len(found["prompt_logprobs"]) == len(prompt)
    assert all(str(token) in entry for token, entry in zip(prompt[1:], found["prompt_logprobs"][1:], strict=True))


def test_prompt_logprobs_take_nothing_from_the_prefix_cache(engine: Engine) -> None:
    rng = random.Random(time.time_ns())
    prompt = [rng.randrange(70, 250) for _ in range(2 * engine.block_tokens + 5)]
    completion(engine, prompt, max_tokens=1)
    queries = metric(engine, "vllm:prefix_cache_queries_total")
    cached = completion(engine, prompt, max_tokens=1, prompt_logprobs=0).json()["usage"]["prompt_tokens_details"]
    assert cached["cached_tokens"] == 0
    again = completion(engine, prompt, max_tokens=1).json()["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] == 2 * engine.block_tokens
    wait_until(lambda: metric(engine, "vllm:prefix_cache_queries_total") - queries == len(prompt))


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-f]{4}", "(yes|no|perhaps)!?", "\\d+\\.\\d{2}"])
def test_a_finished_answer_matches_its_regex(engine: Engine, pattern: str) -> None:
    for place in range(3):
        answer = completion(
            engine, prompt_of(place), max_tokens=40, ignore_eos=False, structured_outputs={"regex": pattern}
        ).json()["choices"][0]
        if answer["finish_reason"] == "stop":
            assert re.fullmatch(pattern, answer["text"])


def test_the_rest_of_a_regex_leads_to_the_same_end(engine: Engine) -> None:
    prompt = ids_of(engine, prompt_of(33))
    options = {"max_tokens": 20, "ignore_eos": False, "return_token_ids": True}
    whole = completion(engine, prompt, structured_outputs={"regex": "[0-9]{3}-[a-z]{5}"}, **options).json()
    text, ids = whole["choices"][0]["text"], whole["choices"][0]["token_ids"]
    assert re.fullmatch("[0-9]{3}-[a-z]{5}", text)
    sent = completion(engine, prompt, structured_outputs={"regex": "[0-9]{3}-[a-z]{5}"}, max_tokens=2).json()
    begun = len(sent["choices"][0]["text"])
    digits = max(0, 3 - begun)
    residual = f"[0-9]{{{digits}}}-[a-z]{{5}}" if digits else "-[a-z]{5}"
    rest = completion(engine, prompt + ids[:2], structured_outputs={"regex": residual}, **options).json()
    assert text[:begun] + rest["choices"][0]["text"] == text


def test_a_choice_is_one_of_those_offered(engine: Engine) -> None:
    offered = ["import sys", "import os", "def", "définir ü"]
    for place in range(4):
        answer = completion(
            engine, prompt_of(place), max_tokens=30, ignore_eos=False, structured_outputs={"choice": offered}
        ).json()["choices"][0]
        assert answer["finish_reason"] == "stop"
        assert answer["text"] in offered


def test_a_finished_object_fits_its_schema(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"level": {"enum": [1, 2, 3]}, "on": {"type": "boolean"}, "tag": {"const": "x"}},
        "required": ["level", "on", "tag"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for ask in (
        lambda: chat(engine, "give me an object", max_tokens=60, response_format=format_).json()["choices"][0],
        lambda: chat(engine, "one more", max_tokens=60, structured_outputs={"json": schema}).json()["choices"][0],
    ):
        choice = ask()
        if choice["finish_reason"] == "stop":
            value = json.loads(choice["message"]["content"])
            assert value["level"] in (1, 2, 3)
            assert (type(value["on"]), value["tag"], len(value)) == (bool, "x", 3)


def test_what_ignores_the_end_goes_on_after_its_text(engine: Engine) -> None:
    options = {"structured_outputs": {"choice": ["done"]}, "return_token_ids": True, "max_tokens": 20}
    ended = completion(engine, prompt_of(5), ignore_eos=False, **options).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("done", "stop")
    goes_on = completion(engine, prompt_of(5), ignore_eos=True, **options).json()["choices"][0]
    assert goes_on["finish_reason"] == "length"
    assert goes_on["token_ids"][: len(ended["token_ids"])] == ended["token_ids"]
    assert goes_on["text"].startswith("done")
    assert len(goes_on["text"]) > 4


def test_only_allowed_ids_come(engine: Engine) -> None:
    allowed = [80, 81, 90]
    options = {"max_tokens": 12, "return_token_ids": True}
    first = completion(engine, numbered(50, 20), allowed_token_ids=allowed, **options).json()["choices"][0]
    assert set(first["token_ids"]) <= set(allowed)
    again = completion(engine, numbered(50, 20), allowed_token_ids=allowed, **options).json()["choices"][0]
    assert again["token_ids"] == first["token_ids"]
    rest = completion(engine, numbered(50, 20) + first["token_ids"][:5], allowed_token_ids=allowed, **options).json()
    assert rest["choices"][0]["token_ids"][:7] == first["token_ids"][5:]
    forced = completion(engine, numbered(50, 20), logit_bias={"77": 100}, **options).json()["choices"][0]
    assert set(forced["token_ids"]) == {77}


def test_bad_words_do_not_come(engine: Engine) -> None:
    prompt = "def main(argv):\n    import os, sys\n"
    text = completion(engine, prompt, max_tokens=16).json()["choices"][0]["text"]
    words = [word for word in text.split() if word.isascii() and word.isalpha()][:2]
    assert words
    response = completion(engine, prompt, max_tokens=16, bad_words=words)
    assert response.status == 200
    if engine.kind == "emulator":  # vLLM bans one way to spell a word in tokens; the tiny model finds another
        assert not set(response.json()["choices"][0]["text"].split()) & set(words)


def test_generate_gives_the_tokens_of_a_completion(engine: Engine) -> None:
    prompt = numbered(60, 25)
    expected = completion(engine, prompt, max_tokens=9, return_token_ids=True).json()["choices"][0]["token_ids"]
    whole = generate(engine, prompt, {"max_tokens": 9, "ignore_eos": True}).json()
    assert whole["choices"][0]["token_ids"] == expected
    stream = generate(engine, prompt, {"max_tokens": 9, "ignore_eos": True}, stream=True)
    ids = [token for delta in stream.deltas() for token in delta["choices"][0]["token_ids"]]
    assert ids == expected
    assert stream.deltas()[-1]["choices"][0]["weight_versions"] == [{"version": "default", "start": 0, "end": 9}]
    assert stream.events()[-1] == (None, "[DONE]")
    rest = generate(engine, prompt + expected[:4], {"max_tokens": 5, "ignore_eos": True}).json()
    assert rest["choices"][0]["token_ids"] == expected[4:]


def rendered_chat(engine: Engine, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    body = {"model": engine.model, "messages": [{"role": "user", "content": "tell me"}], **fields}
    response = exchange(engine.url, "POST", "/v1/chat/completions/render", body)
    assert response.status == 200, response.body
    return body, response.json()


def derendered(engine: Engine, chunks: list[dict[str, Any]], request: dict[str, Any], ids: list[int]) -> str:
    """The text of generated chunks, with the state carried from call to call."""
    state, text = None, ""
    for chunk in chunks:
        body = {
            "model": engine.model,
            "stream": True,
            "generate_chunk": chunk,
            "stream_state": state,
            "chat_request": request,
            "prompt_token_ids": ids,
        }
        response = exchange(engine.url, "POST", "/v1/chat/completions/derender", body)
        assert response.status == 200, response.body
        answer = response.json()
        state = answer["stream_state"]
        for choice in answer["chunk"]["choices"]:
            text += choice["delta"]["content"] or ""
    return text


@pytest.mark.parametrize("cut", [None, 1, 6])
def test_render_generate_derender_is_a_chat_even_across_a_cut(engine: Engine, cut: int | None) -> None:
    body, request = rendered_chat(engine, max_tokens=10, temperature=0, ignore_eos=True)
    expected = exchange(engine.url, "POST", "/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    request |= {"stream": True, "return_token_ids": True}
    prompt = request["token_ids"]
    chunks = exchange(engine.url, "POST", "/inference/v1/generate", request).deltas()
    if cut is not None:
        ids = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]][:cut]
        sampling = {**request["sampling_params"], "max_tokens": 10 - cut}
        again = {**request, "token_ids": prompt + ids, "sampling_params": sampling, "request_id": "resumed"}
        first = {**chunks[0], "choices": [{**chunks[0]["choices"][0], "token_ids": ids, "finish_reason": None}]}
        chunks = [first, *exchange(engine.url, "POST", "/inference/v1/generate", again).deltas()]
    assert derendered(engine, chunks, body, prompt) == expected


def test_render_of_completions_goes_back_through_derender(engine: Engine) -> None:
    body = {"model": engine.model, "prompt": ["import os", "def f"], "max_tokens": 6, "temperature": 0}
    expected = exchange(engine.url, "POST", "/v1/completions", body).json()
    requests = exchange(engine.url, "POST", "/v1/completions/render", body).json()
    answers = [exchange(engine.url, "POST", "/inference/v1/generate", request).json() for request in requests]
    given = {
        "model": engine.model,
        "generate_responses": answers,
        "prompt_tokens": [len(request["token_ids"]) for request in requests],
        "prompt_token_ids": [request["token_ids"] for request in requests],
    }
    back = exchange(engine.url, "POST", "/v1/completions/derender", given).json()
    assert [choice["text"] for choice in back["choices"]] == [choice["text"] for choice in expected["choices"]]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert back["usage"][name] == expected["usage"][name]


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"prompt": numbered(70, 12), "max_tokens": 1900, "ignore_eos": True}, "cmpl-{}-0"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 1900, "ignore_eos": True},
            "chatcmpl-{}",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": numbered(71, 12), "sampling_params": {"max_tokens": 1900, "ignore_eos": True}},
            "generate-tokens-{}",
        ),
    ],
)
def test_abort_by_the_id_of_each_endpoint(engine: Engine, path: str, body: dict[str, Any], name: str) -> None:
    own = f"abort-{time.monotonic_ns()}"
    fields = {"model": engine.model, "stream": True, **body}
    wait_until(lambda: metric(engine, "vllm:num_requests_running") == 0)
    with open_request(engine.url, "POST", path, fields, headers={"X-Request-Id": own}) as stream:
        wait_until(lambda: metric(engine, "vllm:num_requests_running") == 1)
        for wanted in ("nobody", own, name.format(own)):
            call = {"request_ids": [wanted]}
            answer = exchange(engine.url, "POST", "/inference/v1/abort_requests", call)
            assert (answer.status, answer.body) == (200, b"")
        response = read_response(stream)
    assert response.deltas()[-1]["choices"][0]["finish_reason"] == "abort"
    assert response.events()[-1] == (None, "[DONE]")


def test_generate_holds_text_back_but_no_ids(engine: Engine) -> None:
    options = {"output_mode": "text", "stream": True}
    sampling = {"max_tokens": 12, "ignore_eos": True, "stop": ["\x00" * 30]}
    deltas = generate(engine, numbered(72, 15), sampling, **options).deltas()
    assert sum(len(delta["choices"][0]["token_ids"]) for delta in deltas) == 12
    seen = sum(len(delta["choices"][0]["text"]) for delta in deltas[:-1])
    assert seen <= max(0, sum(len(delta["choices"][0]["text"]) for delta in deltas) - 29)


def test_concurrent_constraints_do_not_meet(engine: Engine) -> None:
    results: dict[int, str] = {}

    def ask(place: int) -> None:
        options = {"max_tokens": 30, "ignore_eos": False, "structured_outputs": {"choice": [f"answer {place}"]}}
        results[place] = completion(engine, prompt_of(place), **options).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {place: f"answer {place}" for place in range(4)}
