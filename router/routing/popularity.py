"""Which prefixes are hot, by decayed and bounded counts, and the ring key that follows from it."""

from router.routing.prefix import DEPTH_SCHEDULE, scheduled_count
from router.routing.types import Chain

_RESCALE_EXPONENT = 512.0


class Popularity:
    """Decayed counts of chunk chains; memory bounded by two generations of ``entries / 2`` each.

    Counts are kept in units that grow with time (forward decay), so that nothing needs to be aged: a count is worth
    ``value / 2 ** ((now - origin) / half_life)``. What a full generation did not touch again is forgotten whole.
    A chain is counted from its first chunk to its present ring key, so that deeper chunks cost nothing until needed.
    """

    __slots__ = (
        "_begin",
        "_exponent_per_s",
        "_generation",
        "_old",
        "_origin_s",
        "_total",
        "_young",
        "generations",
        "half_life_s",
    )

    def __init__(self, half_life_s: float, now_s: float, entries: int = 65_536) -> None:
        self.half_life_s = half_life_s
        self._exponent_per_s = 1.0 / max(half_life_s, 1e-3)
        self._generation = max(1, entries // 2)
        self._origin_s = now_s
        self._total = 0.0
        self._begin = 0
        self._young: dict[int, float] = {}
        self._old: dict[int, float] = {}
        self.generations = 0
        """Generations that were full, each of which made the one before it be forgotten."""

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def ring_key(
        self, chain: Chain, targets: int, key_share: float, min_count: float, now_s: float, unique_id: int
    ) -> tuple[int, int]:
        """(key, chunks it covers): the first chunk whose share of recent requests is at most ``key_share / targets``,
        or that was seen fewer than ``min_count`` times; (``unique_id``, 0) where the chain has no such chunk.

        Looks at the depths of the schedule only, which bounds the walk through a very hot, very long prefix; and begins
        where the request counted last had its key, if the chain is hot just before that: so it is before.
        """
        if not chain:
            return unique_id, 0
        young, old = self._young, self._old
        share = self._total * key_share / max(targets, 1)
        few = min_count * 2.0 ** min((now_s - self._origin_s) * self._exponent_per_s, 1000.0)
        chunks = len(chain)
        depths = DEPTH_SCHEDULE
        begin = self._begin
        if begin > 1 and depths[begin - 1] <= chunks:
            value = chain[depths[begin - 1] - 1]
            count = young.get(value) or old.get(value, 0.0)
            if count > share and count >= few:
                depths = depths[begin:]
        for depth in depths:
            if depth > chunks:
                break
            value = chain[depth - 1]
            count = young.get(value) or old.get(value, 0.0)
            if count <= share or count < few:
                return value, depth
        return unique_id, 0

    def count(self, chain: Chain, key_depth: int, now_s: float) -> None:
        """Counts one request: the chunks of ``chain`` down to ``key_depth`` (0: all the way)."""
        exponent = (now_s - self._origin_s) * self._exponent_per_s
        if exponent > _RESCALE_EXPONENT:
            self._rescale(now_s, exponent)
            exponent = 0.0
        one = 2.0 ** max(exponent, 0.0)
        self._total += one
        young, old = self._young, self._old
        deepest = key_depth or len(chain)
        self._begin = scheduled_count(key_depth) - 1 if key_depth > 1 else 0
        for depth in DEPTH_SCHEDULE:
            if depth > deepest or depth > len(chain):
                break
            value = chain[depth - 1]
            count = young.get(value)
            if count is None:
                if len(young) >= self._generation:
                    self.generations += 1
                    self._old = old = young
                    self._young = young = {}
                count = old.pop(value, 0.0)
            young[value] = count + one

    def _rescale(self, now_s: float, exponent: float) -> None:
        """Moves the origin to ``now_s``; happens once in hundreds of half lives."""
        factor = 2.0 ** -min(exponent, 1000.0)
        self._total *= factor
        self._old = {}
        self._young = {value: count * factor for value, count in self._young.items()}
        self._origin_s = now_s
