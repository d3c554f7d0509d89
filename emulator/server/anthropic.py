"""``/v1/messages``: the text of a message and its stream; no tools, no thinking."""

from typing import Any

from emulator.server.errors import validation_error
from emulator.server.generation import Choice, Generation, dumps
from emulator.server.validation import CHAT_FIELDS, Body, convert_fields, finding

_PASSED = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "tools"),
    *("priority", "cache_salt", "ignore_eos"),
)
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
    return {**converted, "messages": messages, "stop": body.get("stop_sequences")}


class MessagesGeneration(Generation):
    """A running ``/v1/messages`` call."""

    def _usage(self, choice: Choice) -> dict[str, int]:
        return {
            "input_tokens": self.prompt_tokens(),
            "output_tokens": choice.output_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.cached_tokens(),
        }

    def _stop(self, choice: Choice) -> tuple[str | None, str | None]:
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
            self._event("content_block_start", content_block={"type": "text", "text": ""}, index=0)
        if delta:
            self._event("content_block_delta", delta={"type": "text_delta", "text": delta}, index=0)

    def finish_stream(self) -> None:
        """The closing events."""
        choice = self.choices[0]
        reason, sequence = self._stop(choice)
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
        reason, sequence = self._stop(choice)
        message: dict[str, Any] = {
            "id": self.response_id,
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": choice.text}],
            "model": self.model,
            "stop_reason": reason,
        }
        if sequence is not None:
            message["stop_sequence"] = sequence
        message["usage"] = self._usage(choice)
        return dumps(message)
