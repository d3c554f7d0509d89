"""``*/derender``: generated ids back to what the OpenAI endpoints answer, whole or chunk by chunk.

The caller carries the state of a stream. Where the server has a tool parser, chats take vLLM's other path: the state
then holds all ids so far, which are decoded anew each time.
"""

import secrets
import time
from typing import Any

from emulator.server.chat import chat_answer, chat_choice, message
from emulator.server.completions import completion_answer, completion_choice
from emulator.server.derender_checks import NO_STATE, check_bounds, check_prompts
from emulator.server.errors import ApiError
from emulator.server.generation import new_id, usage_numbers
from emulator.server.hermes import HermesStream
from emulator.server.hermes import parse as parse_calls
from emulator.server.logprobs import chat_item, resolved, returned_shape
from emulator.server.settings import EngineSettings
from emulator.server.validation import Body
from emulator.tokens import VOCABULARY_SIZE, is_special, token_bytes

_SEED_IDS = 7
_SEED_OFFSET = 5
_CONTEXT_IDS = 4
_NO_REQUEST = (
    "chat_request is required when a tool or reasoning parser is configured because plain detokenization would leak "
    "raw parser markup into content."
)
_NO_PROMPT = (
    "prompt_token_ids is required when a tool or reasoning parser is configured. Without it parse_delta cannot tell "
    "whether the prompt left reasoning open (e.g. a chat template that pre-opens <think>) and would misclassify "
    "reasoning content as plain content."
)


class Window:
    """Incremental decoding of ids: what is decided is given out, an incomplete character waits.

    The state is that of Hugging Face's text generation server, which vLLM uses too: the pieces from the last border
    on, the place up to which they were given out, and the place up to which they were read. ``special``: the ids of
    the chat template are text.
    """

    def __init__(self, state: dict[str, Any], *, special: bool = False) -> None:
        self._pieces = [piece.encode("latin-1", "replace") for piece in state["prev_tokens"]]
        self._special = special
        self._prefix = state["prefix_offset"]
        self._read = state["read_offset"]

    @classmethod
    def after(cls, prompt_ids: list[int] | None, *, special: bool = False) -> "Window":
        """The window at the start of an output after this prompt."""
        window = cls(NO_STATE, special=special)
        seed = (prompt_ids or [])[-_SEED_IDS:]
        window._pieces = [_piece(token) for token in seed if special or not is_special(token)]
        window._read = len(window._pieces)
        window._prefix = max(window._read - _SEED_OFFSET, 0)
        return window

    def take(self, ids: list[int]) -> str:
        """The text that ``ids`` add."""
        text = ""
        for token in ids:
            if self._special or not is_special(token):
                self._pieces.append(_piece(token))
            before = _decoded(self._pieces[self._prefix : self._read])
            now = _decoded(self._pieces[self._prefix :])
            if len(now) > len(before) and not now.endswith("\ufffd"):
                text += now[len(before) :]
                self._prefix, self._read = self._read, len(self._pieces)
            del self._pieces[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        return text

    def state(self) -> dict[str, Any]:
        """The part of a stream's state that is this window's."""
        pieces = [piece.decode("latin-1") for piece in self._pieces]
        return {"prev_tokens": pieces, "prefix_offset": self._prefix, "read_offset": self._read}


def chat(body: Body, settings: EngineSettings) -> dict[str, Any]:
    """The answer of ``/v1/chat/completions/derender``. Raises ApiError."""
    return _chat_chunk(body, settings) if body.get("stream") is True else _whole_chat(body, settings)


def completions(body: Body, settings: EngineSettings) -> dict[str, Any]:
    """The answer of ``/v1/completions/derender``. Raises ApiError."""
    return _completion_chunk(body, settings) if body.get("stream") is True else _whole_completion(body, settings)


def _whole_chat(body: Body, settings: EngineSettings) -> dict[str, Any]:
    given, request = body["generate_response"], body.get("chat_request")
    check_bounds([given], settings)
    check_prompts([body.get("prompt_token_ids")], settings)
    parsed = bool(settings.tool_call_parser)
    if parsed and request is None:
        raise ApiError(_NO_REQUEST)
    prompt = _first(body.get("prompt_token_ids"), given.get("prompt_token_ids"))
    shows_ids = bool(request and request.get("return_token_ids"))
    choices = []
    for choice in given["choices"]:
        ids = choice.get("token_ids")
        if not ids:
            raise ApiError(f"choice {choice['index']} has empty or null token_ids")
        text = Window.after(prompt, special=parsed).take(ids)
        content, calls = parse_calls(text) if parsed else (text, [])
        shown = [
            {"id": secrets.token_hex(8), "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in calls
        ]
        logprobs = _chat_logprobs(choice, [])
        ended = (choice.get("finish_reason", "stop"), choice.get("stop_reason"))
        choices.append(
            chat_choice(choice["index"], message(content, shown), logprobs, *ended, ids if shows_ids else None)
        )
    return chat_answer(
        choices,
        id=given.get("request_id") or new_id(),
        created=int(time.time()),
        model=body.get("model") or settings.model,
        usage=_usage(body.get("prompt_tokens") or 0, _count(given)),
        prompt_logprobs=given.get("prompt_logprobs"),
        kv_transfer_params=given.get("kv_transfer_params"),
        metrics=given.get("metrics"),
    )


def _whole_completion(body: Body, settings: EngineSettings) -> dict[str, Any]:
    given = body["generate_responses"]
    if not given:
        raise ApiError("generate_responses must not be empty")
    check_bounds(given, settings)
    prompts = body.get("prompt_token_ids") or [None] * len(given)
    check_prompts(prompts, settings)
    choices: list[dict[str, Any]] = []
    for response, prompt in zip(given, prompts, strict=True):
        for choice in response["choices"]:
            ids = choice.get("token_ids")
            if not ids:
                name = response.get("request_id")
                raise ApiError(f"choice {choice['index']} in response {name} has empty or null token_ids")
            text = Window.after(_first(prompt, response.get("prompt_token_ids"))).take(ids)
            logprobs, _ = _completion_logprobs(choice, [], 0)
            ended = (choice.get("finish_reason", "stop"), choice.get("stop_reason"))
            choices.append(completion_choice(len(choices), text, logprobs, ended))
    kept = [response.get("kv_transfer_params") for response in given]
    return completion_answer(
        choices,
        id=given[0].get("request_id") or new_id(),
        created=int(time.time()),
        model=body.get("model") or settings.model,
        usage=_usage(sum(body.get("prompt_tokens") or []), sum(map(_count, given))),
        kv_transfer_params=kept[0] if all(one == kept[0] for one in kept) else None,
        metrics=given[0].get("metrics") if len(given) == 1 else None,
    )


def _chat_chunk(body: Body, settings: EngineSettings) -> dict[str, Any]:
    chunk, request, prompt = body["generate_chunk"], body.get("chat_request"), body.get("prompt_token_ids")
    parsed = bool(settings.tool_call_parser)
    state = {**NO_STATE, **(body.get("stream_state") or {})}
    ids = [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
    _check_chat_chunk(body, state, ids, settings)
    choices = []
    if chunk["choices"]:
        choice = chunk["choices"][0]
        if parsed:
            delta, state = _parsed_delta(state, prompt or [], ids)
        else:
            delta, state = _plain_delta(state, _window(body, chunk), ids)
        role = None if state["role_sent"] else "assistant"
        state["role_sent"] = True
        reason = choice.get("finish_reason")
        if reason is not None and state["tools_streamed"] and not isinstance((request or {}).get("tool_choice"), dict):
            reason = "tool_calls"
        choices.append(
            {
                "index": choice["index"],
                "delta": {"role": role, **delta},
                "logprobs": None if parsed else _chat_logprobs(choice, state["logprob_context_token_ids"]),
                "finish_reason": reason,
                "stop_reason": choice.get("stop_reason"),
                "token_ids": choice.get("token_ids") if request and request.get("return_token_ids") else None,
            }
        )
        if not parsed:
            state["logprob_context_token_ids"] = [*state["logprob_context_token_ids"], *ids][-_CONTEXT_IDS:]
    shown = {
        "id": chunk.get("request_id") or new_id(),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": body.get("model") or settings.model,
        "choices": choices,
        "usage": _chunk_usage(body, chunk),
        "system_fingerprint": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "metrics": chunk.get("metrics"),
    }
    return {"chunk": shown, "stream_state": state}


def _check_chat_chunk(body: Body, state: dict[str, Any], ids: list[int], settings: EngineSettings) -> None:
    prompt, count = body.get("prompt_token_ids"), len(body["generate_chunk"]["choices"])
    if settings.tool_call_parser and body.get("chat_request") is None:
        raise ApiError(_NO_REQUEST)
    if settings.tool_call_parser and prompt is None:
        raise ApiError(_NO_PROMPT)
    if count > 1:
        raise ApiError(f"derender_chat_stream expects at most one choice per chunk (got {count}).")
    lengths = [len(prompt or []), len(state["output_token_ids"]), len(ids)]
    if sum(lengths) > settings.max_model_len:
        raise ApiError(
            f"prompt_token_ids length ({lengths[0]}) plus output_token_ids length ({lengths[1]}) plus delta "
            f"({lengths[2]}) exceeds max_model_len ({settings.max_model_len})."
        )


def _plain_delta(state: dict[str, Any], window: Window, ids: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    text = window.take(ids)
    return {"content": text or None, "reasoning": None}, {**state, **window.state()}


def _parsed_delta(state: dict[str, Any], prompt: list[int], ids: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The delta where a tool parser is set: all that was generated goes through it anew, in the chunks it came in."""
    window, parser = Window.after(prompt, special=True), HermesStream()
    start = 0
    for size in state["output_chunk_lens"]:
        parser.take(window.take(state["output_token_ids"][start : start + size]))
        start += size
    content, calls = parser.take(window.take(ids))
    known = list(state["last_tool_call_ids"])
    for call in calls:
        if "id" in call:
            if call["index"] < len(known):
                call["id"] = known[call["index"]]
            else:
                known.append(call["id"])
    delta: dict[str, Any] = {"content": content, "reasoning": None}
    if calls:
        delta["tool_calls"] = calls
    state = {
        **state,
        "output_token_ids": [*state["output_token_ids"], *ids],
        "output_chunk_lens": [*state["output_chunk_lens"], *([len(ids)] if ids else [])],
        "tools_streamed": state["tools_streamed"] or bool(calls),
        "last_tool_call_ids": known,
    }
    return delta, state


def _completion_chunk(body: Body, settings: EngineSettings) -> dict[str, Any]:
    chunk = body["generate_chunk"]
    check_prompts([body.get("prompt_token_ids")], settings)
    if len(chunk["choices"]) > 1:
        raise ApiError("derender_completion_stream expects at most one choice per chunk")
    state = {**NO_STATE, **(body.get("stream_state") or {})}
    choices = []
    for choice in chunk["choices"]:
        ids = choice.get("token_ids") or []
        window = _window(body, chunk)
        text = window.take(ids)
        logprobs, _ = _completion_logprobs(choice, state["logprob_context_token_ids"], state["logprob_text_offset"])
        state = {
            **state,
            **window.state(),
            "logprob_context_token_ids": [*state["logprob_context_token_ids"], *ids][-_CONTEXT_IDS:],
            "logprob_text_offset": state["logprob_text_offset"] + len(text),
        }
        choices.append(
            {
                "index": choice["index"],
                "text": text,
                "logprobs": logprobs,
                "finish_reason": choice.get("finish_reason"),
                "stop_reason": choice.get("stop_reason"),
                "prompt_token_ids": None,
                "token_ids": None,
            }
        )
    shown = {
        "id": chunk.get("request_id") or new_id(),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.get("model") or settings.model,
        "choices": choices,
        "usage": _chunk_usage(body, chunk),
        "system_fingerprint": None,
        "metrics": chunk.get("metrics"),
    }
    return {"chunk": shown, "stream_state": state}


def _window(body: Body, chunk: dict[str, Any]) -> Window:
    """Where the stream stands: the state that the caller carries, else the end of the prompt."""
    state = body.get("stream_state")
    if state is not None:
        return Window({**NO_STATE, **state})
    return Window.after(_first(body.get("prompt_token_ids"), chunk.get("prompt_token_ids")))


def _chat_logprobs(choice: dict[str, Any], before: list[int]) -> dict[str, Any] | None:
    found = choice.get("logprobs")
    if found is None:
        return None
    content = found.get("content")
    return {"content": None if content is None else [chat_item(entry) for entry in resolved(content, before)]}


def _completion_logprobs(choice: dict[str, Any], before: list[int], offset: int) -> tuple[dict[str, Any] | None, int]:
    found = choice.get("logprobs")
    if found is None:
        return None, offset
    return returned_shape(resolved(found.get("content") or [], before), offset)


def _chunk_usage(body: Body, chunk: dict[str, Any]) -> dict[str, Any] | None:
    usage = chunk.get("usage")
    if usage is None:
        return None
    prompt = _first(body.get("prompt_tokens"), _count_of(usage, "prompt_tokens"))
    return _usage(prompt, _count_of(usage, "completion_tokens"))


def _count_of(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


def _usage(prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    usage: dict[str, Any] = usage_numbers(prompt_tokens, output_tokens)
    return {**usage, "prompt_tokens_details": None, "completion_tokens_details": None}


def _count(response: dict[str, Any]) -> int:
    return sum(len(choice.get("token_ids") or []) for choice in response["choices"])


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _piece(token: int) -> bytes:
    return token_bytes(token) if 0 <= token < VOCABULARY_SIZE else b""


def _decoded(pieces: list[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace")
