"""The emulator's KV events against those recorded from a real vLLM: fields, order, hashes, replay."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from emulator.model import Adapter, AllBlocksCleared, BlockStored, EngineModel, KvEvent, Request
from emulator.server.kv_events import (
    END_SEQUENCE,
    KvEventsConfig,
    KvPublisher,
    encode_batch,
    offset_endpoint,
    read_config,
)
from twofold import profiles
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import HashAlgorithm

RECORDINGS = Path(__file__).parents[1] / "kvevents" / "recordings"
BLOCK = 128
CASES = {
    "default": (HashAlgorithm.SHA256, 8192),
    "evict_topic_smallbuffer": (HashAlgorithm.SHA256, 20),
    "sha256_cbor_dev": (HashAlgorithm.SHA256_CBOR, 8192),
}


def engine(algorithm: HashAlgorithm = HashAlgorithm.SHA256, blocks: int = 8192) -> EngineModel:
    profile = msgspec.structs.replace(
        profiles.get("cpu-tiny"),
        block_size_tokens=BLOCK,
        kv_capacity_tokens=blocks * BLOCK,
        max_model_len_tokens=2048,
        max_num_batched_tokens=2048,
    )
    return EngineModel(profile, record_events=True, hasher=BlockHasher(BLOCK, algorithm))


def play(model: EngineModel, steps: list[dict[str, Any]]) -> list[tuple[str, list[KvEvent]]]:
    """(step, events) of every batch, the requests of a recording made one after the other."""
    batches: list[tuple[str, list[KvEvent]]] = []
    for number, step in enumerate(steps):
        body = step["request"]["body"]
        if step["request"]["path"] == "/reset_prefix_cache":
            assert model.reset_prefix_cache()
            continue
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        for index, ids in enumerate(prompts):
            salt = body.get("cache_salt") or ""
            model.add(Request(f"{number}-{index}", ids, body["max_tokens"], ignore_eos=True, cache_salt=salt))
        batches += run(model, step["step"])
    return batches


def run(model: EngineModel, name: str) -> list[tuple[str, list[KvEvent]]]:
    found = []
    while model.has_work:
        events = model.step(0.0).events
        if events:
            found.append((name, events))
    return found


def as_recorded(events: list[KvEvent]) -> list[dict[str, Any]]:
    at_s, decoded, rank = msgspec.msgpack.decode(encode_batch(events, 5.0, 0))
    assert (at_s, rank) == (5.0, 0)
    return list(decoded)


def flattened(batches: list[tuple[str, list[dict[str, Any]]]]) -> list[tuple[str, dict[str, Any]]]:
    """Events with their step: which of two prompts sent together share a batch is a matter of microseconds."""
    return [(name, event) for name, events in batches for event in events]


@pytest.mark.parametrize("name", CASES)
def test_recorded_sessions_are_repeated(name: str) -> None:
    """Fields, their order, values and the order of events; blocks that decoding filled differ in their output tokens
    alone, and in what follows from those."""
    recording = json.loads((RECORDINGS / f"{name}.json").read_text())
    algorithm, blocks = CASES[name]
    ours = flattened(
        [(step, as_recorded(events)) for step, events in play(engine(algorithm, blocks), recording["steps"])]
    )
    theirs = flattened([(message["phase"], message["decoded"][1]) for message in recording["messages"]])
    if name == "default":
        # The first two messages of that recording came before the subscriber was there.
        assert recording["messages"][0]["seq"] == 2
    assert [(step, event["type"]) for step, event in ours] == [(step, event["type"]) for step, event in theirs]
    for (step, mine), (_, real) in zip(ours, theirs, strict=True):
        assert list(mine) == list(real), "the same fields in the same order"
        if step.startswith("decode"):
            prompt_tokens = 120
            assert mine["token_ids"][:prompt_tokens] == real["token_ids"][:prompt_tokens]
            mine = {**mine, "token_ids": real["token_ids"], "block_hashes": real["block_hashes"]}
        assert mine == real


def test_payload_bytes_are_equal() -> None:
    recording = json.loads((RECORDINGS / "default.json").read_text())
    message = next(m for m in recording["messages"] if not m["payload_hex"].endswith("..."))
    (event,) = message["decoded"][1]
    stored = BlockStored(
        block_hashes=tuple(event["block_hashes"]),
        parent_block_hash=event["parent_block_hash"],
        token_ids=tuple(event["token_ids"]),
        block_size_tokens=event["block_size"],
        cache_salt="s1" if event["extra_keys"][0] else "",
    )
    assert encode_batch([stored], message["decoded"][0], 0).hex() == message["payload_hex"]


def test_adapters_enter_hashes_and_events() -> None:
    model = engine()
    ids = list(range(300, 600))
    adapter = Adapter(adapter_id=1, name="ad1", path="/adapters/ad1")
    model.add(Request("a", ids, 1, adapter=adapter, cache_salt="s"))
    ((_, events),) = run(model, "lora")
    (event,) = as_recorded(events)
    assert event["block_hashes"] == BlockHasher(BLOCK).chain(ids, cache_salt="s", adapter=("ad1", "/adapters/ad1"))
    assert (event["lora_id"], event["lora_name"]) == (1, "ad1")
    assert event["extra_keys"] == [["ad1", "s"], ["ad1"]]


def test_cleared_says_nothing_else() -> None:
    assert as_recorded([AllBlocksCleared()]) == [{"type": "AllBlocksCleared"}]


def replay(publisher: KvPublisher, start: int) -> list[list[bytes]]:
    """The answer to a replay request, without its first, empty frame."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    dealer = context.socket(zmq.DEALER)
    assert publisher.config.replay_endpoint is not None
    dealer.connect(publisher.config.replay_endpoint)
    dealer.send_multipart([b"", start.to_bytes(8, "big")])
    frames: list[list[bytes]] = []
    deadline_s = time.monotonic() + 10
    try:
        while not frames or frames[-1][1] != END_SEQUENCE:
            publisher.serve_replays()
            if dealer.poll(10):
                empty, *rest = dealer.recv_multipart()
                assert empty == b""
                frames.append(rest)
            assert time.monotonic() < deadline_s
    finally:
        dealer.close(linger=0)
    return frames


@pytest.mark.parametrize("name", CASES)
def test_replay_answers_as_recorded(name: str) -> None:
    recording = json.loads((RECORDINGS / f"{name}.json").read_text())
    small = name == "evict_topic_smallbuffer"
    topic = recording["messages"][0]["topic"]
    config = KvEventsConfig(
        enable_kv_cache_events=True,
        endpoint="tcp://*:0",
        replay_endpoint="tcp://127.0.0.1:0",
        buffer_steps=5 if small else 10_000,
        topic=topic,
    )
    publisher = KvPublisher(config)
    try:
        for _ in range(recording["messages"][-1]["seq"] + 1):
            publisher.publish([AllBlocksCleared()])
        for asked in recording["replay"]:
            frames = replay(publisher, asked["start_seq"])
            numbers = [int.from_bytes(frame[1], "big", signed=True) for frame in frames]
            assert numbers == asked["seqs"]
            assert [frame[0].decode() for frame in frames] == [topic] * (len(frames) - 1) + [""]
            assert frames[-1] == [b"", END_SEQUENCE, b""]
    finally:
        publisher.close()


async def test_subscribers_get_topic_sequence_and_payload() -> None:
    publisher = KvPublisher(KvEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:0", topic="kv@tiny"), rank=3)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt_string(zmq.SUBSCRIBE, "kv@")
    subscriber.connect(publisher.config.endpoint.replace("*", "127.0.0.1"))
    try:
        deadline_s = time.monotonic() + 10
        while not subscriber.poll(0):
            publisher.publish([AllBlocksCleared()])
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.02)
        topic, sequence, payload = subscriber.recv_multipart()
        assert topic == b"kv@tiny"
        assert 0 <= int.from_bytes(sequence, "big") < publisher.next_sequence
        assert msgspec.msgpack.decode(payload)[1:] == [[{"type": "AllBlocksCleared"}], 3]
    finally:
        subscriber.close(linger=0)
        publisher.close()


def test_configuration_is_checked() -> None:
    assert not read_config("").publishes
    assert not read_config('{"enable_kv_cache_events": true, "publisher": "null"}').publishes
    shown = read_config('{"enable_kv_cache_events": true}')
    assert (shown.publishes, shown.publisher, shown.endpoint) == (True, "zmq", "tcp://*:5557")
    for wrong in ("{", '{"unknown": 1}', '{"publisher": "kafka"}', '{"endpoint": "ipc://x"}'):
        with pytest.raises(ValueError, match="kv-events-config"):
            read_config(wrong)
    assert offset_endpoint("tcp://*:5557", 2) == "tcp://*:5559"
    assert offset_endpoint("tcp://*:0", 2) == "tcp://*:0"
    with pytest.raises(ValueError, match="port"):
        offset_endpoint("tcp://*:65535", 1)
