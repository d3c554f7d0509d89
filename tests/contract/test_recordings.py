"""Each recorded exchange of a real vLLM 0.32.0, repeated: same status, headers, keys, types, errors, event order.

What may differ is normalised: ids, times, texts, token ids, the fingerprint, token counts of text prompts (another
tokenizer) and how many events a stream has (the engine merges tokens when it is late).
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .client import Response, exchange
from .conftest import Engine

RECORDINGS = Path(__file__).parent / "recordings"
CASES = sorted(path.stem for path in RECORDINGS.glob("*.json"))

DIFFERENT_ON_EMULATOR = {
    "chat_echo": "echo in a chat makes vLLM add prompt logprobs, which the emulator does not have",
}
"""Cases in which the emulator is known to differ, with the reason; each must really differ."""

_FREE_STRINGS = frozenset(
    {"id", "text", "content", "system_fingerprint", "root", "prompt", "delta", "item_id", "request_id", "token_strs"}
)
_FREE_NUMBERS = frozenset(
    {
        *("created", "created_at", "prompt_tokens", "total_tokens", "input_tokens", "original_input_tokens", "count"),
        *("cached_tokens", "logprob", "rank"),
    }
)
_CONTENT_REASONS = frozenset({"stop", "length", "end_turn", "max_tokens"})


def load(case: str) -> dict[str, Any]:
    return dict(json.loads((RECORDINGS / f"{case}.json").read_text()))


def replay(engine: Engine, request: dict[str, Any]) -> Response:
    body = request.get("body")
    if isinstance(body, dict) and body.get("model") == "tiny":
        body = {**body, "model": engine.model}
    raw = request["raw_body"].encode() if "raw_body" in request else None
    return exchange(engine.url, request["method"], request["path"], body, headers=request["headers"], raw=raw)


def header_shape(headers: list[Any]) -> list[tuple[str, str]]:
    """Names in order; values but for those that change by nature."""
    shown = []
    for name, value in headers:
        shown.append((name.lower(), "*" if name.lower() in ("date", "content-length") else value))
    return shown


def shape(value: Any, key: str = "") -> Any:
    """``value`` with everything that may differ replaced by its kind."""
    if isinstance(value, dict):
        return {name: shape(item, name) for name, item in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(item, int) for item in value):
            return ["ids"]
        return [shape(item, key) for item in value]
    if isinstance(value, str) and key in _FREE_STRINGS:
        prefix = re.match(r"(cmpl-|chatcmpl-|modelperm-|resp_|msg_)", value)
        return f"<{prefix.group(1)}string>" if prefix else "<string>"
    if isinstance(value, int | float) and not isinstance(value, bool) and key in _FREE_NUMBERS:
        return "<number>"
    return value


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
    body = "".join(chunks).encode()
    return Response(status=200, reason="", headers=[], body=body, chunks=None, end="").events()


def loosen(case: str, found: Any) -> Any:
    """Where the end depends on what was generated, the reason of the end does not count."""
    if case not in CONTENT_DEPENDENT:
        return found
    text = json.dumps(found)
    text = re.sub(r'"(finish_reason|stop_reason)": ("[^"]*"|null|\d+)', r'"\1": "*"', text)
    return json.loads(re.sub(r'"completion_tokens": \d+', '"completion_tokens": 0', text))


CONTENT_DEPENDENT = frozenset(
    {"completions_no_max_tokens", "chat_no_max_tokens", "completions_stop_token_ids", "chat_stop_token_ids"}
)


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
            want, got = expected["json"], response.json()
        else:
            want, got = shape(expected["json"]), shape(response.json())
    else:
        want, got = expected["text"], response.body.decode()
    want, got = loosen(case, want), loosen(case, got)
    return None if want == got else f"expected {json.dumps(want)}\n     got {json.dumps(got)}"


@pytest.mark.parametrize("case", CASES)
def test_recording(engine: Engine, case: str) -> None:
    recorded = load(case)
    found = difference(case, recorded, replay(engine, recorded["request"]))
    if engine.kind == "emulator" and case in DIFFERENT_ON_EMULATOR:
        assert found is not None, f"equal now; it was thought different: {DIFFERENT_ON_EMULATOR[case]}"
    else:
        assert found is None, found
