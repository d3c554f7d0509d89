"""The answers of ``*/render``: a request as ``/inference/v1/generate`` takes it."""

from typing import Any

from emulator.server.generation import Call
from emulator.server.sampling import NO_CONSTRAINT
from emulator.server.tools import structural_tag, uses_tools
from emulator.server.validation import Body, default
from emulator.structured import response_format_constraint

_DEFAULTS = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0}
_SHOWN_IF_SET = ("top_k", "ignore_eos", "min_tokens", "include_stop_str_in_output")
_SHOWN_IF_GIVEN = ("seed", "logit_bias", "allowed_token_ids")
_DEFAULT_MAX_TOKENS = 16
_GREEDY = 1e-5
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
    """vLLM's sampling parameters: those that are at their default are left out where vLLM can tell."""
    shown: dict[str, Any] = {name: default(body.get(name), otherwise) for name, otherwise in _DEFAULTS.items()}
    if call.temperature >= _GREEDY:
        shown["top_p"] = call.top_p
        shown["min_p"] = body.get("min_p") or 0.0
    if call.n > 1:
        shown["n"] = call.n
    shown |= {name: body[name] for name in _SHOWN_IF_SET if body.get(name)}
    shown |= {name: body[name] for name in _SHOWN_IF_GIVEN if body.get(name) is not None}
    if call.logprobs is not None:
        shown["logprobs"] = call.logprobs
    if call.prompt_logprobs is not None:
        shown["prompt_logprobs"] = call.prompt_logprobs
    if body.get("skip_special_tokens") is False or uses_tools(body):
        shown["skip_special_tokens"] = False
    shown["stop"] = list(call.stop)
    shown["stop_token_ids"] = body.get("stop_token_ids") or []
    if call.max_tokens[place] != _DEFAULT_MAX_TOKENS:
        shown["max_tokens"] = call.max_tokens[place]
    shown["output_kind"] = _DELTA if call.stream else _WHOLE
    shown["skip_clone"] = True
    held = max(map(len, call.stop), default=1) - 1
    if held and not call.include_stop:
        shown["output_text_buffer_length"] = held
    structured = _structured(body)
    if structured is not None:
        shown["structured_outputs"] = {**NO_CONSTRAINT, **structured}
    shown["bad_words"] = body.get("bad_words") or []
    shown["skip_reading_prefix_cache"] = call.prompt_logprobs is not None
    return shown


def _structured(body: Body) -> dict[str, Any] | None:
    """The constraint of a body in the form that generate takes."""
    tag = structural_tag(body)
    if tag is not None:
        return {"structural_tag": tag}
    given = response_format_constraint(body.get("response_format"))
    structured = body.get("structured_outputs")
    return given or (structured if isinstance(structured, dict) else None)


def _stream_options(body: Body) -> dict[str, Any] | None:
    options = body.get("stream_options")
    return {"include_usage": False, "continuous_usage_stats": False, **options} if isinstance(options, dict) else None
