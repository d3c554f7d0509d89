"""What worker stand-ins answer, byte for byte, so that the load generator can check that all of it came through.

Shapes and sizes are those that vLLM 0.32 sends for a chat: one chunk per event, about 200 bytes each.
"""

import json
from functools import lru_cache
from typing import Any

MODEL = "llama-3.1-8b"
_ID = "chatcmpl-ad5893d210775147"
_CREATED = 1795253098
_FINGERPRINT = "vllm-0.32.0-763e0982"
_WORDS = [
    " the",
    " of",
    ",",
    " request",
    "\n\n",
    ' "quoted"',
    " a",
    " longer",
    " tokenization",
    " é",
    ".",
    " 東京",
    " in",
]
DONE = b"data: [DONE]\n\n"

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:24:57 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _event(choice: dict[str, Any], **rest: Any) -> bytes:
    value = {"id": _ID, "object": "chat.completion.chunk", "created": _CREATED, "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps({**value, **rest}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@lru_cache
def stream_events(count: int) -> tuple[bytes, ...]:
    """The ``count`` events of a stream: role, text, finish reason. The end marker is not among them."""
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    events = [_event(first, prompt_token_ids=None, prompt_text=None)]
    for number in range(count - 2):
        delta = {"content": _WORDS[number % len(_WORDS)]}
        events.append(_event({"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}))
    last = {
        "index": 0,
        "delta": {"content": " end"},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
    }
    events.append(_event(last, system_fingerprint=_FINGERPRINT))
    return tuple(events)


def stream_payload(count: int) -> bytes:
    """The whole body of a stream of ``count`` events, without chunk framing."""
    return b"".join((*stream_events(count), DONE))


def whole_payload(tokens: int) -> bytes:
    """The body of an unstreamed answer of ``tokens`` tokens."""
    text = "".join(_WORDS[number % len(_WORDS)] for number in range(tokens))
    empty = ("refusal", "annotations", "audio", "function_call", "reasoning")
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **dict.fromkeys(empty)},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
        "routed_experts": None,
    }
    value = {
        "id": _ID,
        "object": "chat.completion",
        "created": _CREATED,
        "model": MODEL,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": _FINGERPRINT,
        "usage": {"prompt_tokens": 250, "total_tokens": 250 + tokens, "completion_tokens": tokens},
        **dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "metrics")),
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def whole_response(tokens: int) -> bytes:
    """An unstreamed answer with its head."""
    body = whole_payload(tokens)
    head = (
        b"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 09:24:57 GMT\r\nserver: uvicorn\r\n"
        b"content-length: %d\r\ncontent-type: application/json\r\nvary: Origin\r\n\r\n" % len(body)
    )
    return head + body


def chunk(payload: bytes) -> bytes:
    """``payload`` in chunked framing."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
