"""The emulator's tokenizer and its provable output.

Vocabulary (``VOCABULARY_SIZE`` ids, no download): ids 0..255 are single bytes; then the words of one to three
lower-case letters in arithmetic order (a, b, ..., z, aa, ab, ..., zzz), first without and then with a leading space;
then the five special ids of the chat template. Text is split greedily from the left by `` ?[a-z]{1,3}`` or else byte
by byte, hence ``decode(encode(text)) == text`` for every text that is valid Unicode.

Output is a hash chain: output token k is the word " xyz" whose number is
``xxh3_64(all ids so far, prompt and outputs, as little-endian uint32) % 26**3``. Each token depends on every token
before it, so a lost, doubled, swapped or wrong token makes every later one wrong, and an engine that is given prompt
and first outputs as its prompt goes on with exactly the tokens that the first engine would have produced.
"""

import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import xxhash

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PIECE = re.compile(rb" ?[a-z]{1,3}|[\x00-\xff]")
_OUTPUT_CHARS = 4
OUTPUT_WORDS: int = 26**3
"""How many different words the chain has."""
_MEAN_NATURAL_LENGTH = 200


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


class TokenChain:
    """The output tokens of one prompt, one at a time: O(1) work and memory per token.

    ``choice``: which of the ``n`` completions of the prompt; each has a chain of its own, the hash of the same ids
    under that seed. Choice 0 is the plain chain, hence the one that a continuation follows.
    """

    __slots__ = ("_hasher", "produced")

    def __init__(self, prompt_ids: Sequence[int], choice: int = 0) -> None:
        self._hasher = xxhash.xxh3_64(pack_ids(prompt_ids), seed=choice)
        self.produced = 0

    def peek(self) -> int:
        """The id that ``next`` will return."""
        return FIRST_OUTPUT_ID + self._hasher.intdigest() % OUTPUT_WORDS

    def next(self) -> int:
        """Produce the next id."""
        token = FIRST_OUTPUT_ID + self._hasher.intdigest() % OUTPUT_WORDS
        self._hasher.update(token.to_bytes(4, "little"))
        self.produced += 1
        return token

    def ends_here(self) -> bool:
        """Whether a request without a length limit ends at this point of the chain (about every 200th point)."""
        return self._hasher.intdigest() // OUTPUT_WORDS % _MEAN_NATURAL_LENGTH == 0


class ChainViolation(Exception):
    """The output left the chain: token ``position`` (0-based, counted in output tokens) is not the one expected."""

    def __init__(self, position: int, expected: str, got: str) -> None:
        super().__init__(f"output token {position}: expected {expected!r}, got {got!r}")
        self.position = position
        self.expected = expected
        self.got = got


class ChainChecker:
    """Checks the output of one request against its chain.

    Feed it text deltas, or id lists, in order. The first wrong token is kept in ``violation``; from there on tokens are
    counted in ``delivered`` but no longer in ``verified``. Text is counted in units of four characters. ``choice`` is
    the index of the choice among the ``n`` of its prompt.
    """

    __slots__ = ("_chain", "_rest", "delivered", "verified", "violation")

    def __init__(self, prompt_ids: Sequence[int], choice: int = 0) -> None:
        self._chain = TokenChain(prompt_ids, choice)
        self._rest = ""
        self.delivered = 0
        self.verified = 0
        self.violation: ChainViolation | None = None

    def feed(self, text: str) -> int:
        """Check a text delta, which need not end at a token's end. Returns the number of tokens newly verified."""
        text = self._rest + text if self._rest else text
        whole = len(text) - len(text) % _OUTPUT_CHARS
        self._rest = text[whole:]
        before = self.verified
        for start in range(0, whole, _OUTPUT_CHARS):
            piece = text[start : start + _OUTPUT_CHARS]
            self.delivered += 1
            if self.violation is None:
                expected = _PIECES[self._chain.peek()].decode()
                self._judge(piece == expected, expected, piece)
        return self.verified - before

    def feed_ids(self, ids: Iterable[int]) -> int:
        """Check output ids; a natural end (``EOS_ID``) is not counted. Returns the number of tokens newly verified."""
        before = self.verified
        for token in ids:
            if token == EOS_ID and self.violation is None and self._chain.ends_here():
                continue
            self.delivered += 1
            if self.violation is None:
                expected = self._chain.peek()
                self._judge(token == expected, str(expected), str(token))
        return self.verified - before

    def finish(self, expected_tokens: int | None = None) -> None:
        """End of the output. Raises ChainViolation if a token was wrong or cut short, or the count is wrong."""
        if self.violation is None and self._rest:
            self.violation = ChainViolation(self.verified, _PIECES[self._chain.peek()].decode(), self._rest)
        if self.violation is None and expected_tokens is not None and self.verified != expected_tokens:
            self.violation = ChainViolation(self.verified, f"{expected_tokens} tokens", f"{self.verified} tokens")
        if self.violation is not None:
            raise self.violation

    def _judge(self, right: bool, expected: str, got: str) -> None:
        if right:
            self._chain.next()
            self.verified += 1
        else:
            self.violation = ChainViolation(self.verified, expected, got)
