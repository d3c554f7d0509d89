"""Tool calls in the text of a model, as vLLM's ``hermes`` parser reads them: JSON objects in ``<tool_call>`` tags."""

import json
import re
import secrets
from typing import Any

import msgspec

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_REGION = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*("(?:[^"\\]|\\.)*")')
_ARGUMENTS = re.compile(r'"arguments"\s*:\s*')


class ToolCall(msgspec.Struct, frozen=True):
    """A call; of one that is not complete, what there is."""

    name: str | None
    arguments: str


def call_frame(name: str) -> tuple[str, str]:
    """What a model that calls a tool writes before and after the arguments."""
    return f'{_OPEN}\n{{"name": {json.dumps(name)}, "arguments": ', f"}}\n{_CLOSE}"


def parse(text: str) -> tuple[str | None, list[ToolCall]]:
    """(content, calls) of a whole text. A call that cannot be read makes all of it content."""
    if _OPEN not in text:
        return text, []
    calls = []
    try:
        for closed, rest in _REGION.findall(text):
            call = json.loads(closed or rest)
            calls.append(ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False)))
    except (ValueError, KeyError, TypeError):
        return text, []
    return text[: text.find(_OPEN)] or None, calls


def new_call_id() -> str:
    """An id as vLLM gives to the calls of an answer."""
    return f"chatcmpl-tool-{secrets.token_hex(8)}"


class HermesStream:
    """The deltas of a text that comes piece by piece."""

    __slots__ = ("_content", "_sent", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._content = 0
        self._sent: list[ToolCall] = []

    def take(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """(content, tool-call deltas) that ``text`` adds; the markup itself, or what may become some, shows nothing."""
        self._text += text
        end = _content_end(self._text)
        content = self._text[self._content : end] or None
        self._content = max(self._content, end)
        deltas: list[dict[str, Any]] = []
        for index, call in enumerate(_partial_calls(self._text)):
            if index == len(self._sent):
                self._sent.append(ToolCall(None, ""))
            deltas += self._deltas(index, call)
        return content, deltas

    def _deltas(self, index: int, call: ToolCall) -> list[dict[str, Any]]:
        sent = self._sent[index]
        deltas: list[dict[str, Any]] = []
        if call.name is not None and sent.name is None:
            function = {"name": call.name}
            deltas.append({"id": new_call_id(), "type": "function", "index": index, "function": function})
        if len(call.arguments) > len(sent.arguments):
            piece = call.arguments[len(sent.arguments) :]
            deltas.append({"index": index, "function": {"arguments": piece}})
        self._sent[index] = call
        return deltas


def _content_end(text: str) -> int:
    found = text.find(_OPEN)
    if found >= 0:
        return found
    for size in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if text.endswith(_OPEN[:size]):
            return len(text) - size
    return len(text)


def _partial_calls(text: str) -> list[ToolCall]:
    calls = []
    for region in text.split(_OPEN)[1:]:
        name = _NAME.search(region)
        if name is None:
            break
        arguments = _ARGUMENTS.search(region, name.end())
        shown = region[arguments.end() : _value_end(region, arguments.end())] if arguments else ""
        calls.append(ToolCall(json.loads(name[1]), shown))
    return calls


def _value_end(text: str, start: int) -> int:
    """The end of the JSON value that begins at ``start``, or of the text if it goes on."""
    depth = 0
    quoted = escaped = False
    for place in range(start, len(text)):
        char = text[place]
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
            if not quoted and not depth:
                return place + 1
        elif char == '"':
            quoted = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            if not depth:
                return place
            depth -= 1
            if not depth:
                return place + 1
        elif not depth and (char in ",<" or char.isspace()):
            return place
    return len(text)
