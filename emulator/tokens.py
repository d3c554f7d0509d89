"""The emulator's provable output, and its tokenizer (``twofold.tokenizer``).

Output is a hash chain: output token k is the word " xyz" whose number is
``xxh3_64(all ids so far, prompt and outputs, as little-endian uint32) % 26**3``. Each token depends on every token
before it, so a lost, doubled, swapped or wrong token makes every later one wrong, and an engine that is given prompt
and first outputs as its prompt goes on with exactly the tokens that the first engine would have produced.
"""

from collections.abc import Iterable, Sequence

import xxhash

from twofold.tokenizer import (
    BEGIN_ID,
    CONTENT_ID,
    END_ID,
    EOS_ID,
    FIRST_OUTPUT_ID,
    ROLE_ID,
    VOCABULARY_SIZE,
    chat_prompt_ids,
    decode,
    decode_bytes,
    encode,
    pack_ids,
    token_bytes,
)

__all__ = [
    "BEGIN_ID",
    "CONTENT_ID",
    "END_ID",
    "EOS_ID",
    "FIRST_OUTPUT_ID",
    "OUTPUT_WORDS",
    "ROLE_ID",
    "VOCABULARY_SIZE",
    "ChainChecker",
    "ChainViolation",
    "TokenChain",
    "chat_prompt_ids",
    "decode",
    "decode_bytes",
    "encode",
    "is_special",
    "pack_ids",
    "token_bytes",
]

_OUTPUT_CHARS = 4
OUTPUT_WORDS: int = 26**3
"""How many different words the chain has."""
_MEAN_NATURAL_LENGTH = 200


def is_special(token_id: int) -> bool:
    """Whether an id is one of the chat template or the end: those are not text."""
    return BEGIN_ID <= token_id <= EOS_ID


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
                expected = token_bytes(self._chain.peek()).decode()
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
            self.violation = ChainViolation(self.verified, token_bytes(self._chain.peek()).decode(), self._rest)
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
