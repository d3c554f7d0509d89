"""KV events as vLLM 0.32 publishes them (``vllm/distributed/kv_events.py``): msgpack of ``[time, [events], rank]``."""

from typing import Any, TypeAlias

import msgspec

from twofold.model.block_hash import event_hash

GPU = "GPU"
FULL_ATTENTION = "full_attention"
MAX_PAYLOAD_BYTES = 64 << 20

WireHash: TypeAlias = int | bytes
"""The last 64 bits of a digest, or all of it from an engine told not to cut it."""


class BlockStored(msgspec.Struct, tag="BlockStored", gc=False):
    """Blocks of one chain became findable; ``token_ids`` and ``extra_keys`` stay encoded until they are wanted."""

    block_hashes: list[WireHash]
    parent_block_hash: WireHash | None
    token_ids: msgspec.Raw
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = msgspec.Raw(b"\xc0")
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", gc=False):
    """A physical copy of each block was handed out again."""

    block_hashes: list[WireHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    """The prefix cache was reset."""


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """The events of one engine step. ``ts``: Unix time of the engine's host."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class WireError(ValueError):
    """The bytes are no batch of KV events."""


_decode_batch = msgspec.msgpack.Decoder(EventBatch).decode
_decode_ids = msgspec.msgpack.Decoder(list[int]).decode
_decode_keys = msgspec.msgpack.Decoder(list[list[Any] | None] | None).decode


def decode(payload: bytes) -> EventBatch:
    """The batch in ``payload``. Raises WireError."""
    try:
        return _decode_batch(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise WireError(str(error)[:200]) from None


def token_ids(event: BlockStored) -> list[int]:
    """Ids of the stored blocks. Raises WireError."""
    try:
        return _decode_ids(event.token_ids)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError(str(error)[:200]) from None


def extra_keys(event: BlockStored) -> list[list[Any] | None]:
    """What the hash of each stored block covers besides its tokens, untagged; empty where nothing. Raises WireError."""
    try:
        return _decode_keys(event.extra_keys) or []
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise WireError(str(error)[:200]) from None


def short(value: WireHash) -> int:
    """The 64-bit form of a hash."""
    return value if isinstance(value, int) else event_hash(value)


def is_counted(medium: str | None, group_idx: int | None, kind: str | None = FULL_ATTENTION) -> bool:
    """Whether blocks of this kind make a prefix hit: in GPU memory, of the first cache group, full attention."""
    return medium in (GPU, None) and group_idx in (0, None) and kind in (FULL_ATTENTION, None)
