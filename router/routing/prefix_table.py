"""What is probably cached where: a fixed-size set-associative table over shared memory, one region per writer.

An entry says "this chunk chain was sent to that target when the target had stored so many tokens". It is stale once
the target has stored more than its KV capacity since: an LRU cache has then turned over. Prompts are entered at the
depths of ``prefix.DEPTH_SCHEDULE`` only; every entry also names the deepest chunk of its prompt, so that the next turn
of a conversation is recognised to the full depth of the last one.
"""

from collections.abc import Sequence
from struct import Struct

from xxhash import xxh3_64_intdigest

from router.routing.prefix import DEPTH_SCHEDULE, scheduled_count
from router.routing.types import Chain

DEFAULT_ENTRIES = 1 << 18
_WAYS = 4
_WORDS = 4 * _WAYS
"""A bucket: the keys of its ways, then their deepest hashes, their stamps, their times (seconds, for replacement)."""
_TAILS, _STAMPS, _TIMES = _WAYS, 2 * _WAYS, 3 * _WAYS
_BUCKET_BYTES = 8 * _WORDS
_KEYS = Struct(f"={_WAYS}Q").unpack_from


def region_bytes(entries: int = DEFAULT_ENTRIES) -> int:
    """Bytes of a region of ``entries`` entries. Raises ValueError unless it is a power of two of at least 4."""
    if entries < _WAYS or entries & (entries - 1):
        raise ValueError(f"prefix table entries must be a power of two of at least {_WAYS}, not {entries}")
    return entries // _WAYS * _BUCKET_BYTES


def target_salt(target_id: str, incarnation: int) -> int:
    """Sets the entries of a target apart; a new incarnation's differ, which voids the old ones."""
    return xxh3_64_intdigest(f"{target_id}\x00{incarnation}".encode())


class PrefixWriter:
    """The one writer of a region."""

    __slots__ = ("_mask", "_region", "_words", "evictions")

    def __init__(self, region: memoryview) -> None:
        self._region = region
        self._words = region.cast("Q")
        self._mask = len(region) // _BUCKET_BYTES - 1
        self.evictions = 0
        """Entries that made room for others."""

    def insert(self, salt: int, hashes: Sequence[int], deepest: int, stamp_tokens: float, now_s: float) -> None:
        """Enters ``hashes`` (of one prompt, at the scheduled depths) for the target of ``salt``.

        ``deepest`` is the hash of the prompt's deepest chunk, ``stamp_tokens`` the target's stored-tokens clock.
        """
        words, region, mask = self._words, self._region, self._mask
        stamp, time = max(0, int(stamp_tokens)), max(0, int(now_s))
        for value in hashes:
            key = value ^ salt or 1
            bucket = key & mask
            base = bucket * _WORDS
            keys = _KEYS(region, bucket * _BUCKET_BYTES)
            if key in keys:
                at = base + keys.index(key)
            elif 0 in keys:
                at = base + keys.index(0)
            else:
                self.evictions += 1
                times = _KEYS(region, bucket * _BUCKET_BYTES + 8 * _TIMES)
                at = base + times.index(min(times))
            words[at + _TAILS] = deepest
            words[at + _STAMPS] = stamp
            words[at + _TIMES] = time
            words[at] = key

    def forget(self, salt: int, hashes: Sequence[int], stamp_tokens: float) -> None:
        """Removes the entries of a prompt that never reached the target, where they still bear ``stamp_tokens``."""
        words, region, stamp = self._words, self._region, max(0, int(stamp_tokens))
        for value in hashes:
            key = value ^ salt or 1
            bucket = key & self._mask
            keys = _KEYS(region, bucket * _BUCKET_BYTES)
            if key in keys:
                at = bucket * _WORDS + keys.index(key)
                if words[at + _STAMPS] == stamp:
                    words[at] = 0
                    words[at + _TIMES] = 0


class PrefixReader:
    """Looks prefixes up over the regions of several writers."""

    __slots__ = ("_regions",)

    def __init__(self, regions: tuple[memoryview, ...]) -> None:
        self._regions = tuple(
            (region, region.cast("Q"), len(region) // _BUCKET_BYTES - 1) for region in regions if len(region)
        )

    def cached_chunks(self, salt: int, chain: Chain, stored_tokens: float, capacity_tokens: float) -> int:
        """Leading chunks of ``chain`` that the target of ``salt`` holds or has queued, by what was sent to it.

        ``stored_tokens`` is the target's clock now, ``capacity_tokens`` its KV capacity. A binary search over the
        scheduled depths in each region, beginning past what the region before it found.
        """
        found, best_tail = 0, 0
        scheduled = -1
        first = chain[0] ^ salt or 1
        for region, words, mask in self._regions:
            if not found and first not in _KEYS(region, (first & mask) * _BUCKET_BYTES):
                continue
            low, high = found, -1
            while True:
                # The first probe of a region asks for one depth more than is known; most regions end there.
                middle = low if high < 0 else (low + high) // 2
                if high < 0:
                    if scheduled < 0:
                        scheduled = scheduled_count(len(chain))
                    if middle >= scheduled:
                        break
                elif middle >= high:
                    break
                key = chain[DEPTH_SCHEDULE[middle] - 1] ^ salt or 1
                bucket = key & mask
                keys = _KEYS(region, bucket * _BUCKET_BYTES)
                hit = False
                if key in keys:
                    at = bucket * _WORDS + keys.index(key)
                    age_tokens = stored_tokens - words[at + _STAMPS]
                    hit = -capacity_tokens <= age_tokens <= capacity_tokens
                if hit:
                    low = found = middle + 1
                    best_tail = words[at + _TAILS]
                    if high < 0:
                        high = scheduled
                elif high < 0:
                    break
                else:
                    high = middle
        return _deepened(chain, found, best_tail) if found else 0


def _deepened(chain: Chain, found: int, tail: int) -> int:
    """Chunks held, given the deepest scheduled depth found and the deepest hash of the prompt that was sent there."""
    depth = DEPTH_SCHEDULE[found - 1]
    beyond = DEPTH_SCHEDULE[found] if found < len(DEPTH_SCHEDULE) else len(chain) + 1
    for at in range(depth, min(beyond - 1, len(chain))):
        if chain[at] == tail:
            return at + 1
    return depth
