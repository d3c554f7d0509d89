"""A relay's live view of the fleet, and the only writer of its accounts."""

from collections.abc import Collection
from typing import NamedTuple

from router.routing import circuit
from router.routing.accounts import AccountsReader, AccountsWriter
from router.routing.buffers import Buffers
from router.routing.dirty_log import DirtyReader
from router.routing.escapes import Escapes
from router.routing.loads import Loads, OwnLog
from router.routing.policies import DEFAULT, POLICIES
from router.routing.policies.common import no_pool, pinned
from router.routing.popularity import Popularity
from router.routing.prefix import scheduled_count, scheduled_hashes
from router.routing.prefix_table import PrefixReader, PrefixWriter
from router.routing.sent_prefixes import SentPrefixes, SentPrefixReader
from router.routing.state import KvView, PoolState, TargetState
from router.routing.table import RoutingTable
from router.routing.ticket import Ticket
from router.routing.types import Decision, RequestFeatures, Resolved
from twofold.model.fleet import FleetSnapshot, Pool, RoutingPolicy, Target
from twofold.model.profile import EngineProfile

POPULARITY_ENTRIES = 65_536


class Usage(NamedTuple):
    """See ``LiveFleet.usage``."""

    popularity_entries: int
    popularity_generations: int
    prefix_evictions: int
    dirty_rescans: int


class LiveFleet:
    """Snapshot, rings, accounts and caches of one relay; implements ``state.FleetView``.

    ``decide`` changes nothing that a later decision sees; ``account`` and the Ticket it returns do.
    """

    def __init__(self, buffers: Buffers) -> None:
        others = (*buffers.siblings, buffers.remote)
        self._slots = buffers.slots
        accounts = AccountsReader((buffers.own.accounts, *(region.accounts for region in others)))
        self._loads = Loads(accounts, tuple(DirtyReader(region.dirty) for region in others))
        self._writer = AccountsWriter(buffers.own.accounts, OwnLog(buffers.own.dirty, self._loads))
        self._prefix_writer = PrefixWriter(buffers.own.prefixes)
        self._sent = SentPrefixes(buffers.sent)
        self._sent_reader = SentPrefixReader(buffers.sent)
        self._escapes = Escapes(self._loads)
        self._pools: dict[str, PoolState] = {}
        self._states: dict[int, TargetState] = {}
        self._models: dict[str, Resolved] = {}
        self._popularity: dict[str, Popularity] = {}
        self._snapshot = FleetSnapshot(epoch=0, version=0)
        self.kv: KvView | None = None
        """Set by the host where engines report their caches; see FleetView."""
        # Both are called for every target examined: no wrappers around them.
        self.load = self._loads.get
        self.cached_chunks = PrefixReader(buffers.own.prefixes).cached_chunks

    @property
    def snapshot(self) -> FleetSnapshot:
        """The snapshot installed last; epoch 0 before the first."""
        return self._snapshot

    def install(self, table: RoutingTable, rings: memoryview) -> None:
        """Goes over to a new table. ``rings`` must stay mapped until the next call.

        Targets that did not change keep their state; a new incarnation starts with an empty cache, no correction and
        a closed circuit. Raises ValueError where the table needs more slots than the buffers have.
        """
        if max(table.slots.values(), default=-1) >= self._slots:
            raise ValueError(f"the table needs slot {max(table.slots.values())}, there are {self._slots}")
        snapshot = table.snapshot
        profiles = {profile.name: profile for profile in snapshot.profiles}
        pools = {pool.name: pool for pool in snapshot.pools}
        states = self._next_states(table, pools, profiles)
        members: dict[str, list[TargetState]] = {name: [] for name in pools}
        for state in sorted(states.values(), key=lambda state: state.target_id):
            members[state.target.pool].append(state)
        self._pools = {
            ring.pool: PoolState(
                pools[ring.pool],
                ring.open(rings),
                members[ring.pool],
                profiles[pools[ring.pool].reference_profile].law
                if pools[ring.pool].reference_profile in profiles
                else None,
            )
            for ring in table.rings
            if ring.pool in pools
        }
        self._states = states
        self._models = {}
        for pool in snapshot.pools:
            for name in pool.models:
                self._models.setdefault(name, Resolved(pool=pool))
            for name in pool.adapters:
                self._models.setdefault(name, Resolved(pool=pool, adapter=name))
        self._popularity = {name: counts for name, counts in self._popularity.items() if name in pools}
        self._loads.catch_up()
        self._escapes.install(self._pools)
        self._snapshot = snapshot

    def _next_states(
        self, table: RoutingTable, pools: dict[str, Pool], profiles: dict[str, EngineProfile]
    ) -> dict[int, TargetState]:
        """State by slot; that of a target of which nothing changed is taken over as it is."""
        same_pools = {pool.name for pool in self._snapshot.pools if pools.get(pool.name) == pool}
        same_profiles = {made.name for made in self._snapshot.profiles if profiles.get(made.name) == made}
        states: dict[int, TargetState] = {}
        for target in table.snapshot.targets:
            pool, profile = pools.get(target.pool), profiles.get(target.profile)
            if pool is None or profile is None:
                continue
            slot = table.slots[target.target_id]
            old = self._states.get(slot)
            if old and target.pool in same_pools and target.profile in same_profiles and old.target == target:
                states[slot] = old
            else:
                states[slot] = self._fresh_state(slot, target, old, TargetState(slot, target, profile, pool))
        return states

    def _fresh_state(self, slot: int, target: Target, old: TargetState | None, new: TargetState) -> TargetState:
        same_engine = (
            old is not None
            and old.target_id == target.target_id
            and old.target.incarnation == target.incarnation
            and old.profile == new.profile
        )
        if old is not None and same_engine:
            new.correction = old.correction
        elif self._writer.failures(slot):
            self._writer.set_circuit(slot, 0, 0.0)
        return new

    def resolve(self, model: str) -> Resolved | None:
        """Pool and adapter for a model name or alias; "" means the only pool, where there is only one."""
        if not model and len(self._snapshot.pools) == 1:
            return Resolved(pool=self._snapshot.pools[0])
        return self._models.get(model)

    def models(self) -> tuple[str, ...]:
        """All names that ``resolve`` knows: served names, aliases, adapters, pool by pool."""
        return tuple(self._models)

    def usage(self) -> Usage:
        """How full the bounded parts are and what they had to let go; counts begin with this object."""
        return Usage(
            popularity_entries=sum(len(counts) for counts in self._popularity.values()),
            popularity_generations=sum(counts.generations for counts in self._popularity.values()),
            prefix_evictions=self._prefix_writer.evictions,
            dirty_rescans=self._loads.rescans,
        )

    def target(self, slot: int) -> Target | None:
        """The target at ``slot``, None when it is in no slot of the present table."""
        state = self._states.get(slot)
        return state.target if state else None

    def targets(self) -> tuple[TargetState, ...]:
        """The state of every target of the present table."""
        return tuple(self._states.values())

    @property
    def ready(self) -> bool:
        """Whether there is a snapshot and in it a target that takes work."""
        return any(state.target.takes_work for state in self._states.values())

    def homes(self, pool: str, key: int) -> tuple[str, ...]:
        """Target ids of the homes of ``key``, ring A's first; empty for an unknown pool."""
        state = self._pools.get(pool)
        if state is None:
            return ()
        return tuple(state.by_slot[slot].target_id for slot in state.ring.homes(key) if slot in state.by_slot)

    def decide(self, request: RequestFeatures, now_s: float, exclude: Collection[int] = frozenset()) -> Decision:
        """Where ``request`` goes, with reasons, by the policy of the snapshot. ``exclude``: slots already tried."""
        policy = self._snapshot.policy
        pool = self._pools.get(request.pool)
        self._loads.catch_up()
        if pool is None:
            return no_pool(request, policy, now_s)
        if request.data_parallel_rank is not None and pool.has_ranks:
            return pinned(self, pool, request, policy, now_s, exclude)
        decide = POLICIES.get(policy.name) or POLICIES[DEFAULT]
        return decide(request, self, pool, policy, now_s, exclude)

    def account(self, request: RequestFeatures, decision: Decision, now_s: float) -> Ticket:
        """Puts a decided request on the accounts of its target, before it is sent. Seen at once by all relays of the
        replica, by the others with the next report. Raises ValueError for a rejection."""
        slot = decision.slot
        if slot is None:
            raise ValueError("a rejected request has no target to account for")
        policy = self._snapshot.policy
        chain = request.chain
        if chain and decision.key:
            # Policies without ring keys have no use for popularity either.
            self._counts(request.pool, policy, now_s).count(chain, decision.key_depth, now_s)
        load = self.load(slot)
        state = self._states.get(slot)
        entered = 0
        if state is not None and chain:
            hashes = scheduled_hashes(chain)
            entered = self._prefix_writer.insert(
                state.salt,
                hashes,
                chain[-1],
                load.stored_tokens,
                now_s,
                state.young_tokens,
                scheduled_count(decision.key_depth) - 1 if decision.key_depth > 1 else 0,
                state.common_young_tokens,
            )
            self._sent.append(slot, (*hashes, chain[-1]))
        if load.circuit_until_s and self._writer.failures(slot) >= circuit.THRESHOLD:
            # Half open: this request is the probe, and nothing else goes there until it has told or the time is up.
            failures = self._writer.failures(slot)
            self._writer.set_circuit(slot, failures, now_s + circuit.open_s(failures))
        return Ticket(self._writer, self._prefix_writer, slot, request, decision, state, entered, now_s)

    def record_failure(self, slot: int, now_s: float) -> None:
        """An attempt on the target failed before its first byte. Enough of them in a row open its circuit for a time
        that doubles with each further one."""
        failures = self._writer.failures(slot) + 1
        until_s = now_s + circuit.open_s(failures) if failures >= circuit.THRESHOLD else 0.0
        self._writer.set_circuit(slot, failures, until_s)

    def record_success(self, slot: int) -> None:
        """The target answered: closes its circuit."""
        if self._writer.failures(slot):
            self._writer.set_circuit(slot, 0, 0.0)

    def correct(self, slot: int, predicted_s: float, observed_s: float) -> None:
        """Takes in one observed prefill time beside the one that the profile, without correction, predicts.
        Tickets do this by themselves where the observation means something."""
        state = self._states.get(slot)
        if state is not None and predicted_s > 0 and observed_s > 0:
            state.correct(observed_s / predicted_s)

    def drain_sent_prefixes(self, limit: int = 1024) -> list[tuple[int, list[int]]]:
        """(slot, hashes as of ``prefix.broadcast_hashes``) of the dispatches since the last call. For hosts that run
        relay and broadcast in one process; an agent reads the ring by a SentPrefixReader of its own."""
        return self._sent_reader.drain(limit)

    def pool_state(self, name: str) -> PoolState | None:
        """See FleetView."""
        return self._pools.get(name)

    def ring_key(
        self, request: RequestFeatures, state: PoolState, policy: RoutingPolicy, now_s: float
    ) -> tuple[int, int]:
        """See FleetView."""
        if not request.chain:
            return request.unique_key, 0
        counts = self._popularity.get(request.pool)
        if counts is None:
            return request.chain[0], 1
        return counts.ring_key(
            request.chain, state.ring.members, policy.key_share, policy.key_min_count, now_s, request.unique_key
        )

    def least_work(
        self, request: RequestFeatures, state: PoolState, exclude: Collection[int], now_s: float
    ) -> int | None:
        """See FleetView."""
        return self._escapes.best(request, state, exclude, now_s)

    def _counts(self, pool: str, policy: RoutingPolicy, now_s: float) -> Popularity:
        counts = self._popularity.get(pool)
        if counts is None or counts.half_life_s != policy.key_half_life_s:
            counts = self._popularity[pool] = Popularity(policy.key_half_life_s, now_s, POPULARITY_ENTRIES)
        return counts
