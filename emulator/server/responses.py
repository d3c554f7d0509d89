"""``/v1/responses``: text in, text out, streamed or not; nothing is stored, no tools."""

from typing import Any

from emulator.server.errors import validation_error
from emulator.server.generation import Call, Choice, Generation, dumps, new_id
from emulator.server.validation import CHAT_FIELDS, Body, convert_fields, finding

_FIELDS = {"max_output_tokens": "int", "instructions": "str"}
_PASSED = ("model", "temperature", "top_p", "stream", "priority", "cache_salt")


def parse_responses(body: Body) -> Body:
    """The chat body that a responses body stands for. Raises ApiError."""
    findings = convert_fields(body, {**CHAT_FIELDS, **_FIELDS})
    given = body.get("input")
    if given is None:
        findings.append(finding("missing", "body.input", body))
    elif not isinstance(given, str | list):
        findings += [finding("string_type", "body.input", given), finding("list_type", "body.input", given)]
    if findings:
        raise validation_error(findings)
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given or [])
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    converted = {name: body[name] for name in _PASSED if name in body}
    return {**converted, "messages": messages, "max_tokens": body.get("max_output_tokens")}


class ResponsesGeneration(Generation):
    """A running ``/v1/responses`` call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._message_id = f"msg_{new_id()}"
        self._sequence = 0
        self._whole = ""

    def opened_stream(self) -> None:
        """The opening events come before any token."""
        for name in ("response.created", "response.in_progress"):
            self._event(name, response=self._response("in_progress"))

    def send_delta(self, choice: Choice, delta: str, tokens: list[int]) -> None:
        """A text delta, after the item's opening events."""
        if not choice.opened:
            choice.opened = True
            item: dict[str, Any] = {
                "id": self._message_id,
                "content": [],
                "role": "assistant",
                "status": "in_progress",
                "type": "message",
                "phase": None,
            }
            self._event("response.output_item.added", item=item, output_index=0)
            part: dict[str, Any] = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
            self._event("response.content_part.added", **self._place(), part=part)
        if delta:
            self._whole += delta
            self._event("response.output_text.delta", **self._place(), delta=delta, logprobs=[])

    def finish_stream(self) -> None:
        """The closing events."""
        text = self._whole
        self._event("response.output_text.done", **self._place(), logprobs=[], text=text)
        self._event("response.content_part.done", **self._place(), part=self._part(text))
        self._event("response.output_item.done", item=self._item(text), output_index=0)
        self._event("response.completed", response=self._response(self._status(), text))
        self.exchange.end_stream()

    def whole_body(self) -> bytes:
        """The response object."""
        return dumps(self._response(self._status(), self.choices[0].text))

    def _place(self) -> dict[str, Any]:
        return {"content_index": 0, "item_id": self._message_id, "output_index": 0}

    def _event(self, name: str, **fields: Any) -> None:
        fields["sequence_number"] = self._sequence
        fields["type"] = name
        self._sequence += 1
        data = dumps(dict(sorted(fields.items())))
        self.exchange.write(self.exchange.frame(b"event: %s\ndata: %s\n\n" % (name.encode(), data)))

    def _status(self) -> str:
        return "incomplete" if self.choices[0].finish_reason == "length" else "completed"

    def _part(self, text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}

    def _item(self, text: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "content": [self._part(text)],
            "role": "assistant",
            "status": "completed",
            "type": "message",
            "phase": None,
        }

    def _response(self, status: str, text: str | None = None) -> dict[str, Any]:
        call: Call = self.call
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.response_id,
            "created_at": self.created_s,
            "incomplete_details": reason,
            "instructions": None,
            "metadata": None,
            "model": self.model,
            "object": "response",
            "output": [] if text is None else [self._item(text)],
            "parallel_tool_calls": True,
            "temperature": call.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": call.top_p,
            "background": False,
            "max_output_tokens": call.max_tokens[0],
            "max_tool_calls": None,
            "previous_response_id": None,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": None,
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": None if text is None else self._usage(),
            "user": None,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, output = self.prompt_tokens(), self.output_tokens()
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": self.cached_tokens(),
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": output,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": prompt + output,
        }
