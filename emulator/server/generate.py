"""``/inference/v1/generate``: token ids in, token ids (or text) out."""

from typing import Any

from emulator.server.completions import check_vocabulary, whole_usage
from emulator.server.errors import ApiError, Invalid, describe_input, validation_error
from emulator.server.generation import DONE_EVENT, Call, Choice, Generation, dumps, usage_numbers
from emulator.server.http import Exchange
from emulator.server.logprobs import chat_shape, generate_shape, prompt_entries, prompt_shape
from emulator.server.sampling import build_call
from emulator.server.settings import EngineSettings
from emulator.server.validation import (
    ONE_CONSTRAINT,
    SAMPLING_FIELDS,
    Body,
    check_early,
    convert_fields,
    finding,
    literal,
    structured_findings,
    too_short,
    value_error,
)

_FIELDS = {
    "request_id": "str",
    "model": "str",
    "stream": "bool",
    "return_token_ids": "bool",
    "priority": "int",
    "cache_salt": "str",
}
_PASSED = ("stream", "stream_options", "return_token_ids", "cache_salt", "kv_transfer_params")
MODES = ("tokens", "text")


def validate(body: Body) -> None:
    """The checks before the model is looked up. Raises ApiError."""
    check_early({"cache_salt": body.get("cache_salt")}, one_kind=ApiError(ONE_CONSTRAINT))
    findings = convert_fields(body, _FIELDS)
    ids, sampling = body.get("token_ids"), body.get("sampling_params")
    if ids is None:
        findings.append(finding("missing", "body.token_ids", body))
    elif not isinstance(ids, list):
        findings.append(finding("list_type", "body.token_ids", ids))
    elif not ids:
        findings.append(too_short("body.token_ids", ids))
    elif any(type(token) is not int for token in ids):
        findings += [
            finding("int_type", f"body.token_ids.{place}", token)
            for place, token in enumerate(ids)
            if type(token) is not int
        ]
    elif min(ids) < 0:
        findings.append(value_error("body.token_ids", "token_ids must not contain negative values", ids))
    if sampling is None:
        findings.append(finding("missing", "body.sampling_params", body))
    else:
        findings += _sampling_findings(sampling)
    if body.get("output_mode", "tokens") not in MODES:
        findings.append(literal("body.output_mode", body["output_mode"], "'tokens' or 'text'"))
    if findings:
        raise validation_error(findings)


def _sampling_findings(sampling: Any) -> list[Invalid]:
    """What is wrong with the sampling parameters: they are an object of vLLM's, or they are made from a mapping."""
    place = "body.sampling_params"
    wrong = (
        convert_fields(sampling, SAMPLING_FIELDS, place)
        if isinstance(sampling, dict)
        else [finding("dict_type", place, sampling)]
    )
    if isinstance(sampling, dict):
        wrong += structured_findings(sampling.get("structured_outputs"), f"{place}.structured_outputs")
    if not wrong:
        return []
    message = "Input should be an instance of SamplingParams"
    context = {"class": "SamplingParams"}
    shown = describe_input(sampling)
    return [Invalid(kind="is_instance_of", location=place, message=message, shown=shown, context=context), *wrong]


def parse(body: Body, settings: EngineSettings, priority: int) -> Call:
    """The call of a validated body. Raises ApiError."""
    prompt, sampling = body["token_ids"], body["sampling_params"]
    if len(prompt) > settings.max_model_len:
        raise ApiError(
            f"The decoder prompt (length {len(prompt)}) is longer than the maximum model length of "
            f"{settings.max_model_len}. Make sure that `max_model_len` is no smaller than the number of text tokens."
        )
    room = settings.max_model_len - len(prompt)
    if not room:
        raise ApiError(
            f"The decoder prompt (length {len(prompt)}) plus the number of requested output tokens (at least 1) is "
            f"longer than the maximum model length of {settings.max_model_len}. Make sure that `max_model_len` is no "
            "smaller than the number of text tokens (prompt + requested output tokens)."
        )
    check_vocabulary(prompt)
    requested = sampling.get("max_tokens")
    fields = {**sampling, **{name: body[name] for name in _PASSED if name in body}}
    if not body.get("stream"):
        fields.pop("stream_options", None)
    return build_call(
        fields,
        [prompt],
        [room if requested is None else min(requested, room)],
        natural_end=requested is None,
        priority=priority,
        best=sampling.get("logprobs"),
        prompt_best=sampling.get("prompt_logprobs"),
    )


class GenerateGeneration(Generation):
    """A running ``/inference/v1/generate`` call."""

    def __init__(self, exchange: Exchange, *args: Any, output_mode: str = "tokens", **kwargs: Any) -> None:
        super().__init__(exchange, *args, **kwargs)
        call = self.call
        self._mode = output_mode
        self.fast = call.stream and call.plain and output_mode == "tokens"
        self._ids_sent = not call.return_token_ids
        self._prefix = b'{"request_id":%s,"usage":' % dumps(self.response_id)
        self._heads: list[bytes] = []
        self._tail = b'],"routed_experts":null,"sampling_mask":null,"weight_versions":null,"logprobs":null}]}\n\n'

    def opened_stream(self) -> None:
        """Prepare the frames: the id of every output token of the chain has five digits, so their size is known."""
        if not self.fast:
            return
        for choice in self.choices:
            head = b"data: " + self._prefix + b'null,"output_mode":"tokens","choices":[{"index":%d,' % choice.index
            head += b'"finish_reason":null,"stop_reason":null,"token_ids":['
            size = len(head) + 5 + len(self._tail)
            self._heads.append(b"%x\r\n%s" % (size, head) if self.exchange.chunked else head)
            choice.opened = True
        if self.exchange.chunked:
            self._tail += b"\r\n"

    def write_fast(self, choice: Choice, token_id: int) -> None:
        """One prepared frame."""
        self.exchange.write(self._heads[choice.index] + b"%d" % token_id + self._tail)

    def send_delta(self, choice: Choice, delta: str, tokens: list[int]) -> None:
        """The general form of an event."""
        call = self.call
        choice.opened = True
        finished = choice.finish_reason is not None
        if not (tokens or finished or (self._mode == "text" and delta)):
            return
        usage = dumps(_usage(len(call.prompts[0]), choice.output_tokens)) if call.continuous_usage else b"null"
        event = self._prefix + usage
        if not self._ids_sent:
            self._ids_sent = True
            event += b',"prompt_token_ids":' + dumps(call.prompts[0])
        shown = self._choice(choice, delta, tokens, finished=finished)
        self.send_event(event + b',"output_mode":"%s","choices":[' % self._mode.encode() + dumps(shown) + b"]}")

    def finish_stream(self) -> None:
        """The usage event where it was asked for, and the end."""
        frames = b""
        if self.call.include_usage:
            usage: dict[str, Any] = usage_numbers(self.prompt_tokens(), self.output_tokens())
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens()}
            event = self._prefix + dumps(usage) + b',"output_mode":"%s","choices":[]}' % self._mode.encode()
            frames = self.exchange.frame(b"data: " + event + b"\n\n")
        self.exchange.end_stream(frames + self.exchange.frame(DONE_EVENT))

    def whole_body(self) -> bytes:
        """The body of an answer that is not streamed."""
        call, prompt = self.call, self.call.prompts[0]
        best = call.prompt_logprobs
        return dumps(
            {
                "request_id": self.response_id,
                "model": self.model,
                "created": self.created_s,
                "usage": whole_usage(self, created_cache_tokens=None),
                "prompt_logprobs": None if best is None else prompt_shape(prompt_entries(prompt, best)),
                "prompt_token_id_logprobs": None,
                "prompt_token_ids": prompt if call.return_token_ids else None,
                "mm_placeholders": None,
                "metrics": None,
                "kv_transfer_params": self.kv_transfer_params(),
                "ec_transfer_params": None,
                "output_mode": self._mode,
                "choices": [self._choice(one, one.text, one.token_ids, finished=True) for one in self.choices],
            }
        )

    def _choice(self, choice: Choice, text: str, tokens: list[int], *, finished: bool) -> dict[str, Any]:
        versions = [{"version": "default", "start": 0, "end": choice.output_tokens}]
        shown: dict[str, Any] = {
            "index": choice.index,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": tokens,
            "routed_experts": None,
            "sampling_mask": None,
            "weight_versions": versions if finished else None,
        }
        if self._mode == "text":
            shown["text"] = text
        shown["logprobs"] = self._logprobs(choice)
        return shown

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        best = self.call.logprobs
        if best is None:
            return None
        if self._mode == "text":
            return chat_shape(choice.entries, max(best, 1), as_ids=False)
        return generate_shape(choice.entries, best)


def _usage(prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    usage: dict[str, Any] = usage_numbers(prompt_tokens, output_tokens)
    return {**usage, "prompt_tokens_details": None, "completion_tokens_details": None}
