"""Sources of output tokens other than the plain chain: planned text, and chains that may not produce every token."""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Protocol

from emulator.tokens import EOS_ID, FIRST_OUTPUT_ID, OUTPUT_WORDS, TokenChain, decode_bytes, token_bytes


class OutputSource(Protocol):
    """Where a request's output tokens come from."""

    def next(self) -> int:
        """Produce the next id."""

    def ends_here(self) -> bool:
        """Whether a request that may end by itself ends at this point."""


class PlannedOutput:
    """An output that is known beforehand, such as one that satisfies a grammar, and the end token.

    A request that ignores its end goes on with the chain after all that, as in vLLM, where a constraint ends with the
    text that it describes.
    """

    __slots__ = ("_chain", "_ids", "_prompt_ids", "produced")

    def __init__(self, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> None:
        self._ids = [*ids, EOS_ID]
        self._prompt_ids = prompt_ids
        self._chain: TokenChain | None = None
        self.produced = 0

    def next(self) -> int:
        """Produce the next id."""
        position = self.produced
        self.produced += 1
        if position < len(self._ids):
            return self._ids[position]
        if self._chain is None:
            self._chain = TokenChain([*self._prompt_ids, *self._ids])
        return self._chain.next()

    def ends_here(self) -> bool:
        """Whether all of the plan has been produced."""
        return self.produced == len(self._ids) - 1


class RestrictedChain(TokenChain):
    """A chain over part of the vocabulary: still a function of all ids so far, so a continuation goes on with it.

    ``allowed``: only these ids, where given. ``banned``: never these ids. ``bad_words``: the text never comes to
    contain one of these byte strings; prompt and output are looked at alike, hence a continuation decides the same.
    If nothing is left, the token that the plain chain would have produced is taken.
    """

    __slots__ = ("_allowed", "_bad_words", "_banned", "_may_end", "_tail", "_tail_bytes")

    def __init__(
        self,
        prompt_ids: Sequence[int],
        choice: int = 0,
        *,
        allowed: Collection[int] = (),
        banned: Collection[int] = (),
        bad_words: Sequence[bytes] = (),
    ) -> None:
        super().__init__(prompt_ids, choice)
        self._allowed = sorted(allowed)
        self._may_end = EOS_ID not in banned and (not allowed or EOS_ID in allowed)
        self._banned = frozenset(banned)
        self._bad_words = tuple(bad_words)
        self._tail_bytes = max(map(len, self._bad_words), default=1) - 1
        self._tail = self._last_bytes(decode_bytes(prompt_ids[-self._tail_bytes :])) if self._tail_bytes else b""

    def peek(self) -> int:
        """The id that ``next`` will return."""
        start = self._hasher.intdigest()
        return next(filter(self._fits, self._candidates(start)), FIRST_OUTPUT_ID + start % OUTPUT_WORDS)

    def next(self) -> int:
        """Produce the next id."""
        token = self.peek()
        self._hasher.update(token.to_bytes(4, "little"))
        self._tail = self._last_bytes(self._tail + token_bytes(token))
        self.produced += 1
        return token

    def ends_here(self) -> bool:
        """As the plain chain; never where the end token is not allowed."""
        return self._may_end and super().ends_here()

    def _candidates(self, start: int) -> Iterator[int]:
        if self._allowed:
            first = start % len(self._allowed)
            return chain(self._allowed[first:], self._allowed[:first])
        first = FIRST_OUTPUT_ID + start % OUTPUT_WORDS
        return chain(range(first, FIRST_OUTPUT_ID + OUTPUT_WORDS), range(FIRST_OUTPUT_ID, first))

    def _fits(self, token: int) -> bool:
        if token in self._banned:
            return False
        added = token_bytes(token)
        return not any(
            word in self._tail[max(0, len(self._tail) + 1 - len(word)) :] + added for word in self._bad_words
        )

    def _last_bytes(self, text: bytes) -> bytes:
        return text[-self._tail_bytes :] if self._tail_bytes else b""
