"""What to follow and what not, from the routing table and the workers' own answers; budgets. Pure."""

import enum
from collections.abc import Iterable, Mapping

import msgspec

from router.kvevents.source import Source
from router.kvevents.subscriber import FeedSpec, FeedStatus
from router.routing.table import RoutingTable
from twofold.model.block_hash import is_supported
from twofold.model.fleet import Health, Pool, Target

UNKNOWN_CAPACITY_BLOCKS = 8192
OVER_AFTER_S = 5.0
REST_S = 60.0


class PoolState(enum.StrEnum):
    """Whether the events of a pool are followed, and why not."""

    FOLLOWED = "followed"
    UNSUPPORTED_HASH = "unsupported-hash"
    """Its engines seed their block hashes at random: no router can compute them."""
    BLOCK_SIZE_UNKNOWN = "block-size-unknown"
    INDEX_FULL = "index-full"
    """Its engines hold more blocks than the index has room for."""
    RATE_EXCEEDED = "rate-exceeded"
    """Its engines store and remove more blocks a second than one agent is to follow."""


class PoolPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One pool with KV events."""

    pool: str
    state: PoolState
    targets: int
    capacity_blocks: int


def pools_with_events(table: RoutingTable) -> list[Pool]:
    """The pools whose engines publish KV events, by the fleet's configuration."""
    return [pool for pool in table.snapshot.pools if pool.kv_events]


def plan_pools(table: RoutingTable, resting: Mapping[str, float], now_s: float, max_blocks: int) -> list[PoolPlan]:
    """Which pools are followed. ``resting``: until when a pool rests for its rate. Pools that do not fit into the
    index fall back as wholes, the largest first, so that those that stay are complete."""
    members: dict[str, list[Target]] = {}
    for target in table.snapshot.targets:
        members.setdefault(target.pool, []).append(target)
    plans = []
    for pool in pools_with_events(table):
        targets = members.get(pool.name, [])
        blocks = sum(_capacity_blocks(pool, target) for target in targets)
        state = PoolState.FOLLOWED
        if not is_supported(pool.hash_algorithm):
            state = PoolState.UNSUPPORTED_HASH
        elif not pool.block_size_tokens:
            state = PoolState.BLOCK_SIZE_UNKNOWN
        elif resting.get(pool.name, 0.0) > now_s:
            state = PoolState.RATE_EXCEEDED
        plans.append(PoolPlan(pool=pool.name, state=state, targets=len(targets), capacity_blocks=blocks))
    room = max_blocks - sum(plan.capacity_blocks for plan in plans if plan.state is PoolState.FOLLOWED)
    for plan in sorted(plans, key=lambda plan: (-plan.capacity_blocks, plan.pool)):
        if room >= 0:
            break
        if plan.state is PoolState.FOLLOWED:
            room += plan.capacity_blocks
            plans[plans.index(plan)] = msgspec.structs.replace(plan, state=PoolState.INDEX_FULL)
    return plans


def feed_specs(
    table: RoutingTable, plans: Iterable[PoolPlan], sources: Mapping[str, Mapping[int, Source]]
) -> list[FeedSpec]:
    """The targets to follow. ``sources``: by worker id, then data-parallel rank."""
    followed = {plan.pool for plan in plans if plan.state is PoolState.FOLLOWED}
    pools = {pool.name: pool for pool in table.snapshot.pools if pool.name in followed}
    specs = []
    for target in table.snapshot.targets:
        pool, slot = pools.get(target.pool), table.slots.get(target.target_id)
        source = sources.get(target.worker_id, {}).get(target.data_parallel_rank or 0)
        if pool is None or slot is None or source is None or target.health is Health.GONE:
            continue
        facts = target.facts
        specs.append(
            FeedSpec(
                slot=slot,
                target_id=target.target_id,
                incarnation=target.incarnation,
                pool=pool.name,
                source=source,
                block_tokens=pool.block_size_tokens,
                algorithm=pool.hash_algorithm,
                hash_seed=pool.hash_seed,
                adapter_paths=tuple(zip(facts.adapters, facts.adapter_paths, strict=False)),
            )
        )
    return specs


def _capacity_blocks(pool: Pool, target: Target) -> int:
    size = pool.block_size_tokens or target.facts.block_size_tokens
    if not size or not target.facts.kv_capacity_tokens:
        return UNKNOWN_CAPACITY_BLOCKS
    return -(-target.facts.kv_capacity_tokens // size)


class RateBudget:
    """Lets the pool with the most events rest when all together have been over the budget for some seconds."""

    def __init__(self, blocks_per_s: float) -> None:
        self._limit = blocks_per_s
        self._last: dict[str, int] = {}
        self._last_s = 0.0
        self._over_since_s: float | None = None
        self.rates: dict[str, float] = {}
        """Blocks a second of each pool over the last interval."""

    def observe(self, statuses: Iterable[FeedStatus], now_s: float) -> str | None:
        """The pool that is to rest now, if any. To be called about once a second."""
        totals: dict[str, int] = {}
        for status in statuses:
            totals[status.pool] = totals.get(status.pool, 0) + status.blocks
        elapsed_s = now_s - self._last_s
        if self._last_s and elapsed_s > 0:
            self.rates = {
                pool: max(0, blocks - self._last.get(pool, blocks)) / elapsed_s for pool, blocks in totals.items()
            }
        self._last, self._last_s = totals, now_s
        if sum(self.rates.values()) <= self._limit:
            self._over_since_s = None
            return None
        if self._over_since_s is None:
            self._over_since_s = now_s
        if now_s - self._over_since_s < OVER_AFTER_S:
            return None
        self._over_since_s = None
        return max(self.rates, key=lambda pool: (self.rates[pool], pool))
