"""The emulator's tokenizer, which routers need too where they are to know what its engines cache.

Vocabulary (``VOCABULARY_SIZE`` ids, no download): ids 0..255 are single bytes; then the words of one to three
lower-case letters in arithmetic order (a, b, ..., z, aa, ab, ..., zzz), first without and then with a leading space;
then the five special ids of the chat template. Text is split greedily from the left by `` ?[a-z]{1,3}`` or else byte
by byte, hence ``decode(encode(text)) == text`` for every text that is valid Unicode.
"""

import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PIECE = re.compile(rb" ?[a-z]{1,3}|[\x00-\xff]")


def _words() -> list[bytes]:
    one = list(_LETTERS)
    two = [a + b for a in one for b in one]
    three = [a + b for a in two for b in one]
    plain = [word.encode() for word in (*one, *two, *three)]
    return plain + [b" " + word for word in plain]


_SPECIAL: tuple[bytes, ...] = (b"<|begin|>", b"<|role|>", b"<|content|>", b"<|end|>", b"<|eos|>")
_PIECES: list[bytes] = [bytes([value]) for value in range(256)] + _words() + list(_SPECIAL)
_IDS: dict[bytes, int] = {piece: index for index, piece in enumerate(_PIECES[: -len(_SPECIAL)])}

VOCABULARY_SIZE: int = len(_PIECES)
BEGIN_ID, ROLE_ID, CONTENT_ID, END_ID, EOS_ID = range(VOCABULARY_SIZE - len(_SPECIAL), VOCABULARY_SIZE)
FIRST_OUTPUT_ID: int = _IDS[b" aaa"]
"""Id of " aaa": the output ids are the ``26**3`` ids from here on."""


def encode(text: str) -> list[int]:
    """Token ids of ``text``; a lone surrogate becomes "?"."""
    ids = _IDS
    return [ids[piece] for piece in _PIECE.findall(text.encode("utf-8", "replace"))]


def decode(ids: Iterable[int]) -> str:
    """Text of ``ids``; invalid UTF-8 becomes U+FFFD. Raises IndexError for an id outside the vocabulary."""
    return decode_bytes(ids).decode("utf-8", "replace")


def decode_bytes(ids: Iterable[int]) -> bytes:
    """The bytes of ``ids``. Raises IndexError for an id outside the vocabulary."""
    return b"".join(map(_PIECES.__getitem__, ids))


def token_bytes(token_id: int) -> bytes:
    """The bytes of one id. Raises IndexError for an id outside the vocabulary."""
    return _PIECES[token_id]


def pack_ids(ids: Sequence[int]) -> bytes:
    """``ids`` as little-endian uint32. Raises OverflowError for an id outside [0, 2**32)."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def chat_prompt_ids(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = True
) -> list[int]:
    """Prompt ids of a chat under the built-in template.

    Each message is ``<|role|> role <|content|> content <|end|>``; tools come first as one turn; text parts of a
    content list are joined, other parts and tool calls enter as canonical JSON. The ids of a conversation are a prefix
    of the ids of its continuation, and an assistant message that holds an emulated answer encodes to exactly the ids
    that were generated.
    """
    ids = [BEGIN_ID]
    if tools:
        ids += _turn("tools", _canonical(list(tools)))
    for message in messages:
        text = _content_text(message.get("content"))
        calls = message.get("tool_calls")
        ids += _turn(str(message.get("role", "")), text + _canonical(calls) if calls else text)
    if add_generation_prompt:
        ids += [ROLE_ID, *encode("assistant"), CONTENT_ID]
    return ids


def _turn(role: str, text: str) -> list[int]:
    return [ROLE_ID, *encode(role), CONTENT_ID, *encode(text), END_ID]


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return _canonical(content)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        texts.append(text if isinstance(text, str) else _canonical(part))
    return "".join(texts)


def _canonical(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()
