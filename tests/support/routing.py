"""Fleets for tests of the routing core."""

import random
from collections.abc import Mapping, Sequence

import msgspec

from router.routing.buffers import Buffers, in_memory
from router.routing.live import LiveFleet
from router.routing.ring_build import build_table
from router.routing.table import RoutingTable, decode, encode
from router.routing.ticket import Ticket
from router.routing.types import Decision, RequestFeatures
from twofold.model.fleet import FleetSnapshot, Health, Pool, RoutingPolicy, Target
from twofold.model.profile import EngineProfile, StepLaw
from twofold.model.reasons import RouteReason

PREFIX_ENTRIES = 1 << 12
NOW = 1000.0

FAST = EngineProfile(
    name="fast",
    gpu="FAST",
    model_class="8b",
    law=StepLaw(
        base_s=0.006,
        decode_per_seq_s=0.0001,
        decode_per_kv_token_s=1e-8,
        prefill_per_token_s=8e-5,
        prefill_per_token_context_s=2e-9,
    ),
    kv_capacity_tokens=400_000,
)
SLOW = msgspec.structs.replace(FAST.scaled(2.0), name="slow", gpu="SLOW", kv_capacity_tokens=200_000)
PROFILES = {profile.name: profile for profile in (FAST, SLOW)}


def target(number: int, profile: str = "fast", **changes: object) -> Target:
    """Healthy target ``w<number>`` of pool "p"."""
    made = Target(
        target_id=f"w{number:04d}",
        worker_id=f"w{number:04d}",
        pool="p",
        url=f"http://10.0.0.1:{1000 + number}",
        profile=profile,
        ordinal=number,
        weight_tokens_s=PROFILES[profile].capacity_tokens_s(),
        health=Health.HEALTHY,
    )
    return msgspec.structs.replace(made, **changes)


def snapshot(targets: Sequence[Target], policy: RoutingPolicy | None = None, **pool_changes: object) -> FleetSnapshot:
    """Fleet of one pool "p" that serves "m"."""
    pool = msgspec.structs.replace(Pool(name="p", models=("m", "m-alias"), reference_profile="fast"), **pool_changes)
    return FleetSnapshot(
        epoch=1,
        version=1,
        pools=(pool,),
        profiles=(FAST, SLOW),
        targets=tuple(targets),
        policy=policy or RoutingPolicy(),
    )


def slots_of(fleet: FleetSnapshot) -> dict[str, int]:
    """Slots in order of the targets."""
    return {made.target_id: slot for slot, made in enumerate(fleet.targets)}


def table_of(fleet: FleetSnapshot, slots: Mapping[str, int] | None = None) -> tuple[RoutingTable, bytes]:
    """Table as a relay gets it: through its encoded form."""
    table, rings = build_table(fleet, slots_of(fleet) if slots is None else slots)
    return decode(encode(table)), rings


def install(live: LiveFleet, fleet: FleetSnapshot) -> None:
    """Gives ``live`` the fleet."""
    table, rings = table_of(fleet)
    live.install(table, memoryview(rings))


def live_fleets(fleet: FleetSnapshot, relays: int = 1) -> tuple[LiveFleet, ...]:
    """LiveFleets of ``relays`` relays of one replica."""
    return tuple(live_on(fleet, buffers) for buffers in in_memory(max(64, len(fleet.targets)), relays, PREFIX_ENTRIES))


def live_on(fleet: FleetSnapshot, buffers: Buffers) -> LiveFleet:
    """A LiveFleet over ``buffers``."""
    live = LiveFleet(buffers)
    install(live, fleet)
    return live


def request(chain: Sequence[int] = (), **changes: object) -> RequestFeatures:
    """A request for pool "p" whose prompt is 256 tokens a chunk and 40 more."""
    made = RequestFeatures(
        request_id="r",
        pool="p",
        chain=tuple(chain),
        prompt_tokens=256 * len(chain) + 40,
        unique_key=0x9E3779B97F4A7C15,
    )
    return msgspec.structs.replace(made, **changes)


def chain_of(seed: int, length: int) -> tuple[int, ...]:
    """A chain of its own for every seed."""
    rng = random.Random(seed)
    return tuple(rng.getrandbits(64) for _ in range(length))


def one_live(fleet: FleetSnapshot) -> LiveFleet:
    """The LiveFleet of a replica of one relay."""
    return live_fleets(fleet)[0]


def serve(live: LiveFleet, asked: RequestFeatures, now_s: float = NOW) -> Decision:
    """Decides and accounts; the request then ends at once, with its prefix left in the cache."""
    decision = live.decide(asked, now_s)
    ticket = live.account(asked, decision, now_s)
    ticket.assume_first_token(now_s)
    ticket.finish(now_s)
    return decision


def occupy(live: LiveFleet, slot: int, tokens: int, now_s: float = NOW) -> Ticket:
    """A cold request of ``tokens`` tokens that was sent to ``slot`` and has not answered."""
    there = live.target(slot)
    assert there is not None
    asked = request(prompt_tokens=tokens, request_id="load")
    work_s = FAST.law.prefill_work_s(tokens, 0)
    decision = Decision(
        slot, there.target_id, RouteReason.HOME, "load", "p", "twofold", now_s, tokens, (), 0, tokens, work_s, work_s
    )
    return live.account(asked, decision, now_s)
