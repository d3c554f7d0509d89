"""Replacing the model's name in a request body without touching any other byte of it."""

import re

import msgspec

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")


def replace_model(body: bytes, model: str) -> bytes:
    """``body``, a JSON object, with the value of its top-level ``model`` replaced; unchanged where it has none."""
    value = msgspec.json.encode(model)
    pieces: list[bytes] = []
    copied = 0
    depth = 0
    position = 0
    while (token := _TOKEN.search(body, position)) is not None:
        position = token.end()
        first = body[token.start()]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1:
            colon = _COLON.match(body, position)
            if colon is None:
                continue
            position = colon.end()
            if _is_model(token[0]):
                found = _TOKEN.match(body, position)
                if found is not None and body[position] == 0x22:
                    pieces += (body[copied:position], value)
                    copied = position = found.end()
            elif (string := _TOKEN.match(body, position)) is not None and body[position] == 0x22:
                position = string.end()
    return b"".join((*pieces, body[copied:])) if pieces else body


def _is_model(key: bytes) -> bool:
    if b"\\" not in key:
        return key == b'"model"'
    try:
        return bool(msgspec.json.decode(key) == "model")
    except msgspec.DecodeError:
        return False
