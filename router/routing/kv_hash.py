"""Block hashes of prompts as the engines compute them, each shared prefix once.

The engine's chain costs about 105 us per 1,000 tokens (SHA-256 over pickled tuples). Prompts that a relay has met
before are recognised by a chain of cheap hashes (xxh3) over runs of blocks, so that a conversation's next turn costs
what is new in it. A prompt that no engine holds is hashed only as far as it takes to see that: ``BlockWork.step``.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable

from xxhash import xxh3_64_intdigest

from router.routing.prefix import chain_seed
from twofold.model.block_hash import BlockHasher, ExtraKeys, extra_keys

RUN_TOKENS = 256
"""Tokens of a run: what is remembered as one piece."""
DEFAULT_RUNS = 8192
"""Runs remembered: two million tokens, about 4 MB at blocks of 16."""


class PromptBlocks:
    """Hashes prompts for one pool."""

    def __init__(self, hasher: BlockHasher, *, max_runs: int = DEFAULT_RUNS) -> None:
        self.hasher = hasher
        size = hasher.block_size_tokens
        self.run_blocks = max(1, RUN_TOKENS // size)
        self._max_runs = max_runs
        self._runs: OrderedDict[int, tuple[tuple[int, ...], bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def work(self, ids: "array[int]", *, cache_salt: str = "", adapter: tuple[str, str] | None = None) -> "BlockWork":
        """The hashing of one prompt, not begun. ``adapter``: (name, path)."""
        return BlockWork(self, ids, cache_salt, adapter)

    def recall(self, key: int) -> tuple[tuple[int, ...], bytes] | None:
        """(hashes, digest of the last block) of a run met before."""
        found = self._runs.get(key)
        if found is not None:
            self._runs.move_to_end(key)
        return found

    def remember(self, key: int, hashes: tuple[int, ...], digest: bytes) -> None:
        """Keep a run; the one not met for longest goes."""
        self._runs[key] = hashes, digest
        if len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)


class BlockWork:
    """Hashes one prompt piece by piece. ``hashes`` holds what is done, shallow to deep."""

    __slots__ = ("_blocks", "_every", "_first", "_full", "_ids", "_key", "_parent", "hashes")

    def __init__(
        self, blocks: PromptBlocks, ids: "array[int]", cache_salt: str, adapter: tuple[str, str] | None
    ) -> None:
        self._blocks = blocks
        self._ids = ids
        self._full = len(ids) // blocks.hasher.block_size_tokens
        every, first = extra_keys(cache_salt, adapter)
        self._every: ExtraKeys = every
        self._first: ExtraKeys = first
        self._key = chain_seed("\x00".join(adapter) if adapter else "", cache_salt)
        self._parent = blocks.hasher.root
        self.hashes: list[int] = []

    @property
    def left(self) -> int:
        """Blocks not hashed yet."""
        return self._full - len(self.hashes)

    def step(self, max_new_blocks: int, held: Callable[[int], bool] | None = None) -> bool:
        """Go on until about ``max_new_blocks`` blocks were hashed that had not been met before. Returns whether all
        that matters is done: where ``held`` says that no engine holds a block, none holds any behind it."""
        blocks, ids, hashes = self._blocks, self._ids, self.hashes
        hasher = blocks.hasher
        run, size = blocks.run_blocks, hasher.block_size_tokens
        new = 0
        while len(hashes) < self._full:
            start = len(hashes)
            end = min(start + run, self._full)
            if end - start == run:
                key = xxh3_64_intdigest(ids[start * size : end * size].tobytes(), self._key)
                known = blocks.recall(key)
                if known is not None:
                    hashes += known[0]
                    self._parent = known[1]
                    self._key = key
                    continue
            if new >= max_new_blocks:
                return False
            self._parent = hasher.extend(hashes, self._parent, ids, start, end, every=self._every, first=self._first)
            new += end - start
            if end - start == run:
                blocks.remember(key, tuple(hashes[start:end]), self._parent)
                self._key = key
            if held is not None and not held(hashes[-1]):
                return True
        return True
