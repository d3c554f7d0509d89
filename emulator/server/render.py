"""The answers of ``*/render``: a request as ``/inference/v1/generate`` takes it."""

from typing import Any

from emulator.server.generation import Call
from emulator.server.validation import Body

_DEFAULTS = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0}
_DELTA, _WHOLE = 1, 2


def rendered(call: Call, body: Body, place: int, request_id: str) -> dict[str, Any]:
    """The generate request of prompt ``place`` of a call, whose ``body`` has the fields that the call lacks."""
    return {
        "request_id": request_id,
        "token_ids": call.prompts[place],
        "token_offsets": None,
        "features": None,
        "content_parts": None,
        "sampling_params": _sampling(call, body, place),
        "model": body.get("model"),
        "reasoning_ended": None,
        "reasoning_parser_kwargs": None,
        "return_token_ids": None,
        "output_mode": "tokens",
        "stream": call.stream,
        "stream_options": _stream_options(body) if call.stream else None,
        "cache_salt": body.get("cache_salt"),
        "priority": body.get("priority") or 0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }


def _sampling(call: Call, body: Body, place: int) -> dict[str, Any]:
    """vLLM's sampling parameters: those with a default that is not written out are left out."""
    shown: dict[str, Any] = {name: body.get(name, otherwise) for name, otherwise in _DEFAULTS.items()}
    if call.temperature >= 1e-5:
        shown["top_p"] = call.top_p
        shown["min_p"] = body.get("min_p") or 0.0
    shown["stop"] = list(call.stop)
    shown["stop_token_ids"] = body.get("stop_token_ids") or []
    if call.ignore_eos:
        shown["ignore_eos"] = True
    shown["max_tokens"] = call.max_tokens[place]
    shown["output_kind"] = _DELTA if call.stream else _WHOLE
    shown["skip_clone"] = True
    held = max(map(len, call.stop), default=1) - 1
    if held and not call.include_stop:
        shown["output_text_buffer_length"] = held
    shown["bad_words"] = body.get("bad_words") or []
    shown["skip_reading_prefix_cache"] = call.prompt_logprobs is not None
    return shown


def _stream_options(body: Body) -> dict[str, Any] | None:
    options = body.get("stream_options")
    return options if isinstance(options, dict) else None
