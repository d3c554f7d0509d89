"""The sampling fields that all generation endpoints share, as a ``Call``."""

from collections.abc import Collection
from typing import Any

from emulator.server.errors import ApiError, parameter_error, validation_error
from emulator.server.generation import Call
from emulator.server.validation import (
    MAX_LOGPROBS,
    Body,
    check_sampling,
    convert_fields,
    default,
    finding,
    stop_strings,
    stop_token_ids,
    stream_options,
)
from emulator.structured import Constraint, ConstraintError, count_kinds, parse_constraint
from emulator.tokens import EOS_ID, VOCABULARY_SIZE

NO_CONSTRAINT: dict[str, Any] = {
    **dict.fromkeys(("json", "regex", "choice", "grammar", "json_object")),
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "structural_tag": None,
    "_backend": None,
    "_backend_was_auto": False,
}
"""The structured-output parameters of vLLM, all at their defaults."""
_FORCED = 100.0
"""A logit bias from here on leaves nothing else to sample; one of minus this never lets the token come."""


def build_call(
    body: Body,
    prompts: list[list[int]],
    limits: list[int],
    *,
    natural_end: bool,
    priority: int,
    best: int | None,
    prompt_best: int | None,
    **fields: Any,
) -> Call:
    """The call of a body whose sampling fields have their types; ``fields`` are those of one endpoint.

    ``best`` and ``prompt_best``: log probabilities asked for. Raises ApiError for what vLLM refuses.
    """
    for name, value in (("logprobs", best), ("prompt_logprobs", prompt_best)):
        _check_logprobs(name, value)
    check_sampling(body, min(limits))
    include_usage, continuous_usage = stream_options(body)
    allowed, banned = _vocabulary(body)
    return Call(
        prompts=prompts,
        max_tokens=limits,
        n=body.get("n") or 1,
        stream=bool(body.get("stream")),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=bool(body.get("return_token_ids")),
        stop=stop_strings(body),
        include_stop=bool(body.get("include_stop_str_in_output")),
        stop_token_ids=stop_token_ids(body),
        min_tokens=body.get("min_tokens") or 0,
        ignore_eos=bool(body.get("ignore_eos")),
        natural_end=natural_end,
        priority=priority,
        cache_salt=body.get("cache_salt") or "",
        temperature=default(body.get("temperature"), 1.0),
        top_p=default(body.get("top_p"), 1.0),
        logprobs=best,
        prompt_logprobs=prompt_best,
        tokens_as_ids=bool(body.get("return_tokens_as_token_ids")),
        constraint=_constraint(body),
        allowed=allowed,
        banned=banned,
        bad_words=_bad_words(body),
        kv_transfer=_mapping(body, "kv_transfer_params"),
        **fields,
    )


def _check_logprobs(name: str, value: int | None) -> None:
    kind = "sample" if name == "logprobs" else "prompt"
    if value is None:
        return
    wanted = VOCABULARY_SIZE if value == -1 else value
    if wanted > MAX_LOGPROBS:
        message = f"Requested {kind} logprobs of {wanted}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise parameter_error(message, name, wanted)
    if value < 0:
        raise parameter_error(f"{name} must be non-negative or -1, got {value}.", name, value)


def _constraint(body: Body) -> Constraint | None:
    structured = body.get("structured_outputs")
    if structured is not None:
        kinds = count_kinds(structured)
        shown = {**NO_CONSTRAINT, **structured} if isinstance(structured, dict) else NO_CONSTRAINT
        if kinds > 1:
            raise ApiError(
                f"You can only use one kind of structured outputs constraint but multiple are specified: {shown}"
            )
        if not kinds:
            raise ApiError(f"You must use one kind of structured outputs constraint but none are specified: {shown}")
    try:
        return parse_constraint(structured, body.get("response_format"))
    except ConstraintError as error:
        raise ApiError(str(error)) from None


def _vocabulary(body: Body) -> tuple[Collection[int], Collection[int]]:
    """(ids that alone may come, or none; ids that may not come) by ``allowed_token_ids`` and ``logit_bias``."""
    allowed = body.get("allowed_token_ids")
    bias = _biases(body)
    if allowed is not None:
        if not isinstance(allowed, list) or not all(type(token) is int for token in allowed):
            raise validation_error([finding("list_type", "body.allowed_token_ids", allowed)])
        if not allowed:
            raise parameter_error("allowed_token_ids is not None and empty!", "allowed_token_ids", "[]")
        if _outside(allowed):
            raise parameter_error(
                "allowed_token_ids contains out-of-vocab token id!", "allowed_token_ids", _outside(allowed)
            )
    forced = [token for token, value in bias.items() if value >= _FORCED]
    return allowed or forced, [token for token, value in bias.items() if value <= -_FORCED]


def _biases(body: Body) -> dict[int, float]:
    given = body.get("logit_bias")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise validation_error([finding("dict_type", "body.logit_bias", given)])
    found: dict[int, float] = {}
    wrong = []
    given = dict(given)
    findings = convert_fields(given, dict.fromkeys(given, "float"), "body.logit_bias")
    if findings:
        raise validation_error(findings)
    for name, value in given.items():
        try:
            found[int(name)] = value
        except ValueError:
            wrong.append(name)
    if wrong:
        message = f"logit_bias contains key(s) that cannot be converted to integer token IDs: {wrong!r}"
        raise parameter_error(message, "logit_bias", wrong)
    if _outside(found):
        raise parameter_error(
            f"token_id(s) {_outside(found)} in logit_bias contain out-of-vocab token ids. "
            f"Vocabulary size: {VOCABULARY_SIZE}",
            "logit_bias",
            _outside(found),
        )
    return found


def _outside(ids: Collection[int]) -> list[int]:
    return [token for token in ids if not 0 <= token <= EOS_ID]


def _bad_words(body: Body) -> tuple[bytes, ...]:
    words = body.get("bad_words")
    if not words:
        return ()
    if not isinstance(words, list):
        raise validation_error([finding("list_type", "body.bad_words", words)])
    for index, word in enumerate(words):
        if not isinstance(word, str):
            raise validation_error([finding("string_type", f"body.bad_words.{index}", word)])
    if "" in words:
        raise ApiError(f"bad_words cannot contain an empty string. Got bad_words={words}")
    return tuple(word.encode("utf-8", "replace") for word in words)


def _mapping(body: Body, name: str) -> dict[str, Any] | None:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise validation_error([finding("dict_type", f"body.{name}", value)])
    return value
