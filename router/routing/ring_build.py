"""Builds both rings of every pool: capacity-weighted consistent hashing with points from SHAKE-128.

Consistent hashing: Karger et al., 1997; two candidates from two independent hashes of a prompt prefix: DualMap
(arXiv 2602.06502), here two per ring. Points of ring A and ring B come from different inputs of a strong hash: weak or
merely salted ones pair the same targets for good.
"""

import hashlib
from collections.abc import Mapping

import msgspec
import numpy as np
import xxhash

from router.routing.table import MAX_SLOTS, PoolRing, RoutingTable
from twofold.model.fleet import EngineLoad, FleetSnapshot, Health, Pool, Target

POINTS_AT_REFERENCE = 160
MIN_POINTS = 16
MAX_POINTS = 1024
_NO_LOAD = EngineLoad()


def build_table(
    snapshot: FleetSnapshot, slots: Mapping[str, int], previous: tuple[RoutingTable, bytes] | None = None
) -> tuple[RoutingTable, bytes]:
    """Routing table of ``snapshot`` and the bytes of its rings.

    ``slots`` names a slot for every target. Rings whose members, weights and slots are as in ``previous`` are copied
    from it; where all are, the very same bytes object is returned. Raises ValueError for a target without a slot, a
    slot out of range or one used twice.
    """
    numbers = [slots.get(target.target_id, -1) for target in snapshot.targets]
    if len(set(numbers)) != len(numbers) or any(not 0 <= number < MAX_SLOTS for number in numbers):
        raise ValueError("every target needs a slot of its own, 0..65535")
    plans = [(pool, _members(snapshot, pool)) for pool in snapshot.pools]
    parts: list[bytes] = []
    rings: list[PoolRing] = []
    offset = 0
    known = {ring.pool: ring for ring in previous[0].rings} if previous else {}
    for pool, members in plans:
        described = _describe(pool, members, slots, offset)
        old = known.get(pool.name)
        if previous and old and old.layout == described.layout:
            part = previous[1][old.offset : old.offset + old.size]
        else:
            part = _build(described, members, slots)
        rings.append(described)
        parts.append(part)
        offset += described.size
    table = RoutingTable(
        snapshot=msgspec.structs.replace(
            snapshot,
            targets=tuple(
                target if target.load == _NO_LOAD else msgspec.structs.replace(target, load=_NO_LOAD)
                for target in snapshot.targets
            ),
        ),
        slots={target.target_id: number for target, number in zip(snapshot.targets, numbers, strict=True)},
        rings=tuple(rings),
    )
    if previous and table.rings == previous[0].rings:
        return table, previous[1]
    return table, b"".join(parts)


def _on_ring(target: Target) -> bool:
    """Whether a target owns keys. What is only out for the moment keeps them, so that they do not move twice."""
    return target.health not in (Health.STARTING, Health.GONE) and not target.draining and target.role != "decode"


def _members(snapshot: FleetSnapshot, pool: Pool) -> list[tuple[str, int]]:
    """(target_id, points) of the pool's ring members, sorted by id, so that nothing depends on the order of targets."""
    capacity = {profile.name: profile.capacity_tokens_s() for profile in snapshot.profiles}
    targets = sorted(
        (target for target in snapshot.targets if target.pool == pool.name and _on_ring(target)),
        key=lambda target: target.target_id,
    )
    weights = {
        target.target_id: target.weight_tokens_s if target.weight_tokens_s > 0 else capacity.get(target.profile, 0.0)
        for target in targets
    }
    reference = capacity.get(pool.reference_profile) or max(weights.values(), default=0.0)
    return [(target_id, _points(weight, reference)) for target_id, weight in weights.items()]


def _points(weight: float, reference: float) -> int:
    if weight <= 0 or reference <= 0:
        return POINTS_AT_REFERENCE
    return min(MAX_POINTS, max(MIN_POINTS, round(POINTS_AT_REFERENCE * min(weight / reference, 1e3))))


def _describe(pool: Pool, members: list[tuple[str, int]], slots: Mapping[str, int], offset: int) -> PoolRing:
    content = msgspec.msgpack.encode((pool.name, members))
    layout = msgspec.msgpack.encode([slots[target_id] for target_id, _ in members])
    version = xxhash.xxh3_64_hexdigest(content)
    return PoolRing(
        pool=pool.name,
        version=version,
        layout=version + xxhash.xxh3_64_hexdigest(layout),
        members=len(members),
        points=sum(points for _, points in members),
        offset=offset,
    )


def _build(ring: PoolRing, members: list[tuple[str, int]], slots: Mapping[str, int]) -> bytes:
    positions, owners, indexes = b"", b"", b""
    numbers = np.array([slots[target_id] for target_id, _ in members], dtype="<u2")
    owner_of_point = np.repeat(numbers, [points for _, points in members]) if members else numbers
    bucket_starts = np.arange(ring.buckets, dtype="<u8") << np.uint64(64 - ring.buckets.bit_length() + 1 & 63)
    for name in ("a", "b"):
        digests = b"".join(
            hashlib.shake_128(f"twofold ring {name}\x00{ring.pool}\x00{target_id}".encode()).digest(8 * points)
            for target_id, points in members
        )
        points = np.frombuffer(digests, dtype="<u8")
        order = np.argsort(points)
        ranked = points[order]
        if np.any(ranked[1:] == ranked[:-1]):
            # Equal positions must keep the order of the members' ids; only the slower stable sort does that.
            order = np.argsort(points, kind="stable")
        positions += ranked.tobytes()
        owners += owner_of_point[order].tobytes()
        index = np.append(np.searchsorted(ranked, bucket_starts), len(ranked))
        indexes += index.astype("<u4").tobytes()
    return b"".join(part + b"\x00" * (-len(part) % 8) for part in (positions, owners, indexes))
