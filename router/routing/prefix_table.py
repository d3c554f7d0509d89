"""What is probably cached where: a fixed-size set-associative table over memory that all processes of a replica write.

An entry says "this chunk chain was sent to that target when the target had stored so many tokens". It is stale once
the target has stored more than its KV capacity since: an LRU cache has then turned over. Prompts are entered at the
depths of ``prefix.DEPTH_SCHEDULE`` only; the deepest of them also names the prompt's last chunk, so that the next turn
of a conversation is recognised to the full depth of the last one.

Entries that were made a short while ago are left as they are, so that a prefix which is sent again and again costs one
write, not one per depth. For that to be sound, what is entered beyond a young entry bears that entry's stamp: whatever
depth of a prompt is found, all shallower ones were entered at its stamp or later (as far as the ring key: what lies
before it, and many sessions share, may look older than it is).

Nobody locks: entries are hints. Two processes that write the same way of a bucket at the same moment leave an entry
with words of both, whose worst is to be found some chunks too shallow, or to be stale too early or too late.
"""

from collections.abc import Sequence
from struct import Struct

from xxhash import xxh3_64_intdigest

from router.routing.prefix import DEPTH_SCHEDULE, scheduled_count
from router.routing.types import Chain

DEFAULT_ENTRIES = 1 << 19
YOUNG_SHARE = 1 / 16
"""Entries are young, and left as they are, until the target has stored this share of its capacity."""
COMMON_YOUNG_SHARE = 1 / 2
"""The same for entries of what many sessions share: it is sent again long before it would be taken for stale."""
_WAYS = 4
_TAG_BYTES = 4
"""The tags of all buckets come first, by themselves: most look-ups end there, and 2 MB stay in a CPU's cache."""
_BUCKET_TAGS_BYTES = _WAYS * _TAG_BYTES
_WORDS = 3 * _WAYS
"""Of a bucket after the tags: the deepest hashes of its ways, their stamps, their times (microseconds: which is the
oldest, and whose an entry is)."""
_STAMPS, _TIMES = _WAYS, 2 * _WAYS
_BUCKET_BYTES = _BUCKET_TAGS_BYTES + 8 * _WORDS
_TAGS = Struct(f"={_WAYS}I").unpack_from
_QUADS = Struct(f"={_WAYS}Q").unpack_from
_CHUNK_AT = tuple(depth - 1 for depth in DEPTH_SCHEDULE)
_DEEP_PROBES = 2
"""Probes at the deep end of a prompt before the search goes over to halving: most prompts that are known go on from
the last turn of their conversation, which was hardly shorter."""


def region_bytes(entries: int = DEFAULT_ENTRIES) -> int:
    """Bytes of a region of ``entries`` entries. Raises ValueError unless it is a power of two of at least 4."""
    if entries < _WAYS or entries & (entries - 1):
        raise ValueError(f"prefix table entries must be a power of two of at least {_WAYS}, not {entries}")
    return entries // _WAYS * _BUCKET_BYTES


def target_salt(target_id: str, incarnation: int) -> int:
    """Sets the entries of a target apart; a new incarnation's differ, which voids the old ones."""
    return xxh3_64_intdigest(f"{target_id}\x00{incarnation}".encode())


class PrefixWriter:
    """Writes; any number of processes may, each with one of its own."""

    __slots__ = ("_first_word", "_mask", "_region", "_tags", "_words", "evictions")

    def __init__(self, region: memoryview) -> None:
        buckets = len(region) // _BUCKET_BYTES
        self._region = region
        self._tags = region.cast("I")
        self._words = region.cast("Q")
        self._first_word = buckets * _BUCKET_TAGS_BYTES // 8
        self._mask = buckets - 1
        self.evictions = 0
        """Entries that made room for others."""

    def insert(
        self,
        salt: int,
        hashes: Sequence[int],
        deepest: int,
        stamp_tokens: float,
        now_s: float,
        young_tokens: float = 0.0,
        common: int = 0,
        common_young_tokens: float = 0.0,
    ) -> int:
        """Enters ``hashes`` (of one prompt, at the scheduled depths, shallow to deep) for the target of ``salt``.

        ``deepest`` is the hash of the prompt's deepest chunk, ``stamp_tokens`` the target's stored-tokens clock. From
        the deep end until an entry is met that was made within ``young_tokens`` of the clock; the shallowest ``common``
        of them, which many sessions share, may be as old as ``common_young_tokens``. Returns how many were entered, for
        ``forget``.
        """
        words, region, mask, first_word = self._words, self._region, self._mask, self._first_word
        stamp, time = max(0, int(stamp_tokens)), max(0, int(now_s * 1e6))
        entered: list[int] = []
        # Only the deepest of the entries leads on to the prompt's end: what ends here, or goes on from here, is told
        # apart by what is entered beyond.
        tail, own = deepest, 0
        left = len(hashes)
        for value in reversed(hashes):
            if left == common:
                young_tokens, own = common_young_tokens, len(entered)
            left -= 1
            key = value ^ salt
            bucket = key & mask
            tag = key >> 32 or 1
            tags = _TAGS(region, bucket * _BUCKET_TAGS_BYTES)
            at = first_word + bucket * _WORDS
            if tag in tags:
                at += tags.index(tag)
                known = words[at + _STAMPS]
                if tail:
                    words[at] = tail
                words[at + _TIMES] = time
                if 0 <= stamp - known <= young_tokens:
                    if known != stamp:
                        for at in entered[own:]:
                            words[at + _STAMPS] = known
                    break
            else:
                if 0 in tags:
                    way = tags.index(0)
                else:
                    self.evictions += 1
                    times = _QUADS(region, 8 * (at + _TIMES))
                    way = times.index(min(times))
                at += way
                words[at] = tail
                words[at + _TIMES] = time
                self._tags[bucket * _WAYS + way] = tag
            words[at + _STAMPS] = stamp
            entered.append(at)
            tail = 0
        return len(entered)

    def forget(self, salt: int, hashes: Sequence[int], entered: int, now_s: float) -> None:
        """Takes back what an ``insert`` of the same ``hashes`` at ``now_s`` entered, because the prompt never reached
        the target. What was sent again since, and all that is shallower, stays."""
        words, region = self._words, self._region
        time = max(0, int(now_s * 1e6))
        for number, value in enumerate(reversed(hashes)):
            key = value ^ salt
            bucket = key & self._mask
            tags = _TAGS(region, bucket * _BUCKET_TAGS_BYTES)
            tag = key >> 32 or 1
            if tag not in tags:
                continue
            way = tags.index(tag)
            at = self._first_word + bucket * _WORDS + way
            if words[at + _TIMES] != time:
                return
            if number >= entered:
                # It was there before; only the prompt that it led to is not.
                if not number:
                    words[at] = 0
                return
            self._tags[bucket * _WAYS + way] = 0
            words[at + _TIMES] = 0


class PrefixReader:
    """Looks prefixes up."""

    __slots__ = ("_first_word", "_mask", "_region", "_words")

    def __init__(self, region: memoryview) -> None:
        buckets = len(region) // _BUCKET_BYTES
        self._region = region
        self._words = region.cast("Q")
        self._first_word = buckets * _BUCKET_TAGS_BYTES // 8
        self._mask = buckets - 1

    def cached_chunks(
        self, salt: int, chain: Chain, stored_tokens: float, capacity_tokens: float, likely: int = 0
    ) -> int:
        """Leading chunks of ``chain`` that the target of ``salt`` holds or has queued, by what was sent to it.

        ``stored_tokens`` is the target's clock now, ``capacity_tokens`` its KV capacity. Most targets know nothing of
        a prompt: their first chunk is looked for, no more. Else the depth of the schedule numbered ``likely`` is, from
        which on most know all or nothing, then a few at the deep end of what is left, then it is halved.
        """
        region, mask = self._region, self._mask
        key = chain[0] ^ salt
        if (key >> 32 or 1) not in _TAGS(region, (key & mask) * _BUCKET_TAGS_BYTES):
            return 0
        words, first_word = self._words, self._first_word
        chunks = len(chain)
        low, high = 0, scheduled_count(chunks) if chunks > 1 else 1
        deepest = probes = 0
        while low < high:
            if low < likely < high:
                middle, likely = likely, 0
            elif probes < _DEEP_PROBES:
                middle = high - 1
                probes += 1
            else:
                middle = (low + high) // 2
            key = chain[_CHUNK_AT[middle]] ^ salt
            bucket = key & mask
            tags = _TAGS(region, bucket * _BUCKET_TAGS_BYTES)
            tag = key >> 32 or 1
            if tag in tags:
                at = first_word + bucket * _WORDS + tags.index(tag)
                if -capacity_tokens <= stored_tokens - words[at + _STAMPS] <= capacity_tokens:
                    low = middle + 1
                    deepest = words[at]
                    continue
            high = middle
        return _deepened(chain, low, deepest) if low else 0


def _deepened(chain: Chain, found: int, tail: int) -> int:
    """Chunks held, given the deepest scheduled depth found and the deepest hash of the prompt that was sent there."""
    depth = DEPTH_SCHEDULE[found - 1]
    beyond = chain[depth : DEPTH_SCHEDULE[found] - 1] if found < len(DEPTH_SCHEDULE) else chain[depth:]
    return depth + beyond.index(tail) + 1 if tail in beyond else depth
