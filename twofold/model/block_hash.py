"""Block hashes of vLLM's prefix cache, from token ids: what its KV events name blocks by.

Each full block of a prompt is named by ``H((hash of the block before, tuple of its token ids, extra keys or None))``,
the first one's predecessor being ``H(seed)`` (vLLM 0.32 ``v1/core/kv_cache_utils.py``). ``H`` is SHA-256 over Python's
pickle protocol 5 (``sha256``, vLLM's default) or over canonical CBOR (``sha256_cbor``). The seed is the engine's
PYTHONHASHSEED where that is set, else a constant, so engines and routers compute equal hashes without being told.
Engines that hash by xxhash seed it at random per process: nobody else can compute their hashes.

Events carry the last 64 bits of the 32-byte digest as an unsigned integer; so do all results here.
"""

import hashlib
import pickle
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from twofold.model.fleet import HashAlgorithm

DEFAULT_SEED = "vllm-none-hash"
DIGEST_BYTES = 32

ExtraKeys: TypeAlias = tuple[tuple[Any, ...], ...] | None
"""What tells blocks of equal tokens apart: ("lora", name, path), ("mm", id, offset in the block), ("cache_salt", s)."""


class UnsupportedAlgorithm(ValueError):
    """The engine's block hashes cannot be computed by anybody else."""


def _sha256(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, 5)).digest()


def _sha256_cbor(value: object) -> bytes:
    return hashlib.sha256(cbor_encode(value)).digest()


_FUNCTIONS: dict[HashAlgorithm, Callable[[object], bytes]] = {
    HashAlgorithm.SHA256: _sha256,
    HashAlgorithm.UNKNOWN: _sha256,
    HashAlgorithm.SHA256_CBOR: _sha256_cbor,
}


def is_supported(algorithm: HashAlgorithm) -> bool:
    """Whether hashes of ``algorithm`` can be computed here; an unknown one is taken for vLLM's default."""
    return algorithm in _FUNCTIONS


def event_hash(digest: bytes) -> int:
    """The form of a digest in KV events: its last 64 bits, big-endian."""
    return int.from_bytes(digest[-8:], "big")


class BlockHasher:
    """The hash chain of one engine configuration. Raises UnsupportedAlgorithm for a randomly seeded hash.

    ``seed`` is the engine's PYTHONHASHSEED, "" where it has none. Costs about 105 us per 1,000 tokens in blocks of 16
    (one SHA-256 and one pickle a block), 40 us in blocks of 128.
    """

    __slots__ = ("_hash", "algorithm", "block_size_tokens", "root")

    def __init__(self, block_size_tokens: int, algorithm: HashAlgorithm = HashAlgorithm.SHA256, seed: str = "") -> None:
        if block_size_tokens < 1:
            raise ValueError("a block holds at least one token")
        function = _FUNCTIONS.get(algorithm)
        if function is None:
            raise UnsupportedAlgorithm(f"{algorithm.value} block hashes are seeded at random by each engine")
        self.block_size_tokens = block_size_tokens
        self.algorithm = algorithm
        self._hash = function
        self.root = function(seed or DEFAULT_SEED)
        """Digest that stands for the predecessor of a first block."""

    def block(self, parent: bytes, ids: Sequence[int], extra: ExtraKeys = None) -> bytes:
        """Digest of one full block behind ``parent``."""
        return self._hash((parent, tuple(ids), extra))

    def extend(
        self,
        hashes: "list[int]",
        parent: bytes,
        ids: "Sequence[int] | array[int]",
        start: int,
        end: int,
        *,
        every: ExtraKeys = None,
        first: ExtraKeys = None,
    ) -> bytes:
        """Append the hashes of blocks ``start..end-1`` of ``ids`` to ``hashes``; ``parent`` is the digest of block
        ``start - 1``. ``every``: extra keys of all blocks, ``first``: those that block 0 has besides. Returns the
        digest of the last block."""
        size, function = self.block_size_tokens, self._hash
        append = hashes.append
        extra = (*(every or ()), *(first or ())) or None if start == 0 else every
        for at in range(start * size, end * size, size):
            parent = function((parent, tuple(ids[at : at + size]), extra))
            append(int.from_bytes(parent[-8:], "big"))
            extra = every
        return parent

    def chain(
        self, ids: "Sequence[int] | array[int]", *, cache_salt: str = "", adapter: tuple[str, str] | None = None
    ) -> list[int]:
        """Hashes of all full blocks of a prompt. ``adapter``: (name, path) of its LoRA adapter."""
        hashes: list[int] = []
        every, first = extra_keys(cache_salt, adapter)
        self.extend(hashes, self.root, ids, 0, len(ids) // self.block_size_tokens, every=every, first=first)
        return hashes


def extra_keys(cache_salt: str = "", adapter: tuple[str, str] | None = None) -> tuple[ExtraKeys, ExtraKeys]:
    """(extra keys of every block, those of block 0 besides) of a text prompt."""
    every = (("lora", *adapter),) if adapter else None
    first = (("cache_salt", cache_salt),) if cache_salt else None
    return every, first


def cbor_encode(value: Any) -> bytes:
    """Canonical CBOR (RFC 8949 section 4.2) of the values that block hashes are made of: None, int, str, bytes and
    tuples of these. Raises TypeError for anything else."""
    if isinstance(value, tuple):
        return _cbor_head(4, len(value)) + (_cbor_ids(value) or b"".join(map(cbor_encode, value)))
    if isinstance(value, bytes):
        return _cbor_head(2, len(value)) + value
    if value is None:
        return b"\xf6"
    if isinstance(value, str):
        data = value.encode()
        return _cbor_head(3, len(data)) + data
    if type(value) is int:
        return _cbor_head(0, value) if value >= 0 else _cbor_head(1, -1 - value)
    raise TypeError(f"{type(value).__name__} has no place in a block hash")


def _cbor_ids(values: tuple[Any, ...]) -> bytes | None:
    """The items of a tuple of token ids, the bulk of all that is hashed; None where it holds anything else."""
    if len(values) < 4:
        return None
    try:
        return b"".join(
            [
                (0x1A_0000_0000 | value).to_bytes(5, "big")
                if value > 0xFFFF
                else (0x19_0000 | value).to_bytes(3, "big")
                if value > 0xFF
                else _BYTE_HEADS[value]
                for value in values
            ]
        )
    except (TypeError, IndexError, OverflowError):
        return None


def _cbor_head(major: int, number: int) -> bytes:
    high = major << 5
    if number < 24:
        return bytes((high | number,))
    if number < 1 << 8:
        return bytes((high | 24, number))
    if number < 1 << 16:
        return bytes((high | 25,)) + number.to_bytes(2, "big")
    if number < 1 << 32:
        return bytes((high | 26,)) + number.to_bytes(4, "big")
    return bytes((high | 27,)) + number.to_bytes(8, "big")


_BYTE_HEADS = tuple(_cbor_head(0, number) for number in range(256))
