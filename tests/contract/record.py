"""Records what a real vLLM answers: ``python -m tests.contract.record URL FOLDER [CASE ...]``.

The engine has to be started as ``tests/vllm`` starts its own. A recording is overwritten by its case alone, so new
cases are added at the end and recorded by name.
"""

import json
import sys
from pathlib import Path
from typing import Any

from .client import exchange

TEXT = "def main(argv):\n    import os, sys\n"
USER = [{"role": "user", "content": "import os"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": CITY}}]
MESSAGE_TOOLS = [{"name": "get_weather", "description": "w", "input_schema": CITY}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
GREEDY = {"max_tokens": 4, "temperature": 0}
IDS = [70, 71, 72, 300]
SAMPLING: dict[str, Any] = {
    "max_tokens": 6,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "stop": ["zz", "q"],
    "stop_token_ids": [5],
    "min_tokens": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.5,
    "ignore_eos": True,
    "logit_bias": {"70": 1.5},
    "allowed_token_ids": [70, 71],
    "bad_words": ["aa"],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "cache_salt": "salt",
    "priority": 2,
    "return_token_ids": True,
}
TOKENS_CHUNK: dict[str, Any] = {
    "request_id": "generate-tokens-x",
    "usage": None,
    "output_mode": "tokens",
    "choices": [{"index": 0, "finish_reason": None, "stop_reason": None, "token_ids": [70, 71], "logprobs": None}],
}
LOGPROBS = {
    "content": [
        {"token_id": 70, "logprob": -1.5, "rank": 1, "top_logprobs": [{"token_id": 70, "logprob": -1.5, "rank": 1}]},
        {"token_id": 71, "logprob": -2.5, "rank": 2, "top_logprobs": [{"token_id": 72, "logprob": -0.5, "rank": 1}]},
    ]
}
USAGE = {"prompt_tokens": 4, "total_tokens": 6, "completion_tokens": 2}
STATE: dict[str, Any] = {
    "prev_tokens": ["a"],
    "prefix_offset": 0,
    "read_offset": 1,
    "role_sent": True,
    "logprob_text_offset": 5,
    "logprob_context_token_ids": [70],
    "output_token_ids": [70],
    "output_chunk_lens": [1],
}
WHOLE: dict[str, Any] = {
    "request_id": "generate-tokens-x",
    "choices": [{"index": 0, "finish_reason": "length", "stop_reason": None, "token_ids": [70, 71], "logprobs": None}],
}


def cases() -> dict[str, tuple[str, Any, dict[str, str]]]:
    """Path, body and headers of every case."""
    found: dict[str, tuple[str, Any, dict[str, str]]] = {}

    def add(name: str, path: str, headers: dict[str, str] | None = None, /, **body: Any) -> None:
        given = {"model": "tiny", **body}
        found[name] = (path, {key: value for key, value in given.items() if value is not ...}, headers or {})

    def completion(name: str, /, **body: Any) -> None:
        add(f"completions_{name}", "/v1/completions", **{"prompt": TEXT, **GREEDY, **body})

    def chat(name: str, /, **body: Any) -> None:
        add(f"chat_{name}", "/v1/chat/completions", **{"messages": USER, **GREEDY, **body})

    def generate(name: str, headers: dict[str, str] | None = None, /, *, sampling: Any = None, **body: Any) -> None:
        fields = {"token_ids": IDS, "sampling_params": {**GREEDY, **(sampling or {})}, **body}
        add(f"generate_{name}", "/inference/v1/generate", headers, **fields)

    _add_logprobs(completion, chat)
    _add_constraints(completion, chat)
    _add_tools(chat, add)
    _add_generate(generate)
    _add_render(add)
    _add_derender(add)
    return found


def _add_logprobs(completion: Any, chat: Any) -> None:
    completion("logprobs_0", logprobs=0)
    completion("logprobs_negative", logprobs=-2)
    completion("logprobs_string", logprobs="1")
    completion("prompt_logprobs_negative", prompt_logprobs=-2)
    completion("prompt_logprobs_too_many", prompt_logprobs=50)
    completion("prompt_logprobs_0_stream", prompt_logprobs=0, stream=True)
    completion("echo_logprobs_stream", echo=True, logprobs=1, stream=True, max_tokens=3)
    completion("echo_return_token_ids", echo=True, return_token_ids=True, max_tokens=2)
    completion("echo_return_token_ids_stream", echo=True, return_token_ids=True, max_tokens=2, stream=True)
    completion("echo_max0_stream", echo=True, max_tokens=0, stream=True)
    completion("batch_logprobs", prompt=[TEXT, "import"], logprobs=1, max_tokens=2)
    completion("n2_logprobs_stream", n=2, temperature=1.0, seed=1, logprobs=1, max_tokens=2, stream=True)
    completion("logprobs_stop_stream", logprobs=1, stop=["qqqqqq"], stream=True)
    completion("logprobs_return_token_ids_stream", logprobs=1, return_token_ids=True, stream=True)
    chat("logprobs_only", logprobs=True)
    chat("logprobs_as_ids", logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    chat("logprobs_n2", logprobs=True, n=2, temperature=1.0, seed=2)
    chat("top_logprobs_negative", logprobs=True, top_logprobs=-2)
    chat("top_logprobs_too_many", logprobs=True, top_logprobs=50)
    chat("prompt_logprobs", prompt_logprobs=1)
    chat("prompt_logprobs_stream", prompt_logprobs=1, stream=True)
    assistant = [*USER, {"role": "assistant", "content": "import "}]
    continued = {"messages": assistant, "add_generation_prompt": False, "continue_final_message": True}
    chat("echo_continued", echo=True, **continued)
    chat("echo_continued_stream", echo=True, stream=True, **continued)
    chat("logprobs_return_token_ids_stream", logprobs=True, return_token_ids=True, stream=True)


def _add_constraints(completion: Any, chat: Any) -> None:
    for make in (completion, chat):
        make("structured_choice", structured_outputs={"choice": ["import sys", "import os"]}, max_tokens=16)
        make("structured_choice_empty", structured_outputs={"choice": []})
        make("structured_two_kinds", structured_outputs={"regex": "a", "choice": ["a"]})
        make("structured_no_kind", structured_outputs={})
        make("structured_nul", structured_outputs={"regex": "a\0"})
        make("structured_json_empty", structured_outputs={"json": " "})
        make("structured_grammar_empty", structured_outputs={"grammar": ""})
        make("structured_json_object_false", structured_outputs={"json_object": False})
        make("structured_json", structured_outputs={"json": SCHEMA}, max_tokens=16)
        make("structured_wrong_type", structured_outputs=3)
        make("structured_choice_wrong_type", structured_outputs={"choice": "abc"})
        make("structured_choice_of_numbers", structured_outputs={"choice": [1, 2]})
        make("structured_regex_wrong_type", structured_outputs={"regex": 3})
        make("structured_json_broken", structured_outputs={"json": "{"})
        make("structured_json_wrong_kind", structured_outputs={"json": {"type": "zzz"}})
        make("structured_ignore_eos", structured_outputs={"choice": ["import sys"]}, ignore_eos=True, max_tokens=16)
        make("response_format_text", response_format={"type": "text"})
        make("response_format_unknown", response_format={"type": "zzz"})
        make("response_format_no_schema", response_format={"type": "json_schema"})
        make("response_format_wrong_type", response_format="json")
        make("logit_bias_key", logit_bias={"x": 1})
        make("logit_bias_value", logit_bias={"70": "x"})
        make("logit_bias_wrong_type", logit_bias=[70])
        make("logit_bias_forced", logit_bias={"70": 100})
        make("allowed_token_ids_empty", allowed_token_ids=[])
        make("allowed_token_ids_outside", allowed_token_ids=[70, 999999])
        make("allowed_token_ids_wrong_type", allowed_token_ids="x")
        make("bad_words_empty", bad_words=[""])
        make("bad_words_wrong_type", bad_words="x")
        make("kv_transfer_params_wrong_type", kv_transfer_params=3)
        make("temperature_3", temperature=3)
        make("top_k_negative", top_k=-5)
        make("min_p_2", min_p=2)
        make("repetition_penalty_0", repetition_penalty=0)
        make("presence_penalty_3", presence_penalty=3)
        make("n_0", n=0)
        make("stop_empty", stop=[""])
        make("include_stop", stop=["e"], include_stop_str_in_output=True, max_tokens=64)
        make("stop_stream", stop=["e"], stream=True, max_tokens=64)


def _add_tools(chat: Any, add: Any) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    chat("tools_none", tools=TOOLS, tool_choice="none")
    chat("tools_empty", tools=[])
    chat("tools_auto_stream", tools=TOOLS, stream=True)
    chat("tools_required_stream", tools=TOOLS, tool_choice="required", max_tokens=64, stream=True)
    chat(
        "tools_required_stream_ids",
        tools=TOOLS,
        tool_choice="required",
        max_tokens=64,
        stream=True,
        return_token_ids=True,
    )
    chat("tools_named_logprobs", tools=TOOLS, tool_choice=named, max_tokens=64, logprobs=True)
    chat("tools_named_cut", tools=TOOLS, tool_choice=named, max_tokens=3)
    chat("tools_named_cut_stream", tools=TOOLS, tool_choice=named, max_tokens=3, stream=True)
    chat("tools_unknown_choice", tools=TOOLS, tool_choice="zzz")
    chat("tools_unknown_name", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "nope"}})
    chat("tools_no_function", tools=TOOLS, tool_choice={"type": "function"})
    chat("tools_no_name", tools=TOOLS, tool_choice={"type": "function", "function": {}})
    chat("tools_empty_name", tools=TOOLS, tool_choice={"type": "function", "function": {"name": ""}})
    add("messages_tools_auto", "/v1/messages", messages=USER, max_tokens=4, tools=MESSAGE_TOOLS)
    for name, choice in (("any", {"type": "any"}), ("named", {"type": "tool", "name": "get_weather"})):
        common = {"messages": USER, "max_tokens": 64, "tools": MESSAGE_TOOLS, "tool_choice": choice, "temperature": 0}
        add(f"messages_tools_{name}_stream", "/v1/messages", **common, stream=True)
    add("messages_stop", "/v1/messages", messages=USER, max_tokens=64, stop_sequences=["e"], temperature=0)
    add("messages_system", "/v1/messages", messages=USER, max_tokens=4, system="s", temperature=0)


def _add_generate(generate: Any) -> None:
    generate("text", output_mode="text")
    generate("text_logprobs", output_mode="text", sampling={"logprobs": 2})
    generate("text_stop_stream", output_mode="text", stream=True, sampling={"stop": ["qqqqqq"]})
    generate("logprobs_0", sampling={"logprobs": 0})
    generate("logprobs_2_stream", sampling={"logprobs": 2}, stream=True)
    generate("prompt_logprobs", sampling={"prompt_logprobs": 1})
    generate("n2", sampling={"n": 2, "temperature": 1.0, "seed": 1})
    generate("n2_stream", sampling={"n": 2, "temperature": 1.0, "seed": 1}, stream=True)
    generate("n2_greedy", sampling={"n": 2})
    generate("return_token_ids", return_token_ids=True)
    generate("stream_continuous", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    generate("stream_options_without_stream", stream_options={"include_usage": True})
    generate("stream_return_token_ids", stream=True, return_token_ids=True)
    generate("no_max_tokens", sampling_params={"temperature": 0, "stop_token_ids": list(range(200, 1000))})
    generate("ignore_eos", sampling={"ignore_eos": True, "max_tokens": 12})
    generate("stop_token_ids", sampling={"stop_token_ids": list(range(200, 1000)), "max_tokens": 8})
    generate("bad_model", model="nope")
    generate("no_model", model=...)
    generate("negative_id", token_ids=[70, -1])
    generate("id_outside", token_ids=[70, 999999])
    generate("ids_wrong_type", token_ids="abc")
    generate("missing_ids", token_ids=...)
    generate("sampling_wrong_type", sampling_params=3)
    generate("temperature_negative", sampling={"temperature": -1})
    generate("temperature_string", sampling={"temperature": "hot"})
    generate("max_tokens_0", sampling={"max_tokens": 0})
    generate("max_tokens_too_many", sampling={"max_tokens": 5000, "stop_token_ids": list(range(200, 1000))})
    generate("exact_max_len", token_ids=[70] * 2048)
    generate("unknown_sampling_field", sampling={"zzz": 1})
    generate("output_mode_unknown", output_mode="zzz")
    generate("cache_salt_empty", cache_salt="")
    generate("cache_salt", cache_salt="salt")
    generate("priority_string", priority="high")
    generate("kv_transfer_params", kv_transfer_params={"do_remote_decode": True})
    generate("structured_choice", sampling={"structured_outputs": {"choice": ["import sys"]}, "max_tokens": 16})
    generate("structured_no_kind", sampling={"structured_outputs": {}})
    generate("structured_wrong_type", sampling={"structured_outputs": {"regex": 3}})
    generate("kv_transfer_params_wrong_type", kv_transfer_params=3)
    generate("stop_string", sampling={"stop": "e", "max_tokens": 64}, output_mode="text")
    generate("x_request_id", {"X-Request-Id": "abc-9"})
    generate("x_request_id_and_field", {"X-Request-Id": "abc-9"}, request_id="field")


def _add_render(add: Any) -> None:
    chat, completion = "/v1/chat/completions/render", "/v1/completions/render"
    add("chat_render_plain", chat, messages=USER)
    add("chat_render_sampling", chat, messages=USER, **SAMPLING)
    add("chat_render_stream", chat, messages=USER, stream=True, stream_options={"include_usage": True}, max_tokens=4)
    add("chat_render_tools", chat, messages=USER, tools=TOOLS, tool_choice="required", max_tokens=4)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    add("chat_render_logprobs", chat, messages=USER, logprobs=True, top_logprobs=2, max_tokens=4, temperature=0)
    add("chat_render_n2", chat, messages=USER, n=2, seed=4)
    add("chat_render_schema", chat, messages=USER, response_format=schema)
    add("chat_render_bad_model", chat, messages=USER, model="nope")
    add("chat_render_x_request_id", chat, {"X-Request-Id": "abc-9"}, messages=USER)
    add("chat_render_too_long", chat, messages=[{"role": "user", "content": "import os " * 2000}])
    add("completions_render_sampling", completion, prompt=TEXT, **SAMPLING)
    add("completions_render_batch", completion, prompt=[TEXT, "import"], max_tokens=4, temperature=0)
    add("completions_render_ids", completion, prompt=IDS, stream=True, logprobs=1, echo=True)
    add("completions_render_missing", completion)
    add("messages_render", "/v1/messages/render", messages=USER, max_tokens=4, system="s")
    add("messages_render_missing", "/v1/messages/render", max_tokens=4)
    add("responses_render", "/v1/responses/render", input="import os", max_output_tokens=4, temperature=0)


def _add_derender(add: Any) -> None:
    path = "/v1/chat/completions/derender"
    request = {"model": "tiny", "messages": USER}
    add("chat_derender_no_request", path, generate_response=WHOLE)
    add("chat_derender", path, generate_response=WHOLE, chat_request=request, prompt_tokens=4)
    more = {"chat_request": {**request, "return_token_ids": True}}
    whole_logprobs = {**WHOLE, "choices": [{**WHOLE["choices"][0], "logprobs": LOGPROBS}]}
    add("chat_derender_logprobs", path, generate_response=whole_logprobs, **more)
    add("chat_derender_no_ids", path, generate_response={**WHOLE, "choices": [{"index": 0}]}, chat_request=request)
    add("chat_derender_text_mode", path, generate_response={**WHOLE, "output_mode": "text"}, chat_request=request)
    add("chat_derender_missing", path)
    add("chat_derender_bad_model", path, generate_response=WHOLE, chat_request=request, model="nope")
    add(
        "chat_derender_too_long",
        path,
        generate_response={**WHOLE, "choices": [{"index": 0, "token_ids": [70] * 3000}]},
        chat_request=request,
    )
    first = {"stream": True, "generate_chunk": TOKENS_CHUNK, "chat_request": request, "prompt_token_ids": IDS}
    add("chat_derender_stream", path, **first)
    add("chat_derender_stream_state", path, **first, stream_state=STATE)
    add("chat_derender_stream_no_request", path, **{**first, "chat_request": None})
    add("chat_derender_stream_no_prompt", path, **{**first, "prompt_token_ids": None})
    end = {**TOKENS_CHUNK["choices"][0], "finish_reason": "length"}
    add("chat_derender_stream_end", path, **{**first, "generate_chunk": {**TOKENS_CHUNK, "choices": [end]}})
    last = {**end, "token_ids": []}
    add("chat_derender_stream_end_only", path, **{**first, "generate_chunk": {**TOKENS_CHUNK, "choices": [last]}})
    usage = {**TOKENS_CHUNK, "choices": [], "usage": USAGE}
    add("chat_derender_stream_usage", path, **{**first, "generate_chunk": usage}, stream_state=STATE)
    two = {**TOKENS_CHUNK, "choices": [TOKENS_CHUNK["choices"][0]] * 2}
    add("chat_derender_stream_two", path, **{**first, "generate_chunk": two})
    wrong = {**STATE, "output_chunk_lens": [3]}
    add("chat_derender_stream_wrong_state", path, **first, stream_state=wrong)
    add("chat_derender_stream_long_state", path, **first, stream_state={**STATE, "prev_tokens": ["a"] * 2000})
    add("chat_derender_stream_incomplete", path, **{**first, "generate_chunk": _chunk([172])})
    special = {**TOKENS_CHUNK["choices"][0], "token_ids": [70, 1], "finish_reason": "stop"}
    add("chat_derender_stream_special", path, **{**first, "generate_chunk": {**TOKENS_CHUNK, "choices": [special]}})
    path = "/v1/completions/derender"
    add("completions_derender", path, generate_responses=[WHOLE], prompt_tokens=[4])
    add("completions_derender_two", path, generate_responses=[WHOLE, WHOLE], prompt_token_ids=[IDS, None])
    add("completions_derender_logprobs", path, generate_responses=[whole_logprobs])
    add("completions_derender_none", path, generate_responses=[])
    add("completions_derender_mismatch", path, generate_responses=[WHOLE], prompt_tokens=[4, 5])
    add("completions_derender_missing", path)
    stream = {"stream": True, "generate_chunk": TOKENS_CHUNK}
    add("completions_derender_stream", path, **stream)
    plain = {**STATE, "output_token_ids": [], "output_chunk_lens": []}
    add("completions_derender_stream_state", path, **stream, stream_state=plain)
    add("completions_derender_stream_seeded", path, **stream, prompt_token_ids=IDS)
    logprobs = {**TOKENS_CHUNK, "choices": [{**TOKENS_CHUNK["choices"][0], "logprobs": LOGPROBS}]}
    add("completions_derender_stream_logprobs", path, **{**stream, "generate_chunk": logprobs}, stream_state=plain)
    add("completions_derender_stream_usage", path, **{**stream, "generate_chunk": usage}, prompt_tokens=9)
    add("completions_derender_stream_two", path, **{**stream, "generate_chunk": two})


def _chunk(ids: list[int]) -> dict[str, Any]:
    return {**TOKENS_CHUNK, "choices": [{**TOKENS_CHUNK["choices"][0], "token_ids": ids}]}


def record(url: str, path: str, body: Any, headers: dict[str, str]) -> dict[str, Any]:
    """Ask, and return the exchange as a recording."""
    response = exchange(url, "POST", path, body, headers=headers)
    shown: dict[str, Any] = {
        "status": response.status,
        "reason": response.reason,
        "headers": response.headers,
        "end": response.end,
    }
    if response.chunks is not None:
        shown["chunks"] = [chunk.decode() for chunk in response.chunks]
    elif (response.header("content-type") or "").startswith("application/json"):
        shown["json"] = response.json()
    else:
        shown["text"] = response.body.decode()
    return {"request": {"method": "POST", "path": path, "headers": headers, "body": body}, "response": shown}


def main() -> None:
    url, folder, *names = sys.argv[1:]
    for name, (path, body, headers) in cases().items():
        if names and name not in names:
            continue
        found = {"case": name, **record(url, path, body, headers)}
        text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        (Path(folder) / f"{name}.json").write_text(text)
        print(name, found["response"]["status"])


if __name__ == "__main__":
    main()
