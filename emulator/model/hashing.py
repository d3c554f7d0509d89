"""How a request's blocks are named: cheaply where nobody looks, by vLLM's own hash chain where events tell of them."""

from typing import Protocol

from emulator.model.blocks import extend_hashes
from emulator.model.request import Request
from twofold.model.block_hash import BlockHasher, extra_keys


class Hashing(Protocol):
    """Names blocks."""

    def extend(self, request: Request) -> None:
        """Append to ``request.hashes`` those of the full blocks that it lacks."""


class CheapHashing:
    """xxh3-64, about 1 us a block."""

    def __init__(self, block_size_tokens: int) -> None:
        self._block_size_tokens = block_size_tokens

    def extend(self, request: Request) -> None:
        """See Hashing."""
        extend_hashes(request.hashes, request.ids, self._block_size_tokens, request.hash_seed)


class EngineHashing:
    """vLLM's chain in the form of its KV events: 64 bits of SHA-256 over the block before, ids and extra keys."""

    def __init__(self, hasher: BlockHasher) -> None:
        self._hasher = hasher

    def extend(self, request: Request) -> None:
        """See Hashing."""
        hasher, hashes, ids = self._hasher, request.hashes, request.ids
        done, full = len(hashes), len(ids) // hasher.block_size_tokens
        if full <= done:
            return
        adapter = request.adapter
        every, first = extra_keys(request.cache_salt, (adapter.name, adapter.path) if adapter else None)
        parent = request.hash_tail if done else hasher.root
        request.hash_tail = hasher.extend(hashes, parent, ids, done, full, every=every, first=first)
