"""Canonical prompt bytes: what a chat renders to, near enough, without the engine's template or tokenizer.

Tools first, then the messages in order: role and content. Two bodies with the same meaning give the same bytes
(white space, key order, escapes and text given as one part or several do not matter), and a conversation that goes
on gives bytes that begin with those of its last turn. Images and other large parts are represented by a digest.
"""

from typing import Any

import msgspec
from xxhash import xxh3_128_hexdigest

_NONE = msgspec.Raw(b"")
_INLINE_BYTES = 256
"""Media stand as they are up to this size, and as a digest above. Everything that an engine tokenises stays whole."""
_MESSAGE, _ROLE, _PART = b"\x1e", b"\x1f", b"\x1d"


class _Part(msgspec.Struct):
    text: Any = None
    thinking: Any = None
    image_url: msgspec.Raw = _NONE
    input_audio: msgspec.Raw = _NONE
    audio_url: msgspec.Raw = _NONE
    video_url: msgspec.Raw = _NONE
    image: msgspec.Raw = _NONE
    file: msgspec.Raw = _NONE
    source: msgspec.Raw = _NONE
    content: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE


class Message(msgspec.Struct):
    """A message of a chat, as far as it matters here."""

    role: str = ""
    content: str | list[_Part] | None = None
    tool_calls: msgspec.Raw = _NONE
    type: Any = None
    output: msgspec.Raw = _NONE
    arguments: msgspec.Raw = _NONE
    name: Any = None


_decode_messages = msgspec.json.Decoder(list[Message]).decode
_decode_parts = msgspec.json.Decoder(list[_Part]).decode
_decode_text = msgspec.json.Decoder(str).decode


def text_prompt(text: str) -> bytes:
    """UTF-8 of a prompt given as text."""
    return text.encode("utf-8", "surrogatepass")


def raw_prompt(*parts: msgspec.Raw) -> bytes:
    """JSON of the parts as they came: for requests whose prefix is hardly ever shared."""
    return _PART.join(bytes(part) for part in parts if bytes(part))


def chat_prompt(tools: msgspec.Raw, messages: msgspec.Raw | list[Message], system: msgspec.Raw = _NONE) -> bytes:
    """Tools, then the system text where it stands apart (Anthropic), then the messages, decoded or not."""
    out: list[bytes] = []
    if tools is not _NONE:
        _add_raw(out, tools)
    if system is not _NONE and bytes(system):
        out.append(_MESSAGE + b"system" + _ROLE)
        _add_content(out, bytes(system))
    if isinstance(messages, list):
        _add_messages(out, messages)
    elif data := bytes(messages):
        try:
            _add_messages(out, _decode_messages(data))
        except (msgspec.DecodeError, UnicodeError):
            out.append(data)
    return b"".join(out)


def items_prompt(tools: msgspec.Raw, instructions: msgspec.Raw, items: msgspec.Raw) -> bytes:
    """A prompt of the responses endpoint: tools, instructions, then ``input`` (a text or a list of items)."""
    data = bytes(items)
    if data[:1] != b'"':
        return chat_prompt(tools, items, instructions)
    out: list[bytes] = []
    _add_raw(out, tools)
    if bytes(instructions):
        out.append(_MESSAGE + b"system" + _ROLE)
        _add_content(out, bytes(instructions))
    out.append(_MESSAGE + b"user" + _ROLE)
    _add_content(out, data)
    return b"".join(out)


_ROLES = {role: _MESSAGE + role.encode() + _ROLE for role in ("system", "user", "assistant", "tool")}


def _add_messages(out: list[bytes], messages: list[Message]) -> None:
    for message in messages:
        out.append(_ROLES.get(message.role) or _MESSAGE + text_prompt(message.role) + _ROLE)
        content = message.content
        if isinstance(content, str):
            out.append(text_prompt(content))
        elif content is not None:
            _add_parts(out, content)
        if message.tool_calls is not _NONE:
            _add_raw(out, message.tool_calls)
        if message.type is not None and message.type != "message":
            _add_raw(out, message.arguments)
            _add_raw(out, message.output)
            if isinstance(message.name, str):
                out.append(text_prompt(message.name))


def _add_content(out: list[bytes], data: bytes) -> None:
    """A text or a list of parts, as JSON."""
    try:
        if data[:1] == b'"':
            out.append(text_prompt(_decode_text(data)))
        else:
            _add_parts(out, _decode_parts(data))
    except (msgspec.DecodeError, UnicodeError):
        out.append(data)


def _add_parts(out: list[bytes], parts: list[_Part]) -> None:
    for part in parts:
        if isinstance(part.text, str):
            out.append(text_prompt(part.text))
            continue
        if isinstance(part.thinking, str):
            out.append(text_prompt(part.thinking))
        for media in (
            part.image_url,
            part.input_audio,
            part.audio_url,
            part.video_url,
            part.image,
            part.file,
            part.source,
        ):
            data = bytes(media)
            _add_bytes(out, data if len(data) <= _INLINE_BYTES else xxh3_128_hexdigest(data).encode())
        _add_raw(out, part.content)
        _add_raw(out, part.input)


def _add_raw(out: list[bytes], raw: msgspec.Raw) -> None:
    _add_bytes(out, bytes(raw))


def _add_bytes(out: list[bytes], data: bytes) -> None:
    if data and data != b"null" and data != b"[]":
        out.append(_PART + data + _PART)
