"""Whether an engine hashes blocks as its pool says it does: seen by hashing the tokens of its own events again."""

from collections.abc import Mapping
from typing import Any

from router.kvevents import wire
from twofold.model.block_hash import BlockHasher, ExtraKeys, event_hash


def matches(event: wire.BlockStored, hasher: BlockHasher, adapter_paths: Mapping[str, str]) -> bool | None:
    """Whether the hashes of an event that begins a chain are those of ``hasher``; None where that cannot be told: it
    goes on from a block of which only half the digest is known, or its adapter's path is not known. Raises WireError.
    """
    if event.parent_block_hash is not None or not event.block_hashes:
        return None
    ids = wire.token_ids(event)
    size = hasher.block_size_tokens
    if len(ids) != size * len(event.block_hashes):
        return None
    published = wire.extra_keys(event)
    parent = hasher.root
    for index, wanted in enumerate(event.block_hashes):
        keys = published[index] if index < len(published) else None
        known, tagged = _tagged(keys, event.lora_name, adapter_paths)
        if not known:
            return None
        parent = hasher.block(parent, ids[index * size : (index + 1) * size], tagged)
        if event_hash(parent) != wire.short(wanted):
            return False
    return True


def _tagged(keys: list[Any] | None, lora_name: str | None, adapter_paths: Mapping[str, str]) -> tuple[bool, ExtraKeys]:
    """(whether it can be told, extra keys as they are hashed)."""
    tagged: list[tuple[Any, ...]] = []
    for index, key in enumerate(keys or ()):
        if isinstance(key, bytes):
            tagged.append(("prompt_embeds", key))
        elif isinstance(key, list):
            tagged.append(("mm", *key))
        elif index == 0 and lora_name is not None and key == lora_name:
            path = adapter_paths.get(lora_name)
            if path is None:
                return False, None
            tagged.append(("lora", lora_name, path))
        else:
            tagged.append(("cache_salt", key))
    return True, tuple(tagged) or None
