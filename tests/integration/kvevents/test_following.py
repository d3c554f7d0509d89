"""The agent's view of caches against the truth of emulated engines, over real sockets."""

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.emulators import Emulator, kv_events, post
from support.following import BLOCK, Following, table, target

from router.routing.kv_index import ViewState
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import HashAlgorithm

SMALL = ("--profile", "h100-8b-tp1", "--model", "m", "--kv-capacity-tokens", str(BLOCK * 300), "--time-scale", "200")
CALLS, PROMPTS = 250, 40


def prompt(chance: random.Random) -> list[int]:
    """A prompt that shares its beginning with some others and ends anywhere."""
    family = chance.randrange(30)
    shared = [family * 100 + index % 50 for index in range(chance.choice((0, 16, 40, 200)))]
    return shared + [chance.randrange(20_000) for _ in range(chance.choice((1, 5, 16, 17, 60, 150)))]


async def call(url: str, prompts: list[list[int]], **fields: Any) -> None:
    body = {"model": "m", "prompt": prompts, "max_tokens": 2, **fields}
    await asyncio.to_thread(post, f"{url}/v1/completions", body)


@pytest.mark.timeout(300)
async def test_the_view_is_the_truth_after_ten_thousand_requests(tmp_path: Path) -> None:
    chance = random.Random(11)
    with Emulator(tmp_path, *SMALL, "--engines", "2", *kv_events(buffer_steps=100_000)) as engines:
        async with Following(tmp_path / "shm") as following:
            fleet = table([target(url, number) for number, url in enumerate(engines.urls)])
            following.service.set_table(fleet)
            await following.until(lambda: following.targets == {"exact": 2}, "both views are exact")
            asked: list[list[int]] = []
            for at in range(CALLS):
                prompts = [prompt(chance) for _ in range(PROMPTS)]
                salt = {"cache_salt": "s"} if at % 7 == 0 else {}
                asked = prompts if not salt else asked
                await call(engines.urls[at % 2], prompts, **salt)
                if at % 50 == 49:
                    assert_same(following, engines, await at_rest(following, engines))
            assert_same(following, engines, await at_rest(following, engines))
            state = following.service.state()
            assert state["index"]["holes"] == 0
            assert state["targets"] == {"exact": 2}
            series = {line.family.name: line.cells[0] for line in following.service.series()}
            assert series["twofold_kv_index_unknown_removals_total"] == 0
            assert series["twofold_kv_events_blocks_total"] > 10_000
            assert series["twofold_kv_events_verified_total"] >= 16
            check_hits(following, engines, asked)


async def at_rest(following: Following, engines: Emulator) -> list[int]:
    """Wait until the agent has seen all that the engines published; returns the sequence numbers."""

    def seen() -> list[int]:
        subscriber = following.service._subscriber
        statuses = subscriber.status() if subscriber is not None else ()
        return [status.next_sequence for status in sorted(statuses, key=lambda status: status.slot)]

    wanted = [engines.next_sequence(number) for number in range(len(engines.urls))]
    await following.until(lambda: seen() == wanted, f"batches {wanted} are taken in")
    return wanted


def assert_same(following: Following, engines: Emulator, sequences: list[int]) -> None:
    for slot in range(len(sequences)):
        truth = engines.truth(slot)
        assert truth
        assert following.blocks(slot) == truth


def check_hits(following: Following, engines: Emulator, prompts: list[list[int]]) -> None:
    """What a relay reads is what the engine's own look-up finds."""
    reader = following.reader
    assert reader is not None
    hasher = BlockHasher(BLOCK)
    truths = [engines.truth(slot) for slot in range(2)]
    hits = 0
    for ids in prompts:
        hashes = hasher.chain(ids)
        for slot, truth in enumerate(truths):
            leading = next((depth for depth, name in enumerate(hashes) if name not in truth), len(hashes))
            assert reader.leading_blocks(slot, hashes) == leading
            hits += leading
    assert hits > 0


async def test_ranks_have_caches_of_their_own(tmp_path: Path) -> None:
    with Emulator(tmp_path, *SMALL, "--data-parallel-size", "2", *kv_events()) as engines:
        async with Following(tmp_path / "shm") as following:
            url = engines.urls[0]
            following.service.set_table(table([target(url, rank, rank=rank) for rank in range(2)]))
            await following.until(lambda: following.targets == {"exact": 2}, "both ranks are followed")
            for number in range(8):
                await call(url, [[number] * 40])
            truths = [engines.truth(0, rank) for rank in range(2)]
            assert all(truths)
            assert truths[0] != truths[1]
            await following.until(
                lambda: [following.blocks(slot) for slot in range(2)] == truths, "each rank's own blocks"
            )


async def test_a_restarted_engine_begins_with_an_empty_cache(tmp_path: Path) -> None:
    port, replay_port = await asyncio.to_thread(free_ports)
    config = kv_events(endpoint=f"tcp://*:{port}", replay_endpoint=f"tcp://127.0.0.1:{replay_port}")
    engines = Emulator(tmp_path, *SMALL, *config)
    with engines:
        async with Following(tmp_path / "shm") as following:
            following.service.set_table(table([target(engines.urls[0], 0)]))
            await call(engines.urls[0], [[1] * 100, [2] * 100])
            await following.until(lambda: following.blocks(0) == engines.truth(), "what was there before is known")
            engines.kill()
            engines.start()
            await call(engines.urls[0], [[3] * 100])
            await following.until(lambda: following.blocks(0) == engines.truth(), "the new life alone")
            assert following.view(0) is ViewState.EXACT
            status = following.service.state()
            assert status["targets"] == {"exact": 1}
            engines.kill()
            engines.start()
            moved = target(engines.urls[0], 0, incarnation=2)
            following.service.set_table(table([moved]))
            await following.until(lambda: following.blocks(0) == {}, "a new incarnation has nothing")


async def test_a_late_subscriber_and_a_short_buffer(tmp_path: Path) -> None:
    with Emulator(tmp_path, *SMALL, "--enable-dev-mode", *kv_events(buffer_steps=4)) as engines:
        url = engines.urls[0]
        for number in range(20):
            await call(url, [[number] * 40])
        async with Following(tmp_path / "shm") as following:
            following.service.set_table(table([target(url, 0)]))
            await following.until(lambda: following.targets == {"partial": 1}, "the beginning is lost")
            assert following.view(0) is ViewState.PARTIAL
            known, truth = following.blocks(0), engines.truth()
            assert known
            assert known.items() < truth.items()
            assert following.service.state()["not_exact"][0]["state"] == "partial"
            await asyncio.to_thread(post, f"{url}/reset_prefix_cache", {})
            await call(url, [[77] * 40])
            await following.until(lambda: following.targets == {"exact": 1}, "a reset makes all known again")
            assert following.blocks(0) == engines.truth()


@pytest.mark.parametrize(
    ("flags", "fields", "state"),
    [
        (("--prefix-caching-hash-algo", "sha256_cbor"), {}, "hash-mismatch"),
        ((), {"hash_seed": "7"}, "hash-mismatch"),
        ((), {"block_size_tokens": 32}, "block-size-mismatch"),
    ],
)
async def test_engines_that_differ_from_their_pool_are_not_believed(
    tmp_path: Path, flags: tuple[str, ...], fields: dict[str, Any], state: str
) -> None:
    with Emulator(tmp_path, *SMALL, *flags, *kv_events()) as engines:
        await call(engines.urls[0], [[5] * 100])
        async with Following(tmp_path / "shm") as following:
            following.service.set_table(table([target(engines.urls[0], 0)], **fields))
            await following.until(lambda: following.targets == {state: 1}, "the difference is seen")
            assert following.view(0) is ViewState.NONE
            assert following.blocks(0) == {}
            labels = {line.values for line in following.service.series() if "targets" in line.family.name}
            assert labels == {("p", state)}
            right = {"hash_algorithm": HashAlgorithm.SHA256_CBOR} if flags else {}
            following.service.set_table(table([target(engines.urls[0], 0)], **right))
            await following.until(lambda: following.targets == {"exact": 1}, "the right configuration is believed")
            assert following.blocks(0) == engines.truth()


async def test_adapters_that_come_and_go_leave_the_view_alone(tmp_path: Path) -> None:
    with Emulator(tmp_path, *SMALL, *kv_events(buffer_steps=1)) as engines:
        async with Following(tmp_path / "shm") as following:
            followed = target(engines.urls[0], 0)
            following.service.set_table(table([followed]))
            await following.until(lambda: following.targets == {"exact": 1}, "followed")
            await call(engines.urls[0], [[5] * 100])
            await call(engines.urls[0], [[6] * 100])
            await following.until(lambda: following.blocks(0) == engines.truth(), "all blocks are known")
            facts = msgspec.structs.replace(followed.facts, adapters=("ad",), adapter_paths=("/ad",))
            following.service.set_table(table([msgspec.structs.replace(followed, facts=facts)]))
            await call(engines.urls[0], [[7] * 100])
            await following.until(lambda: following.blocks(0) == engines.truth(), "still all blocks are known")
            assert following.view(0) is ViewState.EXACT, "the buffer is too short to begin anew"


async def test_hashes_that_nobody_can_compute_leave_the_pool_to_its_own_dispatches(tmp_path: Path) -> None:
    with Emulator(tmp_path, *SMALL, "--prefix-caching-hash-algo", "xxhash", *kv_events()) as engines:
        async with Following(tmp_path / "shm") as following:
            following.service.set_table(table([target(engines.urls[0], 0)], hash_algorithm=HashAlgorithm.XXHASH))
            await following.until(lambda: following.service.state()["pools"], "the pool is looked at")
            assert following.service.state()["pools"]["p"]["state"] == "unsupported-hash"
            assert following.reader is None


async def test_an_engine_without_events_is_named(tmp_path: Path) -> None:
    with Emulator(tmp_path, *SMALL) as engines:
        async with Following(tmp_path / "shm") as following:
            following.service.set_table(table([target(engines.urls[0], 0)]))
            await following.until(lambda: following.service.state()["problems"], "the worker is asked")
            assert list(following.service.state()["problems"].values()) == ["publishes no KV events"]


async def test_budgets_let_a_pool_fall_back_visibly(tmp_path: Path) -> None:
    with Emulator(tmp_path, *SMALL, *kv_events()) as engines:
        async with Following(tmp_path / "shm", max_blocks=100) as following:
            following.service.set_table(table([target(engines.urls[0], 0)]))
            await following.until(lambda: following.service.state()["pools"], "the pool is looked at")
            assert following.service.state()["pools"]["p"]["state"] == "index-full"
        async with Following(tmp_path / "shm2", max_blocks_per_s=1.0) as following:
            following.service.set_table(table([target(engines.urls[0], 0)]))
            await following.until(lambda: following.targets == {"exact": 1}, "followed at first")
            number = 0

            def rests() -> bool:
                nonlocal number
                number += 1
                post(f"{engines.urls[0]}/v1/completions", {"model": "m", "prompt": [number] * 64, "max_tokens": 1})
                return bool(following.service.state()["pools"]["p"]["state"] == "rate-exceeded")

            await following.until(rests, "too many events")
            await following.until(lambda: following.view(0) is ViewState.NONE, "readers have no view")
            await following.until(lambda: following.targets == {}, "nothing is followed")


async def test_an_index_grows_with_its_content(tmp_path: Path) -> None:
    with Emulator(tmp_path, *SMALL, *kv_events()) as engines:
        async with Following(tmp_path / "shm") as following:
            small = msgspec.structs.replace(target(engines.urls[0], 0).facts, kv_capacity_tokens=BLOCK * 8)
            following.service.set_table(table([target(engines.urls[0], 0, facts=small)]))
            await following.until(lambda: following.view(0) is ViewState.EXACT, "followed")
            capacity = following.service.state()["index"]["capacity_blocks"]
            for number in range(20):
                await call(engines.urls[0], [[number * 10 + index] * 64 for index in range(4)])
            await following.until(lambda: following.blocks(0) == engines.truth(), "all blocks are known")
            assert following.service.state()["index"]["capacity_blocks"] > capacity
            reader = following.reader
            assert reader is not None
            assert reader.leading_blocks(0, BlockHasher(BLOCK).chain([190] * 64)) == 4


def free_ports() -> tuple[int, int]:
    import socket

    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]
