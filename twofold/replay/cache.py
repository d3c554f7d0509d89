"""What prefix caches could have done with the prompts that were sent: one endless cache, and one of the fleet's
capacity.

The order of events is that of the run: a prompt is looked up and stored when its request is sent, prompt and output
are stored when the answer has ended. As in vLLM only full blocks are cached and the last token of a prompt is
always computed.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from twofold.replay.render import splitmix64

Hashes = npt.NDArray[np.uint64]
MAX_LOGGED_BLOCKS = 32_000_000
"""Bound of a log: 256 MB, half a billion tokens at 16 tokens a block."""

_SEED = np.uint64(0xD6E8FEB86659FD93)


class CacheFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens asked for and found; ``complete`` is False when the log was full before the run ended."""

    prompt_tokens: int
    hit_tokens: int
    complete: bool = True

    @property
    def hit_ratio(self) -> float | None:
        """Share of prompt tokens found in the cache, None without prompts."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else None


def prefix_hashes(ids: Sequence[int], block_tokens: int) -> Hashes:
    """One hash per full block, each of the whole prefix up to its end.

    A polynomial hash of mixed blocks, summed up modulo 2**64: good for counting, not against an adversary.
    """
    blocks = len(ids) // block_tokens
    if blocks == 0:
        return np.empty(0, dtype=np.uint64)
    tokens = np.asarray(ids, dtype=np.uint64)[: blocks * block_tokens].reshape(blocks, block_tokens)
    columns = splitmix64(np.arange(1, block_tokens + 1, dtype=np.uint64) * _SEED)
    content = splitmix64((splitmix64(tokens + _SEED) * (columns | np.uint64(1))).sum(axis=1, dtype=np.uint64))
    places = splitmix64(np.arange(1, blocks + 1, dtype=np.uint64) + _SEED)
    return splitmix64(np.cumsum(splitmix64(content ^ places), dtype=np.uint64))


class CacheLog:
    """Collects the lookups and stores of a run, eight bytes a block."""

    def __init__(self, block_tokens: int, max_blocks: int = MAX_LOGGED_BLOCKS) -> None:
        self.block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._hashes = array("Q")
        self._ends = array("Q")
        self._prompt_tokens = array("Q")
        """Prompt tokens of a lookup; 0 marks a store."""
        self._complete = True
        self._filler = 0

    def hashes(self, ids: Sequence[int]) -> Hashes:
        """Hashes of the full blocks of ``ids``, ahead of ``sent``."""
        return prefix_hashes(ids, self.block_tokens)

    def sent(self, hashes: Hashes, prompt_tokens: int) -> None:
        """A prompt is looked up and stored."""
        self._append(hashes, prompt_tokens)

    def answered(self, hashes: Hashes) -> None:
        """Prompt and output are stored."""
        self._append(hashes, 0)

    def answered_unseen(self, output_tokens: int) -> None:
        """Output that no later prompt can contain takes its room."""
        blocks = output_tokens // self.block_tokens
        self._append(splitmix64(np.arange(self._filler, self._filler + blocks, dtype=np.uint64) ^ _SEED), 0)
        self._filler += blocks

    def endless(self) -> CacheFigures:
        """The best any fleet can do: one cache without bound."""
        hashes = np.frombuffer(self._hashes, dtype=np.uint64) if self._hashes else np.empty(0, dtype=np.uint64)
        _, first_index, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        first_seen = first_index[inverse] if len(hashes) else np.empty(0, dtype=np.int64)
        hit_tokens = prompt_tokens = start = 0
        for end, tokens in zip(self._ends, self._prompt_tokens, strict=True):
            if tokens:
                known = first_seen[start:end] < start
                depth = int(known.argmin()) if not known.all() else len(known)
                hit_tokens += min(depth, (tokens - 1) // self.block_tokens) * self.block_tokens
                prompt_tokens += tokens
            start = end
        return CacheFigures(prompt_tokens=prompt_tokens, hit_tokens=hit_tokens, complete=self._complete)

    def lru(self, capacity_tokens: int) -> CacheFigures:
        """One least-recently-used cache of ``capacity_tokens``: the ceiling for a fleet of that capacity in all."""
        capacity = max(1, capacity_tokens // self.block_tokens)
        cache: OrderedDict[int, None] = OrderedDict()
        hit_tokens = prompt_tokens = start = 0
        for end, tokens in zip(self._ends, self._prompt_tokens, strict=True):
            blocks = self._hashes[start:end]
            if tokens:
                depth = 0
                for block in blocks:
                    if block not in cache:
                        break
                    depth += 1
                hit_tokens += min(depth, (tokens - 1) // self.block_tokens) * self.block_tokens
                prompt_tokens += tokens
            for block in reversed(blocks):
                cache[block] = None
                cache.move_to_end(block)
            while len(cache) > capacity:
                cache.popitem(last=False)
            start = end
        return CacheFigures(prompt_tokens=prompt_tokens, hit_tokens=hit_tokens, complete=self._complete)

    def _append(self, hashes: Hashes, prompt_tokens: int) -> None:
        if len(self._hashes) + len(hashes) > self._max_blocks:
            self._complete = False
            return
        self._hashes.frombytes(hashes.tobytes())
        self._ends.append(len(self._hashes))
        self._prompt_tokens.append(prompt_tokens)
