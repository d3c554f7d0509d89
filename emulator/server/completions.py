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
from emulator.server.logprobs import Entry, completion_shape, prompt_entries, prompt_shape
from emulator.server.sampling import build_call
from emulator.server.settings import EngineSettings
from emulator.server.validation import (
    COMPLETION_FIELDS,
    ONE_CONSTRAINT,
    Body,
    check_early,
    check_logprob_fields,
    convert_fields,
    output_limit,
    stream_options,
)
from emulator.tokens import VOCABULARY_SIZE, decode, encode, token_bytes

DEFAULT_MAX_TOKENS = 16


def validate(body: Body) -> None:
    """The checks before the model is looked up. Raises ApiError."""
    check_logprob_fields(body, "logprobs")
    findings = check_early(body, one_kind=parameter_error(ONE_CONSTRAINT, "structured_outputs"))
    findings += convert_fields(body, COMPLETION_FIELDS)
    if findings:
        raise validation_error(findings)
    stream_options(body)
    prompt = body.get("prompt")
    if prompt is None or prompt == "":
        raise parameter_error("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")


def parse(body: Body, settings: EngineSettings, priority: int) -> Call:
    """The call of a validated body. Raises ApiError."""
    if body.get("suffix"):
        message = "suffix is only supported for models with FIM completion rendering"
        raise ApiError(message, param="suffix")
    prompts = _prompts(body["prompt"])
    echo = bool(body.get("echo"))
    requested = body.get("max_tokens", DEFAULT_MAX_TOKENS)
    texts = [isinstance(one, str) for one in _several(body["prompt"])]
    limits = [
        output_limit(requested, len(prompt), settings.max_model_len, tokenized_here=text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    if echo and requested == 0:
        limits = [1] * len(prompts)
    best, prompt_best = body.get("logprobs"), body.get("prompt_logprobs")
    return build_call(
        body,
        prompts,
        limits,
        natural_end=requested is None,
        priority=priority,
        best=best,
        prompt_best=best if echo and prompt_best is None else prompt_best,
        echo=echo,
    )


def _several(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) or type(prompt[0]) is int else prompt


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
        self.fast = call.stream and call.plain and not call.echo
        self._prompt_entries: dict[int, list[Entry]] = {}
        self._offsets: dict[int, int] = {}
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
            delta = self._echoed(prompt, delta)
        prompt_ids = prompt if first and (call.return_token_ids or call.echo) else None
        choice_json = {
            "text": delta,
            "logprobs": self._logprobs(choice, prompt if first else None),
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
        choices = [
            completion_choice(
                choice.index,
                self._echoed(call.prompts[choice.prompt_index], choice.text) if call.echo else choice.text,
                self._logprobs(choice, call.prompts[choice.prompt_index]),
                (choice.finish_reason, choice.stop_reason),
                token_ids=choice.token_ids if call.return_token_ids else None,
                prompt_logprobs=self._prompt_logprobs(choice.prompt_index),
                prompt_token_ids=call.prompts[choice.prompt_index] if call.return_token_ids else None,
            )
            for choice in self.choices
        ]
        answer = completion_answer(
            choices,
            id=self.response_id,
            created=self.created_s,
            model=self.model,
            system_fingerprint=FINGERPRINT,
            usage=whole_usage(self, created_cache_tokens=None),
            kv_transfer_params=self.kv_transfer_params(),
        )
        return dumps(answer)

    def _echoed(self, prompt: list[int], text: str) -> str:
        shown = "" if self.call.return_token_ids else decode(prompt)
        return shown if self._echo_only else shown + text

    def _entries_of_prompt(self, prompt_index: int) -> list[Entry]:
        found = self._prompt_entries.get(prompt_index)
        if found is None:
            prompt = self.call.prompts[prompt_index]
            found = self._prompt_entries[prompt_index] = prompt_entries(prompt, self.call.prompt_logprobs or 0)
        return found

    def _prompt_logprobs(self, prompt_index: int) -> list[dict[str, Any] | None] | None:
        return None if self.call.prompt_logprobs is None else prompt_shape(self._entries_of_prompt(prompt_index))

    def _logprobs(self, choice: Choice, prompt: list[int] | None) -> dict[str, Any] | None:
        """Those of the choice's new tokens; of the prompt's too, where it is shown with them."""
        call = self.call
        if call.logprobs is None:
            return None
        entries = choice.entries
        if call.echo and prompt is not None:
            before = self._entries_of_prompt(choice.prompt_index)
            entries = before if self._echo_only else [*before, *entries]
        offset = self._offsets.get(choice.index, 0)
        shown, self._offsets[choice.index] = completion_shape(entries, offset, as_ids=call.tokens_as_ids)
        return shown


def completion_choice(
    index: int, text: str, logprobs: Any, ended: tuple[str | None, Any], **fields: Any
) -> dict[str, Any]:
    """A choice of an answer that is not streamed; ``ended``: reason and stop reason."""
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": ended[0],
        "stop_reason": ended[1],
        "token_ids": None,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "routed_experts": None,
    }
    return choice | fields


def completion_answer(choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """An answer that is not streamed; ``fields``: those that are not null."""
    answer: dict[str, Any] = {
        "id": None,
        "object": "text_completion",
        "created": None,
        "model": None,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }
    return answer | fields


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
