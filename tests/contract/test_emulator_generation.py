"""Generation that only the emulator has: chains by choice, tools on demand, KV blocks handed over."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from emulator.tokens import ChainChecker, encode

from .client import exchange
from .conftest import Emulator

PROMPT = "once upon a time"


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """``start(*flags)`` starts an emulator; all are killed after the test."""
    running: list[Emulator] = []

    def launch(*flags: str) -> Emulator:
        running.append(Emulator(tmp_path, *flags))
        return running[-1]

    yield launch
    for emulator in running:
        emulator.kill()


def test_each_choice_follows_a_chain_of_its_own(start: Any) -> None:
    emulator = start()
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "n": 3, "ignore_eos": True}
    answer = exchange(emulator.url, "POST", "/v1/completions", request).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    for index, text in enumerate(texts):
        checker = ChainChecker(encode(PROMPT), index)
        checker.feed(text)
        checker.finish(8)


def test_a_demanded_tool_is_called_with_arguments_that_fit(start: Any) -> None:
    emulator = start()
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    user = [{"role": "user", "content": "what now"}]
    tools = [{"type": "function", "function": {"name": "other"}}, {"type": "function", "function": {"name": "weather"}}]
    tools[1]["function"]["parameters"] = parameters  # type: ignore[index]
    choice = {"type": "function", "function": {"name": "weather"}}
    fields = {"model": "tiny", "messages": user, "max_tokens": 200}
    chat = {**fields, "tools": tools, "tool_choice": choice}
    answer = exchange(emulator.url, "POST", "/v1/chat/completions", chat).json()["choices"][0]
    call = answer["message"]["tool_calls"][0]["function"]
    assert (answer["finish_reason"], answer["message"]["content"], call["name"]) == ("stop", "", "weather")
    assert isinstance(json.loads(call["arguments"])["city"], str)
    deltas = exchange(emulator.url, "POST", "/v1/chat/completions", {**chat, "stream": True}).deltas()
    calls = [call for delta in deltas for call in delta["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "weather"
    assert "".join(one["function"].get("arguments", "") for one in calls) == call["arguments"]
    anthropic = {**fields, "tools": [{"name": "weather", "input_schema": parameters}], "tool_choice": {"type": "any"}}
    message = exchange(emulator.url, "POST", "/v1/messages", anthropic).json()
    block = message["content"][0]
    assert (message["stop_reason"], block["type"], block["name"]) == ("tool_use", "tool_use", "weather")
    assert isinstance(block["input"]["city"], str)
    rendered = exchange(emulator.url, "POST", "/v1/chat/completions/render", chat)
    assert rendered.status == 403
    refusing = start("--tool-call-parser", "", "--enable-scale-out")
    refusal = exchange(refusing.url, "POST", "/v1/chat/completions", chat)
    assert (refusal.status, "--tool-call-parser" in refusal.json()["error"]["message"]) == (400, True)
    plain = {"model": "tiny", "stream": True, "generate_chunk": {"choices": [{"index": 0, "token_ids": [97]}]}}
    chunk = exchange(refusing.url, "POST", "/v1/chat/completions/derender", plain).json()
    assert chunk["chunk"]["choices"][0]["delta"] == {"role": "assistant", "content": "a", "reasoning": None}
    assert chunk["stream_state"]["prev_tokens"] == ["a"]


def test_blocks_are_handed_over_as_by_the_nixl_connector(start: Any) -> None:
    emulator = start("--engines", "2", "--enable-kv-transfer")
    source, destination = emulator.urls
    ids = [70 + index % 97 for index in range(300)]

    def asked(url: str, params: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
        request = {"model": "tiny", "prompt": ids, "max_tokens": 1, "kv_transfer_params": params, **fields}
        return dict(exchange(url, "POST", "/v1/completions", request).json())

    def cached(answer: dict[str, Any]) -> int:
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert asked(source, None)["kv_transfer_params"] is None
    offered = asked(source, {"do_remote_decode": True})["kv_transfer_params"]
    assert list(offered) == [
        *("do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id", "remote_request_id"),
        *("remote_host", "remote_port", "tp_size", "dcp_size", "pp_size", "remote_num_tokens"),
        *("remote_blocks_expiry_time", "transfer_mode", "remote_prefill_cached_tokens"),
    ]
    assert (offered["remote_num_tokens"], offered["remote_prefill_cached_tokens"]) == (300, 256)
    assert len(offered["remote_block_ids"][0]) == 3
    assert cached(asked(destination, offered)) == 256, "whole blocks, though it never saw the prompt"
    assert cached(asked(destination, None)) == 256, "and they stay in its prefix cache"
    assert asked(destination, {"do_remote_decode": True}, stop_token_ids=[0], max_tokens=2)["kv_transfer_params"]
    text = exchange(destination, "GET", "/metrics").body.decode()
    assert re.search(r"vllm:prefix_cache_hits_total\{[^}]*\} 512\.0", text), "only what it found itself is a hit"
