"""Sources, plans, budgets and verification of KV events."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from router.kvevents import wire
from router.kvevents.feed import FeedCounters, FeedState
from router.kvevents.plan import OVER_AFTER_S, PoolState, RateBudget, feed_specs, plan_pools
from router.kvevents.source import Source, SourceError, parse_sources
from router.kvevents.subscriber import FeedStatus
from router.kvevents.verify import matches
from router.routing.table import RoutingTable
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import EngineFacts, FleetSnapshot, HashAlgorithm, Health, Pool, Target

RECORDINGS = Path(__file__).parent / "recordings"
WORKER = "http://10.1.2.3:8000"


def answer(**fields: Any) -> bytes:
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:5601",
        "replay_endpoint": "tcp://*:5701",
        "buffer_steps": 10_000,
        "hwm": 100_000,
        "max_queue_size": 100_000,
        "topic": "",
    }
    return json.dumps({"0": {**config, **fields}}).encode()


def test_sources_are_at_the_workers_own_host() -> None:
    assert parse_sources(answer(), WORKER) == {
        0: Source(endpoint="tcp://10.1.2.3:5601", replay_endpoint="tcp://10.1.2.3:5701")
    }
    elsewhere = parse_sources(answer(endpoint="tcp://169.254.169.254:80", topic="kv@m"), WORKER)
    assert elsewhere[0].endpoint == "tcp://10.1.2.3:80", "no worker points routers at another host"
    assert elsewhere[0].topic == "kv@m"
    assert parse_sources(answer(), "http://[::1]:8000")[0].endpoint == "tcp://[::1]:5601"


def test_a_replay_port_that_cannot_be_reached_is_none() -> None:
    assert parse_sources(answer(replay_endpoint="tcp://127.0.0.1:5701"), WORKER)[0].replay_endpoint == ""
    local = parse_sources(answer(replay_endpoint="tcp://127.0.0.1:5701"), "http://localhost:8000")
    assert local[0].replay_endpoint == "tcp://localhost:5701"
    assert parse_sources(answer(replay_endpoint=None), WORKER)[0].replay_endpoint == ""
    assert parse_sources(answer(buffer_steps=0), WORKER)[0].replay_endpoint == "", "nothing is ever replayed"


def test_engines_without_events_have_no_source() -> None:
    assert parse_sources(b"{}", WORKER) == {}
    assert parse_sources(answer(enable_kv_cache_events=False), WORKER) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"0": 1}',
        answer(endpoint="ipc:///x"),
        answer(endpoint="tcp://*:0"),
        answer(endpoint="tcp://*:99999"),
    ],
)
def test_other_answers_are_refused(body: bytes) -> None:
    with pytest.raises(SourceError):
        parse_sources(body, WORKER)


def table(*pools: Pool, targets: tuple[Target, ...] = ()) -> RoutingTable:
    snapshot = FleetSnapshot(epoch=1, version=1, pools=pools, targets=targets)
    return RoutingTable(snapshot=snapshot, slots={target.target_id: number for number, target in enumerate(targets)})


def pool(name: str, **fields: Any) -> Pool:
    return Pool(name=name, models=(name,), **{"kv_events": True, "block_size_tokens": 16, **fields})


def member(name: str, pool: str, tokens: int = 1600, **fields: Any) -> Target:
    return Target(
        **{
            "target_id": name,
            "worker_id": name,
            "pool": pool,
            "url": WORKER,
            "profile": "p",
            "ordinal": 0,
            "weight_tokens_s": 1.0,
            "facts": EngineFacts(kv_capacity_tokens=tokens),
            **fields,
        }
    )


def test_plans_say_why_a_pool_is_not_followed() -> None:
    pools = (
        pool("fine"),
        pool("random", hash_algorithm=HashAlgorithm.XXHASH),
        pool("sizeless", block_size_tokens=0),
        pool("quiet", kv_events=False),
        pool("busy"),
    )
    plans = plan_pools(table(*pools), {"busy": 50.0}, 10.0, 1000)
    assert {plan.pool: plan.state for plan in plans} == {
        "fine": PoolState.FOLLOWED,
        "random": PoolState.UNSUPPORTED_HASH,
        "sizeless": PoolState.BLOCK_SIZE_UNKNOWN,
        "busy": PoolState.RATE_EXCEEDED,
    }
    assert plan_pools(table(*pools), {"busy": 50.0}, 60.0, 1000)[-1].state is PoolState.FOLLOWED


def test_the_largest_pools_fall_back_when_the_index_is_too_small() -> None:
    targets = (member("a", "small"), *(member(f"b{i}", "large", 16_000) for i in range(3)))
    made = table(pool("small"), pool("large"), targets=targets)
    states = {plan.pool: plan.state for plan in plan_pools(made, {}, 0.0, 2000)}
    assert states == {"small": PoolState.FOLLOWED, "large": PoolState.INDEX_FULL}
    assert {plan.state for plan in plan_pools(made, {}, 0.0, 3100)} == {PoolState.FOLLOWED}


def test_specs_of_the_targets_to_follow() -> None:
    facts = EngineFacts(adapters=("ad1", "ad2"), adapter_paths=("/a1", "/a2"))
    targets = (
        member("a", "p", facts=facts, incarnation=4),
        member("b", "p", worker_id="dp", data_parallel_rank=1),
        member("gone", "p", worker_id="a", health=Health.GONE),
        member("unknown", "p"),
        member("other", "q", worker_id="a"),
    )
    made = table(pool("p", hash_seed="3"), pool("q", block_size_tokens=0), targets=targets)
    sources = {"a": {0: Source(endpoint="tcp://h:1")}, "dp": {1: Source(endpoint="tcp://h:2")}}
    one, two = feed_specs(made, plan_pools(made, {}, 0.0, 1 << 20), sources)
    assert (one.slot, one.target_id, one.incarnation, one.hash_seed) == (0, "a", 4, "3")
    assert one.adapter_paths == (("ad1", "/a1"), ("ad2", "/a2"))
    assert (two.slot, two.source.endpoint) == (1, "tcp://h:2")


def status(pool: str, blocks: int) -> FeedStatus:
    fields = dict.fromkeys(FeedCounters.__slots__, 0) | {"blocks": blocks}
    return FeedStatus(target_id="t", pool=pool, slot=0, state=FeedState.EXACT, next_sequence=0, pending=0, **fields)


def test_the_busiest_pool_rests_after_some_seconds_over_the_budget() -> None:
    budget = RateBudget(100.0)
    rested = [
        budget.observe([status("a", 90 * second), status("b", 60 * second)], float(second)) for second in range(1, 12)
    ]
    assert rested.count("a") == 1
    assert rested.index("a") >= OVER_AFTER_S
    assert set(rested) == {"a", None}
    calm = RateBudget(100.0)
    assert not any(calm.observe([status("a", 99 * second)], float(second)) for second in range(1, 30))
    assert calm.rates == {"a": 99.0}


def test_a_short_burst_is_no_reason() -> None:
    budget = RateBudget(100.0)
    blocks = 0
    for second in range(1, 60):
        blocks += 1000 if second % 6 == 0 else 10
        assert budget.observe([status("a", blocks)], float(second)) is None


def event(**fields: Any) -> wire.BlockStored:
    made = {"type": "BlockStored", "parent_block_hash": None, "block_size": 4, "medium": "GPU", **fields}
    batch = wire.decode(msgspec.msgpack.encode([1.0, [made]]))
    (found,) = batch.events
    assert isinstance(found, wire.BlockStored)
    return found


def test_verification_knows_every_extra_key() -> None:
    hasher = BlockHasher(4)
    ids = list(range(8))
    keys = [("lora", "ad", "/ad"), ("mm", "image", -2), ("cache_salt", "s"), ("prompt_embeds", b"digest")]
    first = hasher.block(hasher.root, ids[:4], tuple(keys))
    second = hasher.block(first, ids[4:], (keys[0],))
    stored = event(
        block_hashes=[first, second],
        token_ids=ids,
        lora_name="ad",
        extra_keys=[["ad", ["image", -2], "s", b"digest"], ["ad"]],
    )
    assert matches(stored, hasher, {"ad": "/ad"}) is True
    assert matches(stored, hasher, {"ad": "/elsewhere"}) is False
    assert matches(stored, hasher, {}) is None, "without the adapter's path it cannot be told"
    assert matches(stored, BlockHasher(4, seed="1"), {"ad": "/ad"}) is False


def test_what_cannot_be_verified() -> None:
    hasher = BlockHasher(4)
    assert matches(event(block_hashes=[1], token_ids=[1] * 4, parent_block_hash=5), hasher, {}) is None
    assert matches(event(block_hashes=[1], token_ids=[1] * 3), hasher, {}) is None
    with pytest.raises(wire.WireError):
        matches(event(block_hashes=[1], token_ids="no ids"), hasher, {})
    with pytest.raises(wire.WireError):
        matches(event(block_hashes=[1], token_ids=[1] * 4, extra_keys=7), hasher, {})


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93\x01\x90", msgspec.msgpack.encode([1.0, [{"type": "New"}]])])
def test_garbage_is_no_batch(payload: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(payload)


def test_recorded_batches_decode() -> None:
    decoded = 0
    for path in sorted(RECORDINGS.glob("*.json")):
        for message in json.loads(path.read_text())["messages"]:
            batch = wire.decode(msgspec.msgpack.encode(message["decoded"]))
            assert batch.data_parallel_rank == 0
            for made, told in zip(batch.events, message["decoded"][1], strict=True):
                assert type(made).__name__ == told["type"]
                if isinstance(made, wire.BlockStored):
                    assert wire.token_ids(made) == told["token_ids"]
                    assert wire.extra_keys(made) == told["extra_keys"]
                decoded += 1
    assert decoded > 60
