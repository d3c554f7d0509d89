"""Log probabilities that fit the emulator's output: made up, yet the same for the same ids on every engine.

They are a function of all ids before a position, so a continuation on another engine reports the values that the first
one would have reported. At each position the word that the chain predicts has a probability of 0.35 to 0.95, the next
19 ranks halve what is left, and every other token shares the rest; hence no set of them adds up to more than 1.
"""

import math
from collections.abc import Sequence

import msgspec
import xxhash

from emulator.tokens import FIRST_OUTPUT_ID, OUTPUT_WORDS, VOCABULARY_SIZE, pack_ids

RANKED = 20
"""Ranks with a token of their own; vLLM's default limit for ``logprobs``."""
_LOG_HALF = math.log(0.5)


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token at one position: its log probability, and its rank from 1."""

    token_id: int
    logprob: float
    rank: int


class LogprobChain:
    """Walks along the ids of a sequence. ``choice``: see ``TokenChain``."""

    __slots__ = ("_hasher",)

    def __init__(self, ids: Sequence[int] = (), choice: int = 0) -> None:
        self._hasher = xxhash.xxh3_64(pack_ids(ids), seed=choice)

    def step(self, token: int, best: int, *, sampled_best: bool) -> list[TokenLogprob]:
        """The entries of the next position, where ``token`` is: that token first, then the ``best`` best others.

        With ``sampled_best`` the token is what the model predicts there, else the word of the chain is; a token that
        is among the best appears once, as in vLLM, where it is counted.
        """
        digest = self._hasher.intdigest()
        self._hasher.update(token.to_bytes(4, "little"))
        place = _Position(digest, token if sampled_best else FIRST_OUTPUT_ID + digest % OUTPUT_WORDS)
        rank = place.rank(token)
        entries = [TokenLogprob(token_id=token, logprob=place.logprob(rank), rank=rank)]
        for other in range(1, best + 1):
            other_token = place.token(other)
            if other_token != token:
                entries.append(TokenLogprob(token_id=other_token, logprob=place.logprob(other), rank=other))
        return entries


def prompt_logprobs(ids: Sequence[int], best: int) -> list[list[TokenLogprob] | None]:
    """The entries of a prompt's positions; the first has none, as nothing precedes it."""
    chain = LogprobChain(ids[:1])
    return [None, *(chain.step(token, best, sampled_best=False) for token in ids[1:])]


class _Position:
    """The distribution after some ids: ``predicted`` at rank 1, then words in steps from it."""

    __slots__ = ("_digest", "_predicted", "_rest", "_stride", "_top")

    def __init__(self, digest: int, predicted: int) -> None:
        self._digest = digest
        self._predicted = predicted
        top = 0.35 + 0.6 * (digest >> 44) / 2**20
        self._top = math.log(top)
        self._rest = math.log(1.0 - top)
        self._stride = 1 + (digest >> 20) % (OUTPUT_WORDS // (RANKED + 1))

    def token(self, rank: int) -> int:
        """The token of a rank from 1 to ``RANKED``."""
        if rank == 1:
            return self._predicted
        return FIRST_OUTPUT_ID + (self._first + (rank - 1) * self._stride) % OUTPUT_WORDS

    def rank(self, token: int) -> int:
        """The rank of a token; those without one of their own get one below, by hash."""
        if token == self._predicted:
            return 1
        steps, off = divmod((token - FIRST_OUTPUT_ID - self._first) % OUTPUT_WORDS, self._stride)
        if FIRST_OUTPUT_ID <= token < FIRST_OUTPUT_ID + OUTPUT_WORDS and not off and 0 < steps < RANKED:
            return steps + 1
        spread = xxhash.xxh3_64_intdigest(token.to_bytes(4, "little"), seed=self._digest)
        return RANKED + 1 + spread % (VOCABULARY_SIZE - RANKED)

    def logprob(self, rank: int) -> float:
        """Falls with the rank."""
        if rank == 1:
            return self._top
        if rank <= RANKED:
            return self._rest + (rank - 1) * _LOG_HALF
        share = self._rest + RANKED * _LOG_HALF - math.log(VOCABULARY_SIZE)
        return share - (rank - RANKED) / VOCABULARY_SIZE

    @property
    def _first(self) -> int:
        return self._digest % OUTPUT_WORDS
