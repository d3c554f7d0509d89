"""``/v1/completions``."""

from typing import Any

from emulator.server.errors import ApiError, parameter_error, validation_error
from emulator.server.generation import (
    DONE_EVENT,
    FINGERPRINT,
    Call,
    Choice,
    Generation,
    dumps,
    usage_numbers,
)
from emulator.server.http import Exchange
from emulator.server.settings import EngineSettings
from emulator.server.validation import (
    COMPLETION_FIELDS,
    MAX_LOGPROBS,
    Body,
    check_sampling,
    convert_fields,
    default,
    output_limit,
    stop_strings,
    stop_token_ids,
    stream_options,
)
from emulator.tokens import VOCABULARY_SIZE, decode, encode, token_bytes

DEFAULT_MAX_TOKENS = 16


def validate(body: Body) -> None:
    """The checks before the model is looked up. Raises ApiError."""
    findings = convert_fields(body, COMPLETION_FIELDS)
    if findings:
        raise validation_error(findings)
    stream_options(body)
    prompt = body.get("prompt")
    if prompt is None or prompt == "":
        raise parameter_error("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if body.get("prompt_logprobs") is not None and body.get("stream"):
        raise parameter_error("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")


def parse(body: Body, settings: EngineSettings, priority: int) -> Call:
    """The call of a validated body. Raises ApiError."""
    if body.get("suffix"):
        message = "suffix is only supported for models with FIM completion rendering"
        raise ApiError(message, param="suffix")
    prompts = _prompts(body["prompt"])
    echo = bool(body.get("echo"))
    requested = body.get("max_tokens", DEFAULT_MAX_TOKENS)
    limits = [output_limit(requested, len(prompt), settings.max_model_len) for prompt in prompts]
    if echo and requested == 0:
        limits = [1] * len(prompts)
    logprobs = body.get("logprobs")
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise parameter_error(
            f"Requested sample logprobs of {logprobs}, which is greater than max allowed: {MAX_LOGPROBS}",
            "logprobs",
            logprobs,
        )
    check_sampling(body, min(limits))
    include_usage, continuous_usage = stream_options(body)
    return Call(
        prompts=prompts,
        max_tokens=limits,
        n=body.get("n") or 1,
        stream=bool(body.get("stream")),
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        return_token_ids=bool(body.get("return_token_ids")),
        echo=echo,
        stop=stop_strings(body),
        include_stop=bool(body.get("include_stop_str_in_output")),
        stop_token_ids=stop_token_ids(body),
        min_tokens=body.get("min_tokens") or 0,
        ignore_eos=bool(body.get("ignore_eos")),
        natural_end=requested is None,
        priority=priority,
        cache_salt=body.get("cache_salt") or "",
        temperature=default(body.get("temperature"), 1.0),
        top_p=default(body.get("top_p"), 1.0),
    )


def _prompts(prompt: Any) -> list[list[int]]:
    if isinstance(prompt, str):
        return [encode(prompt)]
    if not isinstance(prompt, list):
        raise ApiError("prompt must be a string, array of strings, array of tokens, or array of token arrays")
    if not prompt:
        raise ApiError("You must pass at least one prompt")
    if all(isinstance(item, str) for item in prompt):
        found = [encode(item) for item in prompt]
    elif _is_ids(prompt):
        found = [prompt]
    elif all(isinstance(item, list) and _is_ids(item) for item in prompt):
        found = list(prompt)
    else:
        raise ApiError("prompt must be a string, array of strings, array of tokens, or array of token arrays")
    for ids in found:
        if not ids:
            raise ApiError("The decoder prompt cannot be empty")
        check_vocabulary(ids)
    return found


def _is_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def check_vocabulary(ids: list[int]) -> None:
    """Raises ApiError for an id outside the vocabulary."""
    highest, lowest = max(ids), min(ids)
    if highest >= VOCABULARY_SIZE or lowest < 0:
        raise ApiError(f"Token id {highest if highest >= VOCABULARY_SIZE else lowest} is out of vocabulary")


class CompletionGeneration(Generation):
    """A running ``/v1/completions`` call."""

    def __init__(self, exchange: Exchange, *args: Any, echo_only: bool = False, **kwargs: Any) -> None:
        super().__init__(exchange, *args, **kwargs)
        call = self.call
        self._echo_only = echo_only
        self.fast = call.stream and not (call.stop or call.return_token_ids or call.continuous_usage or call.echo)
        self._prefix = (
            f'{{"id":{dumps(self.response_id).decode()},"object":"text_completion","created":{self.created_s},'
            f'"model":{dumps(self.model).decode()},"choices":[{{"index":'
        ).encode()
        self._heads: list[bytes] = []
        self._tail = (
            b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
        )

    def opened_stream(self) -> None:
        """Prepare the frames: every output token is four plain characters, so a frame's size is known."""
        if not self.fast:
            return
        for choice in self.choices:
            head = b"data: " + self._prefix + b'%d,"text":"' % choice.index
            size = len(head) + 4 + len(self._tail)
            self._heads.append(b"%x\r\n%s" % (size, head) if self.exchange.chunked else head)
            choice.opened = True
        if self.exchange.chunked:
            self._tail += b"\r\n"

    def write_fast(self, choice: Choice, token_id: int) -> None:
        """One prepared frame."""
        self.exchange.write(self._heads[choice.index] + token_bytes(token_id) + self._tail)

    def send_delta(self, choice: Choice, delta: str, tokens: list[int]) -> None:
        """The general form of an event."""
        call = self.call
        prompt = call.prompts[choice.prompt_index]
        first = not choice.opened
        choice.opened = True
        if first and call.echo:
            delta = decode(prompt) if self._echo_only else decode(prompt) + delta
        prompt_ids = prompt if first and (call.return_token_ids or call.echo) else None
        choice_json = {
            "text": delta,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "prompt_token_ids": prompt_ids,
            "token_ids": tokens if call.return_token_ids else None,
        }
        event = self._prefix + b"%d," % choice.index + dumps(choice_json)[1:] + b"]"
        if call.continuous_usage:
            event += b',"usage":' + dumps(usage_numbers(len(prompt), choice.output_tokens))
        if choice.finish_reason is not None and not call.include_usage:
            event += b',"system_fingerprint":"%s"' % FINGERPRINT.encode()
        self.send_event(event + b"}")

    def finish_stream(self) -> None:
        """The usage event where it was asked for, and the end."""
        frames = b""
        if self.call.include_usage:
            usage: dict[str, Any] = usage_numbers(self.prompt_tokens(), self.output_tokens())
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens()}
            event = self._prefix.rpartition(b"[")[0] + b'[],"usage":' + dumps(usage)
            event += b',"system_fingerprint":"%s"}' % FINGERPRINT.encode()
            frames = self.exchange.frame(b"data: " + event + b"\n\n")
        self.exchange.end_stream(frames + self.exchange.frame(DONE_EVENT))

    def whole_body(self) -> bytes:
        """The body of an answer that is not streamed."""
        call = self.call
        choices = []
        for choice in self.choices:
            prompt = call.prompts[choice.prompt_index]
            text = choice.text
            if call.echo:
                text = decode(prompt) if self._echo_only else decode(prompt) + text
            choices.append(
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    "token_ids": choice.token_ids if call.return_token_ids else None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": prompt if call.return_token_ids else None,
                    "routed_experts": None,
                }
            )
        return dumps(
            {
                "id": self.response_id,
                "object": "text_completion",
                "created": self.created_s,
                "model": self.model,
                "choices": choices,
                "service_tier": None,
                "system_fingerprint": FINGERPRINT,
                "usage": whole_usage(self, created_cache_tokens=None),
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )


def whole_usage(generation: Generation, *, created_cache_tokens: int | None) -> dict[str, Any]:
    """The usage object of an answer that is not streamed."""
    usage: dict[str, Any] = usage_numbers(generation.prompt_tokens(), generation.output_tokens())
    usage["prompt_tokens_details"] = {
        "cached_tokens": generation.cached_tokens(),
        "created_cache_tokens": created_cache_tokens,
        "multimodal_tokens": None,
    }
    usage["completion_tokens_details"] = None
    return usage
