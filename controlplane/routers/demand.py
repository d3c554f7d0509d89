"""Demand of all routers, summed per pool since the control plane started; readers take differences."""

import math

from controlplane.routers.load import LoadError
from twofold.v1 import router_pb2

MAX_POOLS = 1024
FIELDS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "rejected",
    "failed",
    "ttft_within_slo",
    "tpot_within_slo",
)


class DemandBook:
    """Running sums per pool."""

    def __init__(self) -> None:
        self._pools: dict[str, list[int]] = {}

    def add(self, tick: router_pb2.DemandTick) -> None:
        """Add what a replica saw. Raises LoadError for a tick that no router would send."""
        if len(tick.pools) > MAX_POOLS:
            raise LoadError("demand.pools", f"more than {MAX_POOLS} pools")
        if not math.isfinite(tick.interval_s) or tick.interval_s < 0:
            raise LoadError("demand.interval_s", "negative or not finite")
        for pool in tick.pools:
            sums = self._pools.get(pool.pool)
            if sums is None:
                if len(self._pools) >= MAX_POOLS or not 0 < len(pool.pool) <= 128:
                    raise LoadError("demand.pools.pool", "not the name of a pool")
                sums = self._pools[pool.pool] = [0] * len(FIELDS)
            for index, field in enumerate(FIELDS):
                sums[index] += getattr(pool, field)

    def totals(self) -> dict[str, tuple[int, ...]]:
        """Sums so far."""
        return {name: tuple(sums) for name, sums in self._pools.items()}


def difference(now: dict[str, tuple[int, ...]], before: dict[str, tuple[int, ...]]) -> list[router_pb2.PoolDemand]:
    """What came between two readings, pool by pool."""
    found = []
    for name in sorted(now):
        old = before.get(name, (0,) * len(FIELDS))
        values = {field: min(a - b, (1 << 63) - 1) for field, a, b in zip(FIELDS, now[name], old, strict=True)}
        found.append(router_pb2.PoolDemand(pool=name, **values))
    return found
