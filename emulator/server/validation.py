"""Bodies of generation requests: JSON, field types and vLLM's parameter rules, in vLLM's order and words."""

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from emulator.server.errors import ApiError, Invalid, describe_input, parameter_error, validation_error
from emulator.server.http import Exchange

Body = dict[str, Any]

_COMMON_FIELDS = {
    "model": "str",
    "temperature": "float",
    "top_p": "float",
    "top_k": "int",
    "min_p": "float",
    "seed": "int",
    "n": "int",
    "max_tokens": "int",
    "min_tokens": "int",
    "stream": "bool",
    "ignore_eos": "bool",
    "return_token_ids": "bool",
    "include_stop_str_in_output": "bool",
    "priority": "int",
    "presence_penalty": "float",
    "frequency_penalty": "float",
    "repetition_penalty": "float",
    "request_id": "str",
    "cache_salt": "str",
    "user": "str",
    "prompt_logprobs": "int",
    "return_tokens_as_token_ids": "bool",
    "echo": "bool",
}
COMPLETION_FIELDS = {**_COMMON_FIELDS, "logprobs": "int", "suffix": "str"}
CHAT_FIELDS = {
    **_COMMON_FIELDS,
    "max_completion_tokens": "int",
    "logprobs": "bool",
    "top_logprobs": "int",
    "add_generation_prompt": "bool",
    "continue_final_message": "bool",
}
SAMPLING_FIELDS = {**_COMMON_FIELDS, "logprobs": "int"}
MAX_LOGPROBS = 20
MAX_N = 128
"""Most choices of one prompt; vLLM's own limit is far above what anybody asks for."""
ONE_CONSTRAINT = "You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice')."
_LONGEST_SALT = 128
_FORBIDDEN_IN_SALT = frozenset("@/\\\0")
_TRUE = frozenset({"true", "1", "yes", "on", "y", "t"})
_FALSE = frozenset({"false", "0", "no", "off", "n", "f"})
_MESSAGES = {
    "float_parsing": "Input should be a valid number, unable to parse string as a number",
    "float_type": "Input should be a valid number",
    "int_parsing": "Input should be a valid integer, unable to parse string as an integer",
    "int_type": "Input should be a valid integer",
    "int_from_float": "Input should be a valid integer, got a number with a fractional part",
    "bool_parsing": "Input should be a valid boolean, unable to interpret input",
    "bool_type": "Input should be a valid boolean",
    "string_type": "Input should be a valid string",
    "list_type": "Input should be a valid list",
    "dict_type": "Input should be a valid dictionary",
    "missing": "Field required",
}


def read_body(exchange: Exchange) -> Body:
    """The JSON object of a request. Raises ApiError with vLLM's texts for anything else."""
    if not exchange.body:
        raise validation_error([finding("missing", "body", None)])
    media_type = (exchange.header(b"content-type") or "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed", type_="Bad Request"
        )
    try:
        body = msgspec.json.decode(exchange.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = _decode_slowly(exchange.body)
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        shown = describe_input(body)
        raise validation_error([Invalid(kind="model_attributes_type", location="body", message=message, shown=shown)])
    return body


def _decode_slowly(data: bytes) -> Any:
    """The standard library's decoder: it accepts NaN as vLLM does, and gives the error's place."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise validation_error(
            [
                Invalid(
                    kind="json_invalid",
                    location=f"body.{error.pos}",
                    message="JSON decode error",
                    shown="<dict of 0 items>",
                    context={"error": error.msg},
                )
            ]
        ) from None
    except (UnicodeDecodeError, RecursionError):
        raise ApiError("There was an error parsing the body", type_="Bad Request") from None


def finding(kind: str, location: str, value: object) -> Invalid:
    """A finding with vLLM's words for its kind."""
    return Invalid(kind=kind, location=location, message=_MESSAGES[kind], shown=describe_input(value))


def too_short(location: str, value: list[Any]) -> Invalid:
    """An empty list where one item is needed."""
    return Invalid(
        kind="too_short",
        location=location,
        message="List should have at least 1 item after validation, not 0",
        shown=describe_input(value),
        context={"field_type": "List", "min_length": 1, "actual_length": 0},
    )


def convert_fields(body: Body, fields: Mapping[str, str], place: str = "body") -> list[Invalid]:
    """Convert the known fields of ``body`` in place, loosely as pydantic does; returns what could not be converted."""
    findings = []
    for name, kind in fields.items():
        value = body.get(name)
        if value is None:
            continue
        converted, error = _CONVERTERS[kind](value)
        if error:
            findings.append(finding(error, f"{place}.{name}", value))
        else:
            body[name] = converted
    return findings


def _to_float(value: Any) -> tuple[Any, str]:
    if isinstance(value, bool | int | float):
        return float(value), ""
    if isinstance(value, str):
        try:
            return float(value), ""
        except ValueError:
            return None, "float_parsing"
    return None, "float_type"


def _to_int(value: Any) -> tuple[Any, str]:
    if isinstance(value, bool | int):
        return int(value), ""
    if isinstance(value, float):
        return (int(value), "") if math.isfinite(value) and value.is_integer() else (None, "int_from_float")
    if isinstance(value, str):
        try:
            return int(value), ""
        except ValueError:
            return None, "int_parsing"
    return None, "int_type"


def _to_bool(value: Any) -> tuple[Any, str]:
    if isinstance(value, bool):
        return value, ""
    if isinstance(value, str):
        lowered = value.lower()
        if lowered in _TRUE or lowered in _FALSE:
            return lowered in _TRUE, ""
        return None, "bool_parsing"
    if isinstance(value, int | float):
        return (bool(value), "") if value in (0, 1) else (None, "bool_parsing")
    return None, "bool_type"


def _to_str(value: Any) -> tuple[Any, str]:
    return (value, "") if isinstance(value, str) else (None, "string_type")


_CONVERTERS = {"float": _to_float, "int": _to_int, "bool": _to_bool, "str": _to_str}


def stop_strings(body: Body) -> tuple[str, ...]:
    """The ``stop`` field as a tuple. Raises ApiError."""
    stop = body.get("stop")
    if stop is None:
        return ()
    found = [stop] if isinstance(stop, str) else stop
    if not isinstance(found, list):
        raise validation_error([finding("list_type", "body.stop", stop)])
    for index, item in enumerate(found):
        if not isinstance(item, str):
            raise validation_error([finding("string_type", f"body.stop.{index}", item)])
    if "" in found:
        raise ApiError("stop cannot contain an empty string.")
    return tuple(found)


def stop_token_ids(body: Body) -> frozenset[int]:
    """The ``stop_token_ids`` field. Raises ApiError."""
    ids = body.get("stop_token_ids")
    if ids is None:
        return frozenset()
    if not isinstance(ids, list):
        raise validation_error([finding("list_type", "body.stop_token_ids", ids)])
    converted = []
    for index, item in enumerate(ids):
        value, error = _to_int(item)
        if error:
            raise validation_error([finding(error, f"body.stop_token_ids.{index}", item)])
        converted.append(value)
    return frozenset(converted)


def stream_options(body: Body) -> tuple[bool, bool]:
    """(include_usage, continuous_usage_stats). Raises ApiError where they come without a stream."""
    options = body.get("stream_options")
    if options is None:
        return False, False
    if not body.get("stream"):
        raise parameter_error("Stream options can only be defined when `stream=True`.", "stream_options")
    if not isinstance(options, dict):
        return False, False
    include_usage = bool(options.get("include_usage"))
    return include_usage, include_usage and bool(options.get("continuous_usage_stats"))


def check_early(body: Body, *, one_kind: ApiError) -> list[Invalid]:
    """What vLLM checks of a body before it converts any field; returns findings for the list of all.

    ``one_kind``: the refusal of two kinds of constraint. Raises ApiError.
    """
    salt = body.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise parameter_error("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
    if salt is not None and (len(salt) > _LONGEST_SALT or not _FORBIDDEN_IN_SALT.isdisjoint(salt)):
        raise parameter_error(
            f"Parameter 'cache_salt' must be at most {_LONGEST_SALT} characters and must not contain '@', '/', "
            "'\\\\', or NUL.",
            "cache_salt",
        )
    structured = body.get("structured_outputs")
    if structured is not None and not isinstance(structured, dict):
        message = f"{type(structured).__name__!r} object has no attribute 'get'"
        raise ApiError(message, status=500, type_="InternalServerError", unforeseen=True)
    findings = structured_findings(structured, "body.structured_outputs")
    if structured and sum(structured.get(name) is not None for name in ("json", "regex", "choice")) > 1:
        raise one_kind
    return findings + _response_format(body.get("response_format"))


def structured_findings(structured: Any, place: str) -> list[Invalid]:
    """Fields of ``structured_outputs`` that do not have their types."""
    if not isinstance(structured, dict):
        return []
    findings = [
        finding("string_type", f"{place}.{name}", structured[name])
        for name in ("regex", "grammar", "structural_tag")
        if not isinstance(structured.get(name), str | None)
    ]
    choice = structured.get("choice")
    if choice is not None and not isinstance(choice, list):
        return [*findings, finding("list_type", f"{place}.choice", choice)]
    wrong = [(index, item) for index, item in enumerate(choice or []) if not isinstance(item, str)]
    return findings + [finding("string_type", f"{place}.choice.{index}", item) for index, item in wrong]


def _response_format(given: Any) -> list[Invalid]:
    """What is wrong with ``response_format``, as one of the three kinds that it may be. Raises ApiError."""
    place = "body.response_format"
    if given is None:
        return []
    if not isinstance(given, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        wrong = Invalid(kind="model_attributes_type", location=place, message=message, shown=describe_input(given))
        return [wrong] * 3
    kind = given.get("type")
    if kind == "json_schema" and given.get("json_schema") is None:
        raise parameter_error(
            "When response_format type is 'json_schema', the 'json_schema' field must be provided.", "response_format"
        )
    if kind in ("text", "json_object", "json_schema", "structural_tag"):
        return []
    tag = literal(f"{place}.type", kind, "'structural_tag'")
    return [
        literal(f"{place}.type", kind, "'text', 'json_object' or 'json_schema'"),
        *(tag, finding("missing", f"{place}.format", given)),
        *(tag, finding("missing", f"{place}.structures", given), finding("missing", f"{place}.triggers", given)),
    ]


def literal(location: str, value: Any, expected: str) -> Invalid:
    """A value that is none of those ``expected``, which are listed as vLLM does."""
    return Invalid(
        kind="literal_error",
        location=location,
        message=f"Input should be {expected}",
        shown=describe_input(value),
        context={"expected": expected},
    )


def value_error(location: str, message: str, value: Any) -> Invalid:
    """A finding of a rule that is none of a single type."""
    return Invalid(
        kind="value_error",
        location=location,
        message=f"Value error, {message}",
        shown=describe_input(value),
        context={"error": ValueError(message)},
    )


def check_logprob_fields(body: Body, sampled: str) -> None:
    """vLLM's rules for ``prompt_logprobs`` and for ``sampled``, the field of sampled ones. Raises ApiError.

    vLLM looks at them before it converts any field, so a number in quotes is refused here alone.
    """
    for name in ("prompt_logprobs", sampled):
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise parameter_error(f"`{name}` must be an integer.", name, value)
        if name == "prompt_logprobs" and body.get("stream") and (value > 0 or value == -1):
            raise parameter_error("`prompt_logprobs` are not available when `stream=True`.", name)
        if value < 0 and value != -1:
            raise parameter_error(f"`{name}` must be a positive value or -1.", name, value)


def check_sampling(body: Body, max_tokens: int) -> None:
    """vLLM's rules for sampling parameters. Raises ApiError."""
    n = default(body.get("n"), 1)
    if n < 1:
        raise ApiError(f"n must be at least 1, got {n}.")
    if n > MAX_N:
        raise ApiError(f"n must be at most {MAX_N}, got {n}.")
    temperature = default(body.get("temperature"), 1.0)
    for name in ("presence_penalty", "frequency_penalty"):
        value = default(body.get(name), 0.0)
        if not -2.0 <= value <= 2.0:
            raise ApiError(f"{name} must be in [-2, 2], got {value}.")
    if default(body.get("repetition_penalty"), 1.0) <= 0.0:
        raise ApiError(f"repetition_penalty must be greater than zero, got {body['repetition_penalty']}.")
    if not temperature >= 0.0:
        raise parameter_error(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
    if temperature > 2.0:
        raise parameter_error(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
    top_p = default(body.get("top_p"), 1.0)
    if not 0.0 < top_p <= 1.0:
        raise parameter_error(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    if default(body.get("top_k"), 0) < -1:
        raise ApiError(f"top_k must be 0 (disable), or at least 1, got {body['top_k']}.")
    if not 0.0 <= default(body.get("min_p"), 0.0) <= 1.0:
        raise ApiError(f"min_p must be in [0, 1], got {body['min_p']}.")
    if max_tokens < 1:
        raise parameter_error(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
    min_tokens = default(body.get("min_tokens"), 0)
    if min_tokens < 0:
        raise ApiError(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
    if min_tokens > max_tokens:
        raise ApiError(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.")
    if temperature < 1e-5 and n > 1:
        raise ApiError(f"n must be 1 when using greedy sampling, got {n}.")


def output_limit(requested: int | None, prompt_tokens: int, max_model_len: int, *, tokenized_here: bool = False) -> int:
    """How many tokens a request may produce: clamped to the model length. Raises ApiError with vLLM's texts.

    ``tokenized_here``: the prompt came as text, which vLLM stops to tokenize where it is too long.
    """
    if prompt_tokens > max_model_len:
        counted = max_model_len + 1 if tokenized_here else prompt_tokens
        shown = f"at least {counted}" if tokenized_here else str(counted)
        raise parameter_error(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"{shown} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
            counted,
        )
    if requested is not None and requested > max_model_len:
        raise parameter_error(
            f"max_tokens={requested} cannot be greater than max_model_len={max_model_len}. "
            "Please request fewer output tokens.",
            "max_tokens",
            requested,
        )
    room = max_model_len - prompt_tokens
    return room if requested is None else min(requested, room)


def default(value: Any, otherwise: Any) -> Any:
    """``otherwise`` for an absent or null field."""
    return otherwise if value is None else value
