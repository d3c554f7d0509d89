"""KV blocks with reference counts, the free list in vLLM's order, and the prefix cache over chained block hashes.

The order of the free list decides what the prefix cache forgets first (vLLM ``v1/core/block_pool.py``): a finished
request gives its blocks back tail first; blocks that hold a cached hash go to the end (least recently freed is reused
first), blocks without one to the front. A cached block keeps its hash while it lies in the free list and loses it only
when it is handed out again.
"""

from array import array
from collections.abc import Sequence

import msgspec
import xxhash

from emulator.model.request import Adapter

NULL_BLOCK = 0


class BlockStored(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks became findable; ``token_ids`` are those of the stored blocks alone, ``cache_salt`` that of the prompt."""

    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size_tokens: int
    adapter: Adapter | None = None
    cache_salt: str = ""


class BlockRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """One physical copy of a cached block was handed out again."""

    block_hash: int


class AllBlocksCleared(msgspec.Struct, frozen=True, kw_only=True):
    """The prefix cache was reset."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


def extend_hashes(hashes: list[int], ids: "array[int]", block_size_tokens: int, seed: int) -> None:
    """Append to ``hashes`` those of the full blocks of ``ids`` that it lacks (xxh3-64, chained from ``seed``)."""
    full = len(ids) // block_size_tokens
    parent = hashes[-1] if hashes else seed
    for index in range(len(hashes), full):
        content = ids[index * block_size_tokens : (index + 1) * block_size_tokens].tobytes()
        parent = xxhash.xxh3_64_intdigest(content, parent)
        hashes.append(parent)


class BlockPool:
    """``num_blocks`` blocks; block 0 is the null block, never handed out. About 21 bytes a block plus the cache."""

    def __init__(self, num_blocks: int, block_size_tokens: int, *, record_events: bool = False) -> None:
        if num_blocks < 2 or block_size_tokens < 1:
            raise ValueError("a block pool needs at least one usable block of at least one token")
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self.num_free = num_blocks - 1
        self.events: list[KvEvent] = []
        self._record = record_events
        self._references = array("i", bytes(4 * num_blocks))
        self._hash = array("Q", bytes(8 * num_blocks))
        self._hashed = bytearray(num_blocks)
        self._cached: dict[int, int | list[int]] = {}
        # The free list is doubly linked through two arrays; the null block is its head and its end.
        self._next = array("i", range(1, num_blocks + 1))
        self._next[num_blocks - 1] = NULL_BLOCK
        self._previous = array("i", range(-1, num_blocks - 1))
        self._previous[NULL_BLOCK] = num_blocks - 1

    @property
    def usage(self) -> float:
        """Share of the usable blocks that requests hold; cached blocks without a holder count as free."""
        return 1.0 - self.num_free / (self.num_blocks - 1)

    @property
    def num_cached(self) -> int:
        """Physical blocks with a findable hash."""
        return sum(1 if isinstance(entry, int) else len(entry) for entry in self._cached.values())

    def find(self, hashes: Sequence[int], limit: int) -> list[int]:
        """Blocks of the longest cached chain among the first ``limit`` hashes."""
        cached = self._cached
        found: list[int] = []
        for block_hash in hashes[:limit]:
            entry = cached.get(block_hash)
            if entry is None:
                break
            found.append(entry if isinstance(entry, int) else entry[0])
        return found

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` lie in the free list, that is, would be taken from it by ``touch``."""
        references = self._references
        return sum(1 for block in blocks if not references[block])

    def touch(self, blocks: Sequence[int]) -> None:
        """Hold blocks that ``find`` returned."""
        for block in blocks:
            if not self._references[block]:
                self._unlink(block)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks from the front of the free list; their old hashes are forgotten now.

        Raises ValueError when fewer are free: the caller checks ``num_free`` first.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        taken = []
        for _ in range(count):
            block = self._next[NULL_BLOCK]
            self._unlink(block)
            if self._hashed[block]:
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give a request's blocks back, tail first. Raises ValueError for a block that nobody holds."""
        unhashed: list[int] = []
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise ValueError(f"block {block} released twice")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hashed[block]:
                self._link(block, self._previous[NULL_BLOCK])
            else:
                unhashed.append(block)
        for block in reversed(unhashed):
            self._link(block, NULL_BLOCK)

    def store(
        self,
        blocks: Sequence[int],
        hashes: Sequence[int],
        start: int,
        end: int,
        ids: "array[int]",
        *,
        adapter: Adapter | None = None,
        cache_salt: str = "",
    ) -> None:
        """Make the full blocks ``start..end-1`` of a request findable under their hashes. ``adapter`` and
        ``cache_salt`` are what its event says besides."""
        for index in range(start, end):
            block, block_hash = blocks[index], hashes[index]
            self._hash[block] = block_hash
            self._hashed[block] = 1
            entry = self._cached.get(block_hash)
            if entry is None:
                self._cached[block_hash] = block
            elif isinstance(entry, int):
                self._cached[block_hash] = [entry, block]
            else:
                entry.append(block)
        if self._record and end > start:
            size = self.block_size_tokens
            self.events.append(
                BlockStored(
                    block_hashes=tuple(hashes[start:end]),
                    parent_block_hash=hashes[start - 1] if start else None,
                    token_ids=tuple(ids[start * size : end * size]),
                    block_size_tokens=size,
                    adapter=adapter,
                    cache_salt=cache_salt,
                )
            )

    def clear_cache(self) -> bool:
        """Forget every cached hash. False, and nothing happens, while a request holds a block (as vLLM)."""
        if self.num_free != self.num_blocks - 1:
            return False
        self._cached.clear()
        self._hashed = bytearray(self.num_blocks)
        if self._record:
            self.events.append(AllBlocksCleared())
        return True

    def cached_copies(self) -> dict[int, int]:
        """Every findable hash and the number of physical blocks that hold it: O(blocks)."""
        return {name: 1 if isinstance(entry, int) else len(entry) for name, entry in self._cached.items()}

    def drain_events(self) -> list[KvEvent]:
        """The events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    def free_order(self) -> list[int]:
        """The free list from its front, for tests and inspection: O(blocks)."""
        order = []
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            order.append(block)
            block = self._next[block]
        return order

    def references(self, block: int) -> int:
        """How many requests hold ``block``."""
        return self._references[block]

    def _forget(self, block: int) -> None:
        block_hash = self._hash[block]
        entry = self._cached[block_hash]
        if isinstance(entry, int):
            del self._cached[block_hash]
        else:
            entry.remove(block)
            if len(entry) == 1:
                self._cached[block_hash] = entry[0]
        self._hashed[block] = 0
        if self._record:
            self.events.append(BlockRemoved(block_hash=block_hash))

    def _unlink(self, block: int) -> None:
        previous, following = self._previous[block], self._next[block]
        self._next[previous] = following
        self._previous[following] = previous
        self.num_free -= 1

    def _link(self, block: int, after: int) -> None:
        following = self._next[after]
        self._next[after] = block
        self._previous[block] = after
        self._next[block] = following
        self._previous[following] = block
        self.num_free += 1
