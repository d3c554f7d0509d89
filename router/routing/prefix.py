"""Identity of prompt prefixes: cheap chained hashes of fixed chunks, equal on every router."""

from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter

from xxhash import xxh3_64_intdigest

from router.routing.types import Chain

MAX_CHUNKS = 4096
"""Chunks hashed at most: at 1 KiB each, 4 MiB of prompt, which is past every engine's context."""


def chain_seed(adapter: str, cache_salt: str) -> int:
    """Seed of a chain: prompts of different adapters or cache salts share no prefix (engines keep them apart too)."""
    if not adapter and not cache_salt:
        return 0
    return xxh3_64_intdigest(f"{adapter}\x00{cache_salt}".encode("utf-8", "surrogatepass"))


def chain(prompt: bytes, chunk_bytes: int, seed: int) -> Chain:
    """Hash of each full chunk of ``prompt``, seeded by the hash of the chunk before it. At most MAX_CHUNKS."""
    hashes = []
    end = min(len(prompt) // chunk_bytes, MAX_CHUNKS) * chunk_bytes
    for start in range(0, end, chunk_bytes):
        seed = xxh3_64_intdigest(prompt[start : start + chunk_bytes], seed)
        hashes.append(seed)
    return tuple(hashes)


def unique_key(text: str) -> int:
    """Ring key of a request that has no usable prefix, from its session or its id."""
    return xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), 0x74776F666F6C64)


def _schedule(deepest: int) -> tuple[int, ...]:
    depths = list(range(1, 9))
    step = 1
    while depths[-1] < deepest:
        for _ in range(8):
            depths.append(depths[-1] + step)
        step *= 2
    return tuple(depth for depth in depths if depth <= deepest)


DEPTH_SCHEDULE = _schedule(MAX_CHUNKS)
"""Depths at which prefixes are remembered and broadcast: all to 8, then 8 per octave."""


def scheduled_count(chunks: int) -> int:
    """How many depths of the schedule a prompt of ``chunks`` chunks reaches."""
    return bisect_right(DEPTH_SCHEDULE, chunks)


def scheduled_depths(chunks: int) -> tuple[int, ...]:
    """The depths of the schedule that a prompt of ``chunks`` chunks reaches."""
    return DEPTH_SCHEDULE[: scheduled_count(chunks)]


_DENSE = next(at for at, depth in enumerate((*DEPTH_SCHEDULE, 0)) if depth != at + 1)
"""So many depths at the beginning of the schedule leave none out."""
_PICK = {
    count: itemgetter(*(depth - 1 for depth in DEPTH_SCHEDULE[:count]))
    for count in range(max(_DENSE + 1, 2), len(DEPTH_SCHEDULE) + 1)
}


def scheduled_hashes(hashes: Chain) -> Chain:
    """The hashes at the depths of the schedule, shallow to deep."""
    chunks = len(hashes)
    if chunks <= _DENSE:
        return hashes
    count = scheduled_count(chunks)
    return hashes[:count] if count <= _DENSE else _PICK[count](hashes)


def broadcast_hashes(hashes: Chain) -> list[int]:
    """What other replicas are told of a dispatched prompt: its hashes at the scheduled depths, then the deepest once
    more, so that a longer prompt that goes on from it is recognised to the full depth. Empty for an empty chain."""
    return [*scheduled_hashes(hashes), hashes[-1]] if hashes else []


def split_broadcast(told: Sequence[int]) -> tuple[Sequence[int], int] | None:
    """(hashes at the scheduled depths, deepest hash) of a broadcast, or None where it cannot be one."""
    if len(told) < 2 or len(told) - 1 > len(DEPTH_SCHEDULE):
        return None
    return told[:-1], told[-1]
