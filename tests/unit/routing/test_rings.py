"""Homes: how many, how evenly, how stable, and the same for everybody."""

import os
import random
import statistics
import subprocess
import sys
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routing import FAST, SLOW, slots_of, snapshot, table_of, target

from router.routing.ring import DualRing
from router.routing.ring_build import build_table
from twofold.model.fleet import FleetSnapshot, Health, Pool

_RNG = random.Random(7)
KEYS = [_RNG.getrandbits(64) for _ in range(20_000)]
KEY = st.integers(min_value=0, max_value=(1 << 64) - 1)


def ring_of(fleet: FleetSnapshot, slots: dict[str, int] | None = None) -> DualRing:
    table, rings = table_of(fleet, slots)
    return table.rings[0].open(memoryview(rings))


def homes_by_id(fleet: FleetSnapshot, keys: list[int], slots: dict[str, int] | None = None) -> list[tuple[str, ...]]:
    numbers = slots_of(fleet) if slots is None else slots
    names = {slot: target_id for target_id, slot in numbers.items()}
    ring = ring_of(fleet, numbers)
    return [tuple(names[slot] for slot in ring.homes(key)) for key in keys]


SMALL_RINGS = {size: ring_of(snapshot([target(i) for i in range(size)])) for size in range(9)}


@given(KEY, st.integers(min_value=0, max_value=8))
def test_a_key_has_four_distinct_homes_or_all_targets_of_a_smaller_pool(key: int, size: int) -> None:
    homes = SMALL_RINGS[size].homes(key)
    assert len(homes) == len(set(homes)) == min(4, size)


@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1])
def test_keys_at_the_ends_of_the_ring_wrap_around(key: int) -> None:
    assert len(SMALL_RINGS[8].homes(key)) == 4


def test_homes_follow_the_points_on_both_rings() -> None:
    """Against a slow, separate reading of the rule."""
    fleet = snapshot([target(i) for i in range(7)])
    table, rings = table_of(fleet)
    described = table.rings[0]
    data = memoryview(rings)[described.offset :]
    n = described.points
    positions = [data[8 * n * i : 8 * n * (i + 1)].cast("Q").tolist() for i in (0, 1)]
    owners = [data[16 * n + 2 * n * i : 16 * n + 2 * n * (i + 1)].cast("H").tolist() for i in (0, 1)]
    for key in KEYS[:300]:
        expected: list[int] = []
        for ring, wanted in ((0, 2), (1, 4)):
            after = [o for p, o in zip(positions[ring], owners[ring], strict=True) if p >= key]
            for owner in after + owners[ring]:
                if len(expected) < wanted and owner not in expected:
                    expected.append(owner)
        assert described.open(memoryview(rings)).homes(key) == tuple(expected)


@pytest.mark.parametrize("size", [8, 40])
def test_a_leaving_target_moves_its_own_keys_only_and_they_are_a_share_of_one_in_n(size: int) -> None:
    before_fleet = snapshot([target(i) for i in range(size)])
    gone = before_fleet.targets[size // 2]
    after_fleet = snapshot([t for t in before_fleet.targets if t is not gone])
    slots = slots_of(before_fleet)
    before = homes_by_id(before_fleet, KEYS, slots)
    after = homes_by_id(after_fleet, KEYS, slots)
    for old, new in zip(before, after, strict=True):
        if gone.target_id not in old:
            assert new == old
        else:
            assert gone.target_id not in new
            assert len(new) == 4
    for place in (0, 2):
        moved = sum(old[place] != new[place] for old, new in zip(before, after, strict=True)) / len(KEYS)
        # A target's share of a ring varies by 8 % (160 points); three such deviations, and what sampling adds.
        assert 0.7 / size <= moved <= 1.35 / size, (place, moved * size)


def test_a_joining_target_takes_keys_and_changes_no_other_home() -> None:
    after_fleet = snapshot([target(i) for i in range(21)])
    new_id = after_fleet.targets[-1].target_id
    before_fleet = snapshot(after_fleet.targets[:-1])
    slots = slots_of(after_fleet)
    before = homes_by_id(before_fleet, KEYS, slots)
    after = homes_by_id(after_fleet, KEYS, slots)
    assert all(old == new for old, new in zip(before, after, strict=True) if new_id not in new)
    touched = sum(new_id in new for new in after) / len(KEYS)
    assert 0.6 * 4 / 21 <= touched <= 1.4 * 4 / 21


def test_shares_follow_capacity_per_gpu_type_and_per_target() -> None:
    fleet = snapshot([target(i, "fast" if i % 2 else "slow") for i in range(60)])
    profile = {t.target_id: t.profile for t in fleet.targets}
    counts = Counter(home for homes in homes_by_id(fleet, KEYS) for home in homes)
    total = sum(counts.values())
    weights = {t.target_id: t.weight_tokens_s for t in fleet.targets}
    expected = {target_id: weight / sum(weights.values()) for target_id, weight in weights.items()}
    for name in ("fast", "slow"):
        members = [target_id for target_id in profile if profile[target_id] == name]
        share = sum(counts[m] for m in members) / total
        assert share == pytest.approx(sum(expected[m] for m in members), rel=0.05)
        ratios = [counts[m] / total / expected[m] for m in members]
        assert statistics.pstdev(ratios) <= 0.08 * statistics.fmean(ratios)


def test_weights_set_the_points_within_bounds() -> None:
    fleet = snapshot([target(0), target(1, "slow"), target(2, weight_tokens_s=1e12), target(3, weight_tokens_s=1e-6)])
    table, rings = table_of(fleet)
    described = table.rings[0]
    owners = memoryview(rings)[16 * described.points : 18 * described.points].cast("H").tolist()
    slow = round(160 * SLOW.capacity_tokens_s() / FAST.capacity_tokens_s())
    assert Counter(owners) == {0: 160, 1: slow, 2: 1024, 3: 16}


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(9)), st.permutations(range(9)))
def test_neither_the_order_of_targets_nor_their_slots_matter(order: list[int], slot_order: list[int]) -> None:
    ordered = snapshot([target(i) for i in range(9)])
    shuffled = snapshot([target(i) for i in order])
    slots = {f"w{i:04d}": slot_order[i] * 3 for i in range(9)}
    keys = KEYS[:200]
    assert homes_by_id(shuffled, keys, slots) == homes_by_id(ordered, keys)
    assert ring_of(shuffled, slots).version == ring_of(ordered).version


def test_homes_are_the_same_in_another_process_with_another_hash_seed() -> None:
    script = (
        "from support.routing import *\n"
        "from twofold.model.fleet import *\n"
        "import random\n"
        "fleet = snapshot([target(i, ('fast', 'slow')[i % 2]) for i in range(30)])\n"
        "table, rings = table_of(fleet)\n"
        "ring = table.rings[0].open(memoryview(rings))\n"
        "rng = random.Random(7)\n"
        "print(ring.version, [ring.homes(rng.getrandbits(64)) for _ in range(500)])\n"
    )
    outputs = set()
    for seed in ("0", "1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        outputs.add(done.stdout)
    fleet = snapshot([target(i, ("fast", "slow")[i % 2]) for i in range(30)])
    ring = ring_of(fleet)
    rng = random.Random(7)
    outputs.add(f"{ring.version} {[ring.homes(rng.getrandbits(64)) for _ in range(500)]}\n")
    assert len(outputs) == 1


def test_unchanged_membership_and_weights_reuse_the_rings() -> None:
    fleet = snapshot([target(i) for i in range(6)])
    first = build_table(fleet, slots_of(fleet))
    busy = msgspec.structs.replace(
        fleet,
        version=2,
        targets=tuple(
            msgspec.structs.replace(t, health=Health.SUSPECT if t.ordinal == 2 else t.health) for t in fleet.targets
        ),
    )
    second = build_table(busy, slots_of(fleet), first)
    assert second[1] is first[1]
    assert second[0].rings == first[0].rings
    assert second[0].snapshot.version == 2


def test_a_change_in_one_pool_leaves_the_ring_of_another_as_it_was() -> None:
    def fleet(p_targets: int) -> FleetSnapshot:
        others = [msgspec.structs.replace(target(100 + i), pool="q") for i in range(5)]
        base = snapshot([target(i) for i in range(p_targets)] + others)
        return msgspec.structs.replace(base, pools=(*base.pools, Pool(name="q", models=("q",))))

    slots = slots_of(fleet(6)) | {"w0006": 50}
    first = build_table(fleet(6), slots)
    second = build_table(fleet(7), slots, first)
    fresh = build_table(fleet(7), slots)
    assert second == fresh
    assert second[0].rings[1].version == first[0].rings[1].version
    old, new = (built[0].rings[1].open(memoryview(built[1])) for built in (first, second))
    assert [old.homes(key) for key in KEYS[:100]] == [new.homes(key) for key in KEYS[:100]]
    assert second[0].rings[0].version != first[0].rings[0].version


def test_the_version_tells_members_and_weights_apart() -> None:
    versions = {
        ring_of(snapshot(targets)).version
        for targets in (
            [target(i) for i in range(5)],
            [target(i) for i in range(6)],
            [target(i, "slow" if i == 3 else "fast") for i in range(5)],
        )
    }
    assert len(versions) == 3


@pytest.mark.parametrize(
    ("changes", "on_ring"),
    [
        ({"health": Health.SUSPECT}, True),
        ({"health": Health.RECONFIGURING}, True),
        ({"cordoned": True}, True),
        ({"health": Health.STARTING}, False),
        ({"health": Health.GONE}, False),
        ({"draining": True}, False),
        ({"role": "decode"}, False),
    ],
)
def test_what_is_out_for_a_moment_keeps_its_keys(changes: dict[str, object], on_ring: bool) -> None:
    fleet = snapshot([target(0), target(1), target(2, **changes)])
    assert (2 in ring_of(fleet).homes(KEYS[0])) is on_ring


def test_two_thousand_targets_fit_in_eight_megabytes() -> None:
    fleet = snapshot([target(i) for i in range(2000)])
    assert len(table_of(fleet)[1]) <= 8_000_000


@pytest.mark.parametrize("slots", [{}, {"w0000": 0}, {"w0000": 0, "w0001": 0}, {"w0000": 0, "w0001": 65_536}])
def test_impossible_slots_are_refused(slots: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="slot"):
        build_table(snapshot([target(0), target(1)]), slots)
