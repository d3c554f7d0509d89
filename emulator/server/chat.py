"""``/v1/chat/completions``."""

from typing import Any

from emulator.server.completions import whole_usage
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
from emulator.server.hermes import HermesStream, new_call_id
from emulator.server.hermes import parse as parse_calls
from emulator.server.http import Exchange
from emulator.server.logprobs import chat_shape, prompt_entries, prompt_shape
from emulator.server.sampling import build_call
from emulator.server.settings import EngineSettings
from emulator.server.tools import check_tool_choice, finish_reason, plan_tool
from emulator.server.validation import (
    CHAT_FIELDS,
    ONE_CONSTRAINT,
    Body,
    check_early,
    check_logprob_fields,
    convert_fields,
    finding,
    output_limit,
    stream_options,
)
from emulator.tokens import END_ID, chat_prompt_ids, token_bytes

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})


def validate(body: Body) -> None:
    """The checks before the model is looked up. Raises ApiError."""
    check_logprob_fields(body, "top_logprobs")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise parameter_error("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    findings = check_early(body, one_kind=ApiError(ONE_CONSTRAINT))
    findings += convert_fields(body, CHAT_FIELDS)
    messages = body.get("messages")
    if messages is None:
        findings.append(finding("missing", "body.messages", body))
    elif not isinstance(messages, list):
        findings.append(finding("list_type", "body.messages", messages))
    if findings:
        raise validation_error(findings)
    stream_options(body)
    check_tool_choice(body)


def parse(body: Body, settings: EngineSettings, priority: int) -> Call:
    """The call of a validated body. Raises ApiError."""
    prompt = prompt_ids(body, settings.model)
    requested = body.get("max_completion_tokens")
    if requested is None:
        requested = body.get("max_tokens")
    limit = output_limit(requested, len(prompt), settings.max_model_len, tokenized_here=True)
    best = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
    echo, prompt_best = bool(body.get("echo")), body.get("prompt_logprobs")
    return build_call(
        body,
        [prompt],
        [limit],
        natural_end=requested is None,
        priority=priority,
        best=best,
        prompt_best=(body.get("top_logprobs") or 0) if echo and prompt_best is None else prompt_best,
        echo_text=_echo_text(body) if echo else "",
        tool=plan_tool(body, prompt, settings),
    )


def _echo_text(body: Body) -> str:
    """What echo puts before the answer: the content of a last message by the assistant."""
    last = body["messages"][-1]
    if body.get("add_generation_prompt", True) is not False and last.get("role") != "assistant":
        return ""
    content = last.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""


def prompt_ids(body: Body, model: str) -> list[int]:
    """The prompt of a chat body under the built-in template. Raises ApiError."""
    messages = body["messages"]
    if not messages:
        raise ApiError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise validation_error([finding("list_type", f"body.messages.{index}", message)])
        content = message.get("content")
        if isinstance(content, list):
            _check_parts(content, model)
    generate = body.get("add_generation_prompt", True) is not False
    continues = bool(body.get("continue_final_message"))
    if continues and generate:
        raise ApiError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    tools = body.get("tools")
    ids = chat_prompt_ids(messages, tools if isinstance(tools, list) else None, add_generation_prompt=generate)
    return ids[:-1] if continues and ids[-1] == END_ID else ids


def _check_parts(parts: list[Any], model: str) -> None:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in _TEXT_PARTS:
            raise ApiError(f"{model} is not a multimodal model")


class ChatGeneration(Generation):
    """A running ``/v1/chat/completions`` call."""

    def __init__(self, exchange: Exchange, *args: Any, **kwargs: Any) -> None:
        super().__init__(exchange, *args, **kwargs)
        call = self.call
        self.fast = call.stream and call.plain
        self._parsers: dict[int, HermesStream] = {}
        self._prefix = (
            f'{{"id":{dumps(self.response_id).decode()},"object":"chat.completion.chunk","created":{self.created_s},'
            f'"model":{dumps(self.model).decode()},"choices":[{{"index":'
        ).encode()
        self._heads: list[bytes] = []
        self._tail = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        self._roles_sent = False

    def opened_stream(self) -> None:
        """Prepare the frames: every output token is four plain characters, so a frame's size is known."""
        if not self.fast:
            return
        for choice in self.choices:
            head = b"data: " + self._prefix + b'%d,"delta":{"content":"' % choice.index
            size = len(head) + 4 + len(self._tail)
            self._heads.append(b"%x\r\n%s" % (size, head) if self.exchange.chunked else head)
        if self.exchange.chunked:
            self._tail += b"\r\n"

    def write_fast(self, choice: Choice, token_id: int) -> None:
        """One prepared frame."""
        self.exchange.write(self._heads[choice.index] + token_bytes(token_id) + self._tail)

    def send_delta(self, choice: Choice, delta: str, tokens: list[int]) -> None:
        """The general form of an event, after the role events of all choices."""
        call = self.call
        if not self._roles_sent:
            self._send_roles()
        choice.opened = True
        finished = choice.finish_reason is not None
        shown = self._delta(choice, delta)
        if not shown and not finished and not call.return_token_ids and call.logprobs is None:
            return
        choice_json: dict[str, Any] = {
            "delta": shown,
            "logprobs": self._logprobs(choice),
            "finish_reason": finish_reason(call.tool, choice.finish_reason),
        }
        if finished:
            choice_json["stop_reason"] = choice.stop_reason
        choice_json["token_ids"] = tokens if call.return_token_ids else None
        event = self._prefix + b"%d," % choice.index + dumps(choice_json)[1:] + b"]"
        event += self._continuous(choice)
        if finished and not call.include_usage:
            event += b',"system_fingerprint":"%s"' % FINGERPRINT.encode()
        self.send_event(event + b"}")

    def _delta(self, choice: Choice, text: str) -> dict[str, Any]:
        if self.call.tool is None:
            return {"content": text} if text else {}
        content, calls = self._parsers.setdefault(choice.index, HermesStream()).take(text)
        if calls:
            return {"content": content, "tool_calls": calls}
        return {"content": content} if content else {}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        best = self.call.logprobs
        return None if best is None else chat_shape(choice.entries, best, as_ids=self.call.tokens_as_ids)

    def _send_roles(self) -> None:
        self._roles_sent = True
        prompt = dumps(self.call.prompts[0]) if self.call.return_token_ids else b"null"
        for choice in self.choices:
            event = self._prefix + b'%d,"delta":{"role":"assistant","content":""},' % choice.index
            event += b'"logprobs":null,"finish_reason":null}]' + self._continuous(choice, opening=True)
            self.send_event(event + b',"prompt_token_ids":%s,"prompt_text":null}' % prompt)
        if self.call.echo_text:
            content = dumps(self.call.echo_text)
            for choice in self.choices:
                event = self._prefix + b'%d,"delta":{"content":%s},"logprobs":null,' % (choice.index, content)
                self.send_event(event + b'"finish_reason":null}]' + self._continuous(choice, opening=True) + b"}")

    def _continuous(self, choice: Choice, *, opening: bool = False) -> bytes:
        if not self.call.continuous_usage:
            return b""
        tokens = 0 if opening else choice.output_tokens
        usage: dict[str, Any] = usage_numbers(len(self.call.prompts[0]), tokens)
        usage["completion_tokens_details"] = None
        return b',"usage":' + dumps(usage)

    def finish_stream(self) -> None:
        """The usage event where it was asked for, and the end."""
        frames = b""
        if self.call.include_usage:
            usage: dict[str, Any] = usage_numbers(self.prompt_tokens(), self.output_tokens())
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens(), "created_cache_tokens": 0}
            event = self._prefix.rpartition(b"[")[0] + b'[],"usage":' + dumps(usage)
            event += b',"system_fingerprint":"%s"}' % FINGERPRINT.encode()
            frames = self.exchange.frame(b"data: " + event + b"\n\n")
        self.exchange.end_stream(frames + self.exchange.frame(DONE_EVENT))

    def whole_body(self) -> bytes:
        """The body of an answer that is not streamed."""
        call = self.call
        choices = [
            chat_choice(
                choice.index,
                self._message(choice),
                self._logprobs(choice),
                finish_reason(call.tool, choice.finish_reason),
                choice.stop_reason,
                choice.token_ids if call.return_token_ids else None,
            )
            for choice in self.choices
        ]
        answer = chat_answer(
            choices,
            id=self.response_id,
            created=self.created_s,
            model=self.model,
            system_fingerprint=FINGERPRINT,
            usage=whole_usage(self, created_cache_tokens=0),
            prompt_logprobs=self._prompt_logprobs(),
            prompt_token_ids=call.prompts[0] if call.return_token_ids else None,
            kv_transfer_params=self.kv_transfer_params(),
        )
        return dumps(answer)

    def _message(self, choice: Choice) -> dict[str, Any]:
        if self.call.tool is None:
            return message(self.call.echo_text + choice.text)
        content, calls = parse_calls(choice.text)
        shown = [
            {"id": new_call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
        return message(self.call.echo_text + (content or ""), shown)

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        best = self.call.prompt_logprobs
        return None if best is None else prompt_shape(prompt_entries(self.call.prompts[0], best))


def message(content: str | None, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """An assistant's message."""
    shown: dict[str, Any] = {
        "role": "assistant",
        "content": content,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    if calls:
        shown["tool_calls"] = calls
    shown["reasoning"] = None
    return shown


def chat_choice(
    index: int, shown: dict[str, Any], logprobs: Any, reason: str | None, stop_reason: Any, ids: list[int] | None
) -> dict[str, Any]:
    """A choice of an answer that is not streamed."""
    return {
        "index": index,
        "message": shown,
        "logprobs": logprobs,
        "finish_reason": reason,
        "stop_reason": stop_reason,
        "token_ids": ids,
        "routed_experts": None,
    }


def chat_answer(choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """An answer that is not streamed; ``fields``: those that are not null."""
    answer: dict[str, Any] = {
        "id": None,
        "object": "chat.completion",
        "created": None,
        "model": None,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": None,
        "usage": None,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }
    return answer | fields
