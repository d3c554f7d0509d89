"""What the derender endpoints refuse: bodies of the wrong form, with vLLM's words, and such as no answer can be."""

from typing import Any

from emulator.server.errors import ApiError, Invalid, validation_error
from emulator.server.settings import EngineSettings
from emulator.server.validation import MAX_LOGPROBS, MAX_N, Body, finding, literal, value_error
from emulator.tokens import VOCABULARY_SIZE

_MAX_WINDOW = 1024
NO_STATE: dict[str, Any] = {
    "prev_tokens": [],
    "prefix_offset": 0,
    "read_offset": 0,
    "role_sent": False,
    "logprob_context_token_ids": [],
    "logprob_text_offset": 0,
    "output_token_ids": [],
    "output_chunk_lens": [],
    "tools_streamed": False,
    "last_tool_call_ids": [],
}
"""The state of a stream at its start."""
_TYPE_FINDINGS = {list: "list_type", int: "int_type", bool: "bool_type"}


def validate(body: Body, whole: str, place: str, streamed: str) -> None:
    """The checks before the model is looked up: the body is a whole answer, in the field ``whole``, or one chunk.

    ``place`` and ``streamed``: what vLLM calls the two. Raises ApiError with what is wrong with both.
    """
    body_findings = _whole_findings(body, whole, place)
    if body_findings:
        chunk_findings = _chunk_findings(body, f"body.{streamed}")
        if chunk_findings:
            raise validation_error(body_findings + chunk_findings)


def _whole_findings(body: Body, whole: str, place: str) -> list[Invalid]:
    findings = []
    if body.get("stream", False) is not False:
        findings.append(literal(f"{place}.stream", body["stream"], "False"))
    given = body.get(whole)
    if given is None:
        return [*findings, finding("missing", f"{place}.{whole}", body)]
    if whole == "generate_response":
        findings += _response_findings(given, f"{place}.{whole}")
        return findings + _prompt_findings(body, place) + _object_findings(body, "chat_request", place)
    if not isinstance(given, list):
        return [*findings, finding("list_type", f"{place}.{whole}", given)]
    for index, response in enumerate(given):
        findings += _response_findings(response, f"{place}.{whole}.{index}")
    return findings + _prompts_findings(body, len(given), place)


def _prompt_findings(body: Body, place: str) -> list[Invalid]:
    findings = _ids_findings(body.get("prompt_token_ids"), f"{place}.prompt_token_ids")
    if body.get("prompt_tokens") is not None and type(body["prompt_tokens"]) is not int:
        findings.append(finding("int_type", f"{place}.prompt_tokens", body["prompt_tokens"]))
    return findings


def _prompts_findings(body: Body, count: int, place: str) -> list[Invalid]:
    """The same of several prompts, of which there have to be as many as answers."""
    findings = []
    for name in ("prompt_tokens", "prompt_token_ids"):
        several = body.get(name)
        if several is None:
            continue
        if not isinstance(several, list):
            findings.append(finding("list_type", f"{place}.{name}", several))
        elif name == "prompt_tokens":
            findings += _ids_findings(several, f"{place}.{name}")
        else:
            for index, ids in enumerate(several):
                findings += _ids_findings(ids, f"{place}.{name}.{index}")
        if not findings and len(several) != count:
            message = f"{name} length ({len(several)}) must equal generate_responses length ({count})"
            return [value_error(place, message, body)]
    return findings


def _object_findings(body: Body, name: str, place: str) -> list[Invalid]:
    value = body.get(name)
    return [] if value is None or isinstance(value, dict) else [finding("dict_type", f"{place}.{name}", value)]


def _response_findings(response: Any, place: str) -> list[Invalid]:
    """What is wrong with an answer of generate, whole or a chunk."""
    if not isinstance(response, dict):
        return [finding("dict_type", place, response)]
    findings = []
    if response.get("output_mode", "tokens") != "tokens":
        findings.append(literal(f"{place}.output_mode", response["output_mode"], "'tokens'"))
    choices = response.get("choices")
    if choices is None:
        return [*findings, finding("missing", f"{place}.choices", response)]
    if not isinstance(choices, list):
        return [*findings, finding("list_type", f"{place}.choices", choices)]
    for index, choice in enumerate(choices):
        inside = f"{place}.choices.{index}"
        if not isinstance(choice, dict):
            findings.append(finding("dict_type", inside, choice))
            continue
        if type(choice.get("index")) is not int:
            kind = "missing" if choice.get("index") is None else "int_type"
            findings.append(finding(kind, f"{inside}.index", choice if kind == "missing" else choice["index"]))
        findings += _ids_findings(choice.get("token_ids"), f"{inside}.token_ids")
        findings += _logprobs_findings(choice.get("logprobs"), f"{inside}.logprobs")
    return findings


def _logprobs_findings(found: Any, place: str) -> list[Invalid]:
    if found is None:
        return []
    content = found.get("content") if isinstance(found, dict) else found
    if content is None:
        return []
    if not isinstance(content, list):
        return [finding("list_type", place, content)]
    entries = [(f"{place}.content.{index}", entry) for index, entry in enumerate(content)]
    for where, entry in list(entries):
        others = entry.get("top_logprobs") if isinstance(entry, dict) else None
        entries += [(f"{where}.top_logprobs", other) for other in others or []]
    findings = []
    for where, entry in entries:
        if not isinstance(entry, dict):
            findings.append(finding("dict_type", where, entry))
            continue
        if type(entry.get("token_id")) is not int or not 0 <= entry["token_id"] < VOCABULARY_SIZE:
            findings.append(finding("int_type", f"{where}.token_id", entry.get("token_id")))
        if not isinstance(entry.get("logprob"), int | float):
            findings.append(finding("float_type", f"{where}.logprob", entry.get("logprob")))
    return findings


def _ids_findings(ids: Any, place: str) -> list[Invalid]:
    if ids is None:
        return []
    if not isinstance(ids, list):
        return [finding("list_type", place, ids)]
    wrong = [(index, token) for index, token in enumerate(ids) if type(token) is not int]
    if wrong:
        return [finding("int_type", f"{place}.{index}", token) for index, token in wrong]
    return [value_error(place, "token_ids must not contain negative values", ids)] if ids and min(ids) < 0 else []


def _chunk_findings(body: Body, place: str) -> list[Invalid]:
    findings = []
    if body.get("stream") is None:
        findings.append(finding("missing", f"{place}.stream", body))
    elif body["stream"] is not True:
        findings.append(literal(f"{place}.stream", body["stream"], "True"))
    chunk = body.get("generate_chunk")
    if chunk is None:
        findings.append(finding("missing", f"{place}.generate_chunk", body))
    else:
        findings += _response_findings(chunk, f"{place}.generate_chunk")
        if isinstance(chunk, dict):
            findings += _object_findings(chunk, "usage", f"{place}.generate_chunk")
    state = body.get("stream_state")
    if state is not None:
        findings += _state_findings(state, f"{place}.stream_state")
    return findings + _prompt_findings(body, place) + _object_findings(body, "chat_request", place)


def _state_findings(state: Any, place: str) -> list[Invalid]:
    if not isinstance(state, dict):
        return [finding("dict_type", place, state)]
    findings = []
    for name, otherwise in NO_STATE.items():
        value = state.get(name, otherwise)
        if type(value) is not type(otherwise):
            findings.append(finding(_TYPE_FINDINGS[type(otherwise)], f"{place}.{name}", value))
    if findings:
        return findings
    filled = {**NO_STATE, **state}
    if not all(isinstance(piece, str) for piece in filled["prev_tokens"]):
        findings.append(finding("string_type", f"{place}.prev_tokens", filled["prev_tokens"]))
    for name in ("logprob_context_token_ids", "output_token_ids", "output_chunk_lens"):
        findings += _ids_findings(filled[name], f"{place}.{name}")
    pieces = len(filled["prev_tokens"])
    if pieces > _MAX_WINDOW:
        message = f"prev_tokens length ({pieces}) exceeds maximum ({_MAX_WINDOW})"
        findings.append(value_error(f"{place}.prev_tokens", message, filled["prev_tokens"]))
    if findings:
        return findings
    total, held = sum(filled["output_chunk_lens"]), len(filled["output_token_ids"])
    if total == held:
        return []
    message = f"output_chunk_lens must sum to len(output_token_ids) (got sum={total}, len(output_token_ids)={held})"
    return [value_error(place, message, state)]


def check_bounds(given: list[dict[str, Any]], settings: EngineSettings) -> None:
    """Refuse what is larger than any answer of this server. Raises ApiError with vLLM's words."""
    longest = settings.max_model_len
    if len(given) > MAX_N:
        raise ApiError(
            f"generate_responses count ({len(given)}) exceeds server maximum ({MAX_N}). "
            "Set VLLM_MAX_N_SEQUENCES to increase this limit."
        )
    for response in given:
        if len(response["choices"]) > MAX_N:
            name = response.get("request_id")
            raise ApiError(
                f"choices count ({len(response['choices'])}) in response '{name}' exceeds server maximum ({MAX_N})."
            )
        for choice in response["choices"]:
            size = len(choice.get("token_ids") or [])
            if size > longest:
                raise ApiError(
                    f"token_ids length ({size}) in choice {choice['index']} exceeds max_model_len ({longest})."
                )
            for entry in (choice.get("logprobs") or {}).get("content") or []:
                count = len(entry.get("top_logprobs") or [])
                if count > MAX_LOGPROBS:
                    raise ApiError(
                        f"top_logprobs count ({count}) in choice {choice['index']} exceeds "
                        f"max_logprobs ({MAX_LOGPROBS})."
                    )


def check_prompts(prompts: list[list[int] | None], settings: EngineSettings) -> None:
    """Refuse prompts that this server could not have run. Raises ApiError."""
    for prompt in prompts:
        if prompt is not None and len(prompt) > settings.max_model_len:
            raise ApiError(f"prompt_token_ids length ({len(prompt)}) exceeds max_model_len ({settings.max_model_len}).")
