"""``/v1/messages``: text and demanded tool calls of a message and its stream; no thinking."""

from typing import Any

import msgspec

from emulator.server.errors import validation_error
from emulator.server.generation import Choice, Generation, dumps
from emulator.server.hermes import HermesStream, new_call_id
from emulator.server.hermes import parse as parse_calls
from emulator.server.validation import CHAT_FIELDS, Body, convert_fields, finding

_PASSED = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "stream"),
    *("priority", "cache_salt", "ignore_eos"),
)
_CHOICES = {"any": "required", "none": "none"}
_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


def parse_messages(body: Body) -> Body:
    """The chat body that a messages body stands for. Raises ApiError."""
    findings = convert_fields(body, CHAT_FIELDS)
    for name in ("messages", "max_tokens"):
        if body.get(name) is None:
            findings.append(finding("missing", f"body.{name}", body))
    if not isinstance(body.get("messages"), list | None):
        findings.append(finding("list_type", "body.messages", body["messages"]))
    if findings:
        raise validation_error(findings)
    messages = list(body["messages"])
    if body.get("system"):
        messages.insert(0, {"role": "system", "content": body["system"]})
    converted = {name: body[name] for name in _PASSED if name in body}
    return {**converted, **_tool_fields(body), "messages": messages, "stop": body.get("stop_sequences")}


def _tool_fields(body: Body) -> Body:
    """``tools`` and ``tool_choice`` as a chat has them."""
    given, choice = body.get("tools"), body.get("tool_choice")
    if not isinstance(given, list) or not given:
        return {}
    tools = []
    for tool in given:
        known = tool if isinstance(tool, dict) else {}
        function = {"name": known.get("name"), "description": known.get("description")}
        tools.append({"type": "function", "function": {**function, "parameters": known.get("input_schema")}})
    kind = choice.get("type", "auto") if isinstance(choice, dict) else "auto"
    if kind == "tool" and isinstance(choice, dict):
        return {"tools": tools, "tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    return {"tools": tools, "tool_choice": _CHOICES.get(kind, "auto")}


class MessagesGeneration(Generation):
    """A running ``/v1/messages`` call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parser = HermesStream()
        self._calls_tool = False
        self._block_open = False

    def _usage(self, choice: Choice) -> dict[str, int]:
        return {
            "input_tokens": self.prompt_tokens(),
            "output_tokens": choice.output_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.cached_tokens(),
        }

    def _stop(self, choice: Choice) -> tuple[str | None, str | None]:
        if self._calls_tool:
            return "tool_use", None
        if isinstance(choice.stop_reason, str):
            return "stop_sequence", choice.stop_reason
        return _STOP_REASONS.get(choice.finish_reason or "", choice.finish_reason), None

    def _event(self, name: str, **fields: Any) -> None:
        data = dumps({"type": name, **fields})
        self.exchange.write(self.exchange.frame(b"event: %s\ndata: %s\n\n" % (name.encode(), data)))

    def send_delta(self, choice: Choice, delta: str, tokens: list[int]) -> None:
        """Text as a content block delta, after the opening events."""
        if not choice.opened:
            choice.opened = True
            message: dict[str, Any] = {
                "id": self.response_id,
                "type": "message",
                "role": "assistant",
                "content": [],
                "model": self.model,
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": self.prompt_tokens(), "output_tokens": 0},
            }
            self._event("message_start", message=message)
        if self.call.tool is None:
            self._send_text(delta, first=not self._block_open)
            return
        text, calls = self._parser.take(delta)
        if text:
            self._send_text(text, first=not self._block_open)
        for call in calls:
            if "id" in call:
                self._calls_tool = self._block_open = True
                block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                self._event("content_block_start", content_block=block, index=0)
            else:
                piece = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
                self._event("content_block_delta", delta=piece, index=0)

    def _send_text(self, text: str, *, first: bool) -> None:
        if first:
            self._block_open = True
            self._event("content_block_start", content_block={"type": "text", "text": ""}, index=0)
        if text:
            self._event("content_block_delta", delta={"type": "text_delta", "text": text}, index=0)

    def finish_stream(self) -> None:
        """The closing events."""
        choice = self.choices[0]
        reason, sequence = self._stop(choice)
        if self._block_open:
            self._event("content_block_stop", index=0)
        self._event(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": sequence},
            usage=self._usage(choice),
        )
        self._event("message_stop")
        self.exchange.end_stream()

    def whole_body(self) -> bytes:
        """The message."""
        choice = self.choices[0]
        content = self._content(choice.text)
        reason, sequence = self._stop(choice)
        message: dict[str, Any] = {
            "id": self.response_id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": reason,
        }
        if sequence is not None:
            message["stop_sequence"] = sequence
        message["usage"] = self._usage(choice)
        return dumps(message)

    def _content(self, text: str) -> list[dict[str, Any]]:
        if self.call.tool is None:
            return [{"type": "text", "text": text}]
        spoken, calls = parse_calls(text)
        self._calls_tool = bool(calls)
        blocks: list[dict[str, Any]] = [{"type": "text", "text": spoken}] if spoken else []
        for call in calls:
            arguments = msgspec.json.decode(call.arguments)
            blocks.append({"type": "tool_use", "id": new_call_id(), "name": call.name, "input": arguments})
        return blocks
