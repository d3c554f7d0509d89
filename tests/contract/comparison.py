"""How an answer is compared with a recorded one, and what may differ.

What may differ by nature is replaced by its kind: ids, times, texts, token ids and their log probabilities, the
fingerprint, counts of tokens of a text (each engine under test has a tokenizer of its own), lists with an entry a
token, and how many events a stream has (an engine merges tokens when it is late). All else has to be equal: status,
header names, order and values, keys, types, flags, reasons, the order of events, error bodies word for word.
"""

import json
import re
from typing import Any

from .client import Response

_FREE_STRINGS = frozenset(
    {
        *("id", "text", "content", "system_fingerprint", "root", "prompt", "delta", "item_id", "request_id"),
        *("token_strs", "token", "decoded_token", "arguments", "partial_json", "endpoint", "replay_endpoint"),
        *("prev_tokens", "structural_tag"),
    }
)
_FREE_NUMBERS = frozenset(
    {
        *("created", "created_at", "prompt_tokens", "total_tokens", "input_tokens", "original_input_tokens", "count"),
        *("cached_tokens", "logprob", "rank", "token_id", "token_logprobs", "text_offset"),
    }
)
_PER_TOKEN = frozenset({"content", "prompt_logprobs", "tokens", "token_logprobs", "text_offset", "top_logprobs"})
"""Lists with an entry a token: runs of entries of one shape count once."""
_PREFIXES = re.compile(r"(chatcmpl-tool-|generate-tokens-|cmpl-|chatcmpl-|modelperm-|resp_|msg_|toolu_)")
_VOCABULARY = re.compile(r"(vocabulary size(?: is)?:? )\d+", re.IGNORECASE)

LOOSE: dict[str, tuple[frozenset[str], str]] = {}
"""Cases in which fields depend on what the model writes: those fields, and why."""


def _loosen(why: str, fields: str, *cases: str) -> None:
    for case in cases:
        LOOSE[case] = (frozenset(fields.split()), why)


_loosen(
    "whether a stop string or the end comes depends on the text",
    "finish_reason stop_reason completion_tokens end",
    *("completions_no_max_tokens", "chat_no_max_tokens", "completions_stop_token_ids", "chat_stop_token_ids"),
    *("generate_no_max_tokens", "generate_stop_token_ids", "generate_max_tokens_too_many"),
)
_loosen(
    "the tiny model writes white space until the limit where the schema allows it",
    "finish_reason stop_reason completion_tokens end",
    *("chat_json_object", "chat_json_schema", "chat_json_schema_stream", "completions_json_schema"),
    *("completions_json_schema_stream", "generate_json_schema", "chat_structured_json", "completions_structured_json"),
)
_loosen(
    "tokens of a text, and which of the tiny model's two end tokens ended it",
    "stop_reason completion_tokens",
    *("chat_structured_regex", "completions_structured_regex", "chat_structured_choice"),
    *("completions_structured_choice", "generate_structured_choice"),
)
_loosen(
    "tokens of a text",
    "completion_tokens output_tokens end",
    *("chat_tools_named", "chat_tools_named_stream", "chat_tools_required", "chat_tools_named_logprobs"),
    *("messages_tools_any_stream", "messages_tools_named_stream", "messages_stop", "generate_stop_string"),
    *("chat_include_stop", "completions_include_stop"),
)
_loosen(
    "the rest of the context is as long as the prompt leaves it",
    "max_tokens",
    *("chat_render_plain", "chat_render_n2", "chat_render_schema", "chat_render_x_request_id"),
)
_loosen("a sampled token may be none of the best", "<tokens>", "completions_n2_logprobs_stream")


def header_shape(headers: list[Any]) -> list[tuple[str, str]]:
    """Names in order; values but for those that change by nature."""
    shown = []
    for name, value in headers:
        shown.append((name.lower(), "*" if name.lower() in ("date", "content-length") else value))
    return shown


def shape(value: Any, key: str = "") -> Any:
    """``value`` with everything that may differ replaced by its kind."""
    if isinstance(value, dict):
        if key in ("top_logprobs", "prompt_logprobs") and "bytes" not in value and "token_id" not in value:
            # a mapping of tokens to what is known of them
            return {"<tokens>": len(value), "each": _collapsed([shape(item, "logprob") for item in value.values()])}
        return {name: shape(item, name) for name, item in value.items()}
    if isinstance(value, list):
        if key == "bytes" or (value and all(isinstance(item, int) for item in value) and key != "text_offset"):
            return ["ids"]
        shapes = [shape(item, key) for item in value]
        return _collapsed(shapes) if key in _PER_TOKEN else shapes
    if isinstance(value, str) and (key in _FREE_STRINGS or key == "tokens"):
        prefix = _PREFIXES.match(value)
        return f"<{prefix.group(1)}string>" if prefix and key != "content" else "<string>"
    if isinstance(value, int | float) and not isinstance(value, bool) and key in _FREE_NUMBERS:
        return "<number>"
    return value


def _collapsed(items: list[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if not found or found[-1] != item:
            found.append(item)
    return found


def event_shapes(events: list[tuple[str | None, str]]) -> dict[str, list[Any]]:
    """Event shapes in order, one list a choice; runs of equal ones collapsed, as their number depends on timing."""
    shapes: dict[str, list[Any]] = {}
    for position, (name, data) in enumerate(events):
        item: Any = (name, data)
        choice = "closing"
        if data != "[DONE]":
            event = json.loads(data)
            choices = event.get("choices")
            choice = str(choices[0]["index"]) if choices else "other"
            item = (name, stream_shape(event))
        else:
            assert position == len(events) - 1
        found = shapes.setdefault(choice, [])
        if not found or found[-1] != item:
            found.append(item)
    return shapes


def stream_shape(event: dict[str, Any]) -> Any:
    """The shape of one event."""
    found = shape(event)
    counts = found.get("usage")
    if isinstance(counts, dict) and found.get("choices"):
        counts["completion_tokens"] = "<number>"
    if "sequence_number" in found:
        found["sequence_number"] = "<number>"
    for choice in found.get("choices") or ():
        if choice.get("delta") == {}:
            choice["delta"] = {"content": "<string>"}  # a token that completes no character, or adds none
    return found


def recorded_events(chunks: list[str]) -> list[tuple[str | None, str]]:
    """The events of recorded chunks."""
    body = "".join(chunks).encode()
    return Response(status=200, reason="", headers=[], body=body, chunks=None, end="").events()


def loosen(case: str, found: Any) -> Any:
    """``found`` without the values that depend on what the model wrote in this case."""
    fields, _ = LOOSE.get(case, (frozenset(), ""))
    return _without(found, fields) if fields else found


def _without(value: Any, fields: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {name: "*" if name in fields else _without(item, fields) for name, item in value.items()}
    return [_without(item, fields) for item in value] if isinstance(value, list | tuple) else value


def difference(case: str, recorded: dict[str, Any], response: Response) -> str | None:
    """What differs, or None."""
    expected = recorded["response"]
    if (response.status, response.reason) != (expected["status"], expected["reason"]):
        return f"status {response.status} {response.reason}: {response.body[:300]!r}"
    if header_shape(response.headers) != header_shape(expected["headers"]):
        return f"headers {header_shape(response.headers)} instead of {header_shape(expected['headers'])}"
    if response.end != expected["end"]:
        return f"end {response.end}"
    if "chunks" in expected:
        if any(chunk.count(b"\n\n") != 1 or not chunk.endswith(b"\n\n") for chunk in response.chunks or []):
            return "a chunk is not exactly one event"
        want, got = event_shapes(recorded_events(expected["chunks"])), event_shapes(response.events())
    elif "json" in expected:
        if expected["status"] >= 400:
            want, got = _error_shape(expected["json"]), _error_shape(response.json())
        else:
            want, got = shape(expected["json"]), shape(response.json())
    else:
        want, got = expected["text"], response.body.decode()
    want, got = loosen(case, want), loosen(case, got)
    return None if want == got else f"expected {json.dumps(want)}\n     got {json.dumps(got)}"


def _error_shape(body: Any) -> Any:
    """An error as it is, but for the size of the vocabulary."""
    return json.loads(_VOCABULARY.sub(r"\1*", json.dumps(body)))
