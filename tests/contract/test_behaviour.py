"""What a router relies on, checked by asking rather than by comparing with a recording. Runs on real engines too."""

import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from .client import Response, exchange, open_request, read_response
from .conftest import Engine


def completion(engine: Engine, prompt: Any, headers: dict[str, str] | None = None, **fields: Any) -> Response:
    body = {"model": engine.model, "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}
    return exchange(engine.url, "POST", "/v1/completions", body, headers=headers)


def metric(engine: Engine, name: str, **labels: str) -> float:
    text = exchange(engine.url, "GET", "/metrics").body.decode()
    total = 0.0
    for line in text.splitlines():
        match = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def numbered(first: int, count: int) -> list[int]:
    return [70 + (first * 31 + index * 7 + index * index % 13) % 180 for index in range(count)]


def test_stream_and_whole_answer_agree(engine: Engine) -> None:
    prompt = numbered(1, 40)
    whole = completion(engine, prompt, max_tokens=12, return_token_ids=True).json()
    stream = completion(
        engine, prompt, max_tokens=12, return_token_ids=True, stream=True, stream_options={"include_usage": True}
    )
    deltas = stream.deltas()
    ids = [token for delta in deltas for choice in delta["choices"] for token in choice["token_ids"]]
    text = "".join(choice["text"] for delta in deltas for choice in delta["choices"])
    assert ids == whole["choices"][0]["token_ids"]
    assert len(ids) == 12
    assert text == whole["choices"][0]["text"]
    assert deltas[0]["choices"][0]["prompt_token_ids"] == prompt
    assert {delta["id"] for delta in deltas} == {deltas[0]["id"]}
    assert deltas[-1]["usage"]["completion_tokens"] == 12
    assert stream.events()[-1] == (None, "[DONE]")


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_resumed_from_prompt_and_outputs_gives_the_same_tokens(engine: Engine, cut: int) -> None:
    prompt = numbered(2, 33)
    whole = completion(engine, prompt, max_tokens=12, return_token_ids=True).json()["choices"][0]["token_ids"]
    rest = completion(engine, prompt + whole[:cut], max_tokens=12 - cut, return_token_ids=True).json()
    assert rest["choices"][0]["token_ids"] == whole[cut:]


def test_chat_stream_carries_prompt_ids_first(engine: Engine) -> None:
    body = {
        "model": engine.model,
        "messages": [{"role": "user", "content": "a question"}],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    deltas = exchange(engine.url, "POST", "/v1/chat/completions", body).deltas()
    ids = exchange(engine.url, "POST", "/tokenize", {"model": engine.model, "messages": body["messages"]}).json()
    assert deltas[0]["prompt_token_ids"] == ids["tokens"]
    assert deltas[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    produced = [token for delta in deltas[1:] for token in delta["choices"][0]["token_ids"] or []]
    assert len(produced) == 6
    resumed = completion(engine, ids["tokens"] + produced[:2], max_tokens=4, return_token_ids=True).json()
    assert resumed["choices"][0]["token_ids"] == produced[2:]


def test_stop_string_is_cut_and_named(engine: Engine) -> None:
    prompt = numbered(3, 20)
    text = completion(engine, prompt, max_tokens=12).json()["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    whole = completion(engine, prompt, max_tokens=12, stop=[stop, "\x00never"]).json()["choices"][0]
    assert whole["text"] == text[: text.index(stop)]
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", stop)
    stream = completion(engine, prompt, max_tokens=12, stop=stop, stream=True).deltas()
    assert "".join(delta["choices"][0]["text"] for delta in stream) == text[: text.index(stop)]
    assert (stream[-1]["choices"][0]["finish_reason"], stream[-1]["choices"][0]["stop_reason"]) == ("stop", stop)
    kept = completion(engine, prompt, max_tokens=12, stop=stop, include_stop_str_in_output=True).json()
    assert kept["choices"][0]["text"] == text[: text.index(stop) + len(stop)]


def test_text_that_may_become_a_stop_is_held_back(engine: Engine) -> None:
    prompt = numbered(4, 20)
    stop = "\x00" * 40
    deltas = completion(engine, prompt, max_tokens=12, stop=stop, stream=True, return_token_ids=True).deltas()
    seen, ids = 0, 0
    for delta in deltas[:-1]:
        seen += len(delta["choices"][0]["text"])
        ids += len(delta["choices"][0]["token_ids"])
    assert ids == 11
    assert seen <= max(0, sum(len(delta["choices"][0]["text"]) for delta in deltas) - 39)


def test_stop_token_ids(engine: Engine) -> None:
    prompt = numbered(5, 20)
    ids = completion(engine, prompt, max_tokens=8, return_token_ids=True).json()["choices"][0]["token_ids"]
    stop = ids[4]
    expected = ids[: ids.index(stop) + 1]
    ended = completion(engine, prompt, max_tokens=8, stop_token_ids=[stop], return_token_ids=True).json()["choices"][0]
    assert ended["token_ids"] == expected
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", stop)
    least = completion(engine, prompt, max_tokens=8, min_tokens=8, stop_token_ids=[stop], return_token_ids=True).json()
    assert len(least["choices"][0]["token_ids"]) == 8


def test_batch_and_n_are_merged_by_index(engine: Engine) -> None:
    prompts = [numbered(6, 9), numbered(7, 17)]
    batch = completion(engine, prompts, max_tokens=5, return_token_ids=True).json()
    single = [completion(engine, prompt, max_tokens=5, return_token_ids=True).json() for prompt in prompts]
    assert [choice["index"] for choice in batch["choices"]] == [0, 1]
    assert [choice["token_ids"] for choice in batch["choices"]] == [
        answer["choices"][0]["token_ids"] for answer in single
    ]
    assert batch["usage"]["prompt_tokens"] == 26
    assert batch["usage"]["completion_tokens"] == 10
    stream = completion(engine, prompts[0], max_tokens=5, n=3, temperature=1.0, stream=True, return_token_ids=True)
    per_index: dict[int, int] = {}
    for delta in stream.deltas():
        for choice in delta["choices"]:
            per_index[choice["index"]] = per_index.get(choice["index"], 0) + len(choice["token_ids"])
    assert per_index == {0: 5, 1: 5, 2: 5}


def test_prefix_cache_counts_whole_blocks_short_of_the_last_token(engine: Engine) -> None:
    block = engine.block_tokens
    rng = random.Random(time.time_ns())  # an engine under test may have seen an earlier run's prompts
    prompt = [rng.randrange(70, 250) for _ in range(3 * block)]
    queries, hits = metric(engine, "vllm:prefix_cache_queries_total"), metric(engine, "vllm:prefix_cache_hits_total")
    first = completion(engine, prompt, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    again = completion(engine, prompt, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    longer = completion(engine, [*prompt, 70], max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    salted = completion(engine, prompt, max_tokens=1, cache_salt="other").json()
    assert (first, again, longer) == (0, 2 * block, 3 * block)
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    wait_until(lambda: metric(engine, "vllm:prefix_cache_queries_total") - queries == 12 * block + 1)
    assert metric(engine, "vllm:prefix_cache_hits_total") - hits == 5 * block


def test_disconnect_frees_the_engine_and_is_no_success(engine: Engine) -> None:
    wait_until(lambda: metric(engine, "vllm:num_requests_running") == 0)
    before = metric(engine, "vllm:request_success_total")
    body = {"model": engine.model, "prompt": numbered(8, 300), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    stream = open_request(engine.url, "POST", "/v1/completions", body)
    whole = open_request(engine.url, "POST", "/v1/completions", {**body, "stream": False})
    read_response(stream, until=lambda received: b'"text"' in received)
    wait_until(lambda: metric(engine, "vllm:num_requests_running") >= 1)
    whole.close()
    wait_until(lambda: metric(engine, "vllm:num_requests_running") == 0)
    wait_until(lambda: metric(engine, "vllm:kv_cache_usage_perc") == 0)
    assert metric(engine, "vllm:request_success_total") == before


def test_metrics_count_tokens_and_ends(engine: Engine) -> None:
    names = {
        "vllm:prompt_tokens_total": 50.0,
        "vllm:generation_tokens_total": 7.0,
        "vllm:time_to_first_token_seconds_count": 1.0,
        "vllm:e2e_request_latency_seconds_count": 1.0,
        "vllm:request_prompt_tokens_sum": 50.0,
        "vllm:request_generation_tokens_sum": 7.0,
    }
    before = {name: metric(engine, name) for name in names}
    ended = metric(engine, "vllm:request_success_total", finished_reason="length")
    completion(engine, numbered(9, 50), max_tokens=7)
    for name, expected in names.items():
        wait_until(lambda name=name, expected=expected: metric(engine, name) - before[name] == expected)
    assert metric(engine, "vllm:request_success_total", finished_reason="length") == ended + 1


def test_metric_names_types_and_labels(engine: Engine) -> None:
    """Every vllm series that the control plane reads exists with vLLM's type and labels."""
    response = exchange(engine.url, "GET", "/metrics")
    assert response.header("content-type") == "text/plain; version=1.0.0; charset=utf-8"
    text = response.body.decode()
    label = f'{{engine="0",model_name="{engine.model}"}}'
    for kind, name in (
        ("gauge", "vllm:num_requests_running"),
        ("gauge", "vllm:num_requests_waiting"),
        ("gauge", "vllm:kv_cache_usage_perc"),
        ("counter", "vllm:prefix_cache_queries_total"),
        ("counter", "vllm:prefix_cache_hits_total"),
        ("counter", "vllm:num_preemptions_total"),
        ("counter", "vllm:prompt_tokens_total"),
        ("counter", "vllm:generation_tokens_total"),
    ):
        assert f"# TYPE {name} {kind}\n" in text
        assert f"\n{name}{label} " in text
    for reason in ("stop", "length", "abort", "error", "repetition"):
        series = f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="{engine.model}"}}'
        assert f"\n{series} " in text
    buckets = re.findall(r'vllm:time_to_first_token_seconds_bucket\{engine="0",le="([^"]+)"', text)
    assert buckets[0] == "0.001"
    assert buckets[-1] == "+Inf"
    assert f'block_size="{engine.block_tokens}"' in text


def test_keep_alive_and_pipelining_keep_their_order(engine: Engine) -> None:
    sock = open_request(engine.url, "GET", "/version", close=False)
    with sock:
        first = read_response(sock)
        assert first.json() == {"version": first.json()["version"]}
        assert first.header("connection") is None
        sock.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\nGET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while data := sock.recv(65536):
            received += data
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"404"]


def test_request_id_reaches_the_answer(engine: Engine) -> None:
    header = {"X-Request-Id": f"contract-{time.monotonic_ns()}"}
    assert completion(engine, [70], header, max_tokens=1).json()["id"] == "cmpl-" + header["X-Request-Id"]
    body = {"model": engine.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    chat = exchange(engine.url, "POST", "/v1/chat/completions", body, headers=header)
    assert chat.json()["id"] == "chatcmpl-" + header["X-Request-Id"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": "many"}, "int_parsing"),
        ({"temperature": [1]}, "float_type"),
        ({"stream": "perhaps"}, "bool_parsing"),
        ({"stop": [1]}, "valid string"),
    ],
)
def test_wrong_types_are_400(engine: Engine, fields: dict[str, Any], message: str) -> None:
    response = completion(engine, [70, 71], **{"max_tokens": 2, **fields})
    assert response.status == 400
    assert response.json()["error"]["code"] == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"{", b"[]", b"3", b"\xff\xfe", b'{"model": "tiny", "prompt": 5}', b"null"])
def test_garbage_bodies_are_400(engine: Engine, raw: bytes) -> None:
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
        "/inference/v1/generate",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
    ):
        response = exchange(engine.url, "POST", path, raw=raw)
        assert response.status == 400, (path, response.body)
        assert b"Traceback" not in response.body
