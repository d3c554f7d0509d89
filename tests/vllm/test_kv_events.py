"""KV events of a real engine: the routers' block hashes are its own, their view of its cache is what it replays, and
what they expect to be cached is what the engine then finds."""

from __future__ import annotations

import asyncio
import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from contract.subjects import REAL, make_adapter
from support.emulators import post
from support.following import Following, table, target

from router.kvevents import wire
from router.kvevents.source import parse_sources
from router.routing.kv_hash import PromptBlocks
from router.tokens.tokenizers import HuggingFaceTokenizer, body_ids
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import EngineFacts, HashAlgorithm

from .vllm_engine import BLOCK_TOKENS, MAX_MODEL_LEN_TOKENS, TINY_MODEL, VllmEngine, free_port, get, kv_events_args

BLOCKS = 40
"""Of the engine's cache: a few long prompts fill it."""
REQUESTS = 150
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "rains")


@pytest.fixture(scope="module", params=[HashAlgorithm.SHA256, HashAlgorithm.SHA256_CBOR])
def engine(
    request: pytest.FixtureRequest, vllm_venv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    made = VllmEngine(
        venv=vllm_venv,
        folder=tmp_path_factory.mktemp("kv-engine"),
        args=(
            *kv_events_args(free_port(), free_port()),
            *("--num-gpu-blocks-override", str(BLOCKS), "--enable-lora", "--max-lora-rank", "8"),
            *("--prefix-caching-hash-algo", request.param.value),
        ),
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )
    made.start()
    made.wait_ready()
    yield made
    made.stop()


def algorithm_of(engine: VllmEngine) -> HashAlgorithm:
    return HashAlgorithm(engine.args[-1])


def prompt_of(chance: random.Random) -> list[int]:
    family = chance.randrange(4)
    shared = [300 + (family * 37 + index * 7) % 600 for index in range(chance.choice((0, 128, 300, 700)))]
    return shared + [chance.randrange(300, 900) for _ in range(chance.choice((3, 60, 130, 400)))]


def replayed(endpoint: str) -> list[wire.EventBatch]:
    """Everything in the engine's replay buffer, read without the code under test."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    dealer = context.socket(zmq.DEALER)
    dealer.set_hwm(0)
    dealer.connect(endpoint)
    dealer.send_multipart([b"", (0).to_bytes(8, "big")])
    batches = []
    try:
        while dealer.poll(10_000):
            _, _, sequence, payload = dealer.recv_multipart()
            if sequence == b"\xff" * 8:
                return batches
            assert int.from_bytes(sequence, "big") == len(batches)
            batches.append(wire.decode(payload))
    finally:
        dealer.close(linger=0)
    raise AssertionError("the engine did not end its replay")


def truth(batches: list[wire.EventBatch]) -> dict[int, int]:
    """Copies by block after all these events."""
    copies: Counter[int] = Counter()
    for batch in batches:
        for event in batch.events:
            if isinstance(event, wire.BlockStored):
                copies.update(wire.short(value) for value in event.block_hashes)
            elif isinstance(event, wire.BlockRemoved):
                copies.subtract(wire.short(value) for value in event.block_hashes)
            else:
                copies.clear()
    assert min(copies.values(), default=0) >= 0
    return dict(+copies)


def complete(engine: VllmEngine, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    fields = {"model": engine.model, "max_tokens": 1, "temperature": 0, **body}
    answer: dict[str, Any] = post(f"{engine.url}{path}", fields, 120)
    return answer


def cached_tokens(answer: dict[str, Any]) -> int:
    found: int = (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
    return found


def published_chains(batches: list[wire.EventBatch]) -> set[int]:
    return {
        wire.short(value)
        for batch in batches
        for event in batch.events
        if isinstance(event, wire.BlockStored)
        for value in event.block_hashes
    }


def test_router_hashes_are_the_engines(engine: VllmEngine, tmp_path: Path) -> None:
    """Token ids, texts, chats, cache salts and adapters; the ids of texts and chats by the router's own tokenizer."""
    replay_endpoint = parse_sources(get(f"{engine.url}/kv_event_sources").encode(), engine.url)[0].replay_endpoint
    blocks = PromptBlocks(BlockHasher(BLOCK_TOKENS, algorithm_of(engine)))
    tokenizer = HuggingFaceTokenizer(TINY_MODEL)
    adapter_path = str(make_adapter(tmp_path / "ad1", REAL))
    post_text(f"{engine.url}/v1/load_lora_adapter", {"lora_name": "ad1", "lora_path": adapter_path})
    cards = json.loads(get(f"{engine.url}/v1/models"))["data"]
    assert {card["id"]: card["root"] for card in cards}["ad1"] == adapter_path
    chance = random.Random(3)
    text = " ".join(chance.choice(WORDS) for _ in range(250))
    system = {"role": "system", "content": " ".join(chance.choice(WORDS) for _ in range(200))}
    user = {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]}
    ids = [300 + index * 11 % 600 for index in range(500)]
    cases: list[tuple[str, dict[str, Any], tuple[str, str] | None]] = [
        ("/v1/completions", {"prompt": ids}, None),
        ("/v1/completions", {"prompt": ids, "cache_salt": "s1"}, None),
        ("/v1/completions", {"prompt": ids, "model": "ad1"}, ("ad1", adapter_path)),
        ("/v1/completions", {"prompt": ids, "model": "ad1", "cache_salt": "s1"}, ("ad1", adapter_path)),
        ("/v1/completions", {"prompt": text}, None),
        ("/v1/chat/completions", {"messages": [system, user]}, None),
        ("/v1/chat/completions", {"messages": [system, user], "cache_salt": "é"}, None),
        ("/v1/chat/completions", {"messages": [system, user], "model": "ad1"}, ("ad1", adapter_path)),
    ]
    for path, body, adapter in cases:
        answer = complete(engine, path, **body)
        prompt = body.get("prompt")
        made = (
            array("I", prompt)
            if isinstance(prompt, list)
            else body_ids(tokenizer, body, chat=path.endswith("chat/completions"))
        )
        assert len(made) == answer["usage"]["prompt_tokens"], body
        work = blocks.work(made, cache_salt=body.get("cache_salt", ""), adapter=adapter)
        assert work.step(1 << 20)
        assert len(work.hashes) >= 2
        assert set(work.hashes) <= published_chains(replayed(replay_endpoint)), body


def post_text(url: str, body: Any) -> str:
    import urllib.request

    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return str(reply.read().decode())


async def test_the_view_is_what_the_engine_replays(engine: VllmEngine, tmp_path: Path) -> None:
    """Random requests with evictions, the subscriber joining late: its view equals the engine's events folded by
    themselves, and tells before each request how many tokens the engine will find."""
    chance = random.Random(5)
    replay_endpoint = parse_sources(get(f"{engine.url}/kv_event_sources").encode(), engine.url)[0].replay_endpoint
    hasher = BlockHasher(BLOCK_TOKENS, algorithm_of(engine))
    facts = EngineFacts(block_size_tokens=BLOCK_TOKENS, kv_capacity_tokens=BLOCK_TOKENS * BLOCKS)
    followed = msgspec.structs.replace(target(engine.url, 0), facts=facts)
    await asyncio.to_thread(complete, engine, prompt=prompt_of(chance))
    async with Following(tmp_path / "shm") as following:
        following.service.set_table(
            table([followed], block_size_tokens=BLOCK_TOKENS, hash_algorithm=algorithm_of(engine))
        )
        await following.until(lambda: following.targets == {"exact": 1}, "the engine is followed")
        hits = 0
        for number in range(REQUESTS):
            ids = prompt_of(chance)[: MAX_MODEL_LEN_TOKENS - 50]
            salt = "s" if number % 9 == 0 else ""
            # A view of the engine at rest: its publisher sends a step's events a moment after the answer.
            wanted = await asyncio.to_thread(lambda: truth(replayed(replay_endpoint)))
            await following.until(lambda wanted=wanted: following.blocks(0) == wanted, "the view is the truth")
            reader = following.reader
            assert reader is not None
            leading = reader.leading_blocks(0, hasher.chain(ids, cache_salt=salt))
            expected = min(leading, (len(ids) - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
            body = {"prompt": ids, "max_tokens": chance.choice((1, 3)), **({"cache_salt": salt} if salt else {})}
            answer = await asyncio.to_thread(lambda body=body: complete(engine, **body))
            assert cached_tokens(answer) == expected
            hits += expected > 0
        assert hits > 10
        batches = await asyncio.to_thread(replayed, replay_endpoint)
        assert any(isinstance(event, wire.BlockRemoved) for batch in batches for event in batch.events)
        state = following.service.state()
        assert state["targets"] == {"exact": 1}
        assert state["index"]["holes"] == 0
