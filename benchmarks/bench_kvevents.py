"""What KV events cost: taking them in, keeping the index, looking prompts up in it, hashing prompts.

Engines with full caches of 16-token blocks publish as fast as they can (ready-made batches from another process, over
real ZMQ sockets): every batch stores a prompt's blocks and evicts as many, one event each, as vLLM does. The agent's
subscriber takes them in; the figure is its CPU time, that of the ZMQ I/O thread included. An event is one block stored
or removed.
"""

import argparse
import functools
import json
import multiprocessing
import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import msgspec
import zmq

from router.kvevents.feed import FeedState
from router.kvevents.index_writer import Changes, KvIndexWriter, memory_bytes
from router.kvevents.limits import DEFAULT_BLOCKS_PER_S
from router.kvevents.source import Source
from router.kvevents.subscriber import FeedSpec, Subscriber
from router.routing.kv_hash import PromptBlocks
from router.routing.kv_index import KvIndexReader, ViewState, buckets_for, capacity_blocks, index_bytes
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import HashAlgorithm

BLOCK_TOKENS = 16
PROMPT_BLOCKS = (4, 30, 128)
"""Blocks stored by one step of an engine: a short prompt, a usual one, one chunk of a long one."""
CACHE_BLOCKS = 30_000
"""An 8B model on an 80 GB GPU."""
CHAIN_BLOCKS = 8192
"""128k tokens."""


def batches(engine: int, count: int) -> Iterator[tuple[bytes, int]]:
    """(payload, blocks stored and removed) of successive steps of an engine; its cache is full after the first ones.
    Evicted is what was used least recently, each prompt from its tail."""
    chance = random.Random(engine)
    hasher = BlockHasher(BLOCK_TOKENS)
    cached: deque[int] = deque()
    for step in range(count):
        ids = [chance.randrange(128_000) for _ in range(chance.choice(PROMPT_BLOCKS) * BLOCK_TOKENS)]
        stored = hasher.chain(ids)
        events = []
        while len(cached) + len(stored) > CACHE_BLOCKS // 10:
            removed = {"type": "BlockRemoved", "block_hashes": [cached.popleft()], "medium": "GPU", "group_idx": 0}
            events.append(removed)
        cached.extend(reversed(stored))
        events.append(
            {
                "type": "BlockStored",
                "block_hashes": stored,
                "parent_block_hash": None,
                "token_ids": ids,
                "block_size": BLOCK_TOKENS,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None] * len(stored),
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
        )
        yield msgspec.msgpack.encode([1e9 + step, events, 0]), len(events) - 1 + len(stored)


def publish(engines: int, steps: int, pipe: Connection) -> None:
    """The engines' process: tells its ports, waits for a word, sends everything, says how much, waits for the end."""
    context = zmq.Context()
    sockets = []
    for _ in range(engines):
        socket = context.socket(zmq.PUB)
        socket.set_hwm(0)
        socket.bind("tcp://127.0.0.1:0")
        sockets.append(socket)
    made = [list(batches(engine, steps)) for engine in range(engines)]
    pipe.send([socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in sockets])
    pipe.recv()
    for step in range(steps):
        for socket, queue in zip(sockets, made, strict=True):
            socket.send_multipart((b"", step.to_bytes(8, "big"), queue[step][0]))
        time.sleep(0)
    pipe.send((sum(blocks for queue in made for _, blocks in queue), engines * steps))
    pipe.recv()
    context.destroy(linger=0)


def measure_intake(engines: int, steps: int) -> dict[str, float]:
    """Blocks a second of one core that the subscriber takes in."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=publish, args=(engines, steps, there), daemon=True)
    child.start()
    endpoints = here.recv()
    buckets = buckets_for(engines * CACHE_BLOCKS)
    region = memoryview(bytearray(index_bytes(engines, buckets)))
    subscriber = Subscriber(KvIndexWriter(region, engines, buckets))
    subscriber.follow(
        FeedSpec(
            slot=slot,
            target_id=f"t-{slot}",
            incarnation=1,
            pool="p",
            source=Source(endpoint=endpoint),
            block_tokens=BLOCK_TOKENS,
            algorithm=HashAlgorithm.SHA256,
        )
        for slot, endpoint in enumerate(endpoints)
    )
    subscriber.start()
    time.sleep(1.0)
    cpu_s = time.process_time()
    started_s = time.monotonic()
    here.send("go")
    blocks, messages = here.recv()
    while sum(status.batches for status in subscriber.status()) < messages:
        if time.monotonic() - started_s > 120 or subscriber.failure:
            raise SystemExit(f"the subscriber did not take everything in: {subscriber.failure}")
        time.sleep(0.02)
    cpu_s = time.process_time() - cpu_s
    elapsed_s = time.monotonic() - started_s
    states = {status.state for status in subscriber.status()}
    gaps = sum(status.gaps for status in subscriber.status())
    subscriber.stop()
    here.send("end")
    child.join(10)
    if states != {FeedState.EXACT} or gaps or subscriber.applied_blocks != blocks:
        raise SystemExit(f"not everything arrived: {states}, {gaps} gaps, {subscriber.applied_blocks} of {blocks}")
    return {
        "events_per_s_per_core": blocks / cpu_s,
        "batches_per_s_per_core": messages / cpu_s,
        "events_per_s": blocks / elapsed_s,
        "cpu_us_per_event": cpu_s / blocks * 1e6,
    }


def idle_cost(targets: int) -> float:
    """Cores that following so many silent targets costs."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 65_535)
    socket = context.socket(zmq.PUB)
    socket.bind("tcp://127.0.0.1:0")
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    buckets = buckets_for(1000)
    index = KvIndexWriter(memoryview(bytearray(index_bytes(targets, buckets))), targets, buckets)
    subscriber = Subscriber(index)
    subscriber.follow(
        FeedSpec(
            slot=slot,
            target_id=f"t-{slot}",
            incarnation=1,
            pool="p",
            source=Source(endpoint=endpoint, topic=f"{slot}"),
            block_tokens=BLOCK_TOKENS,
            algorithm=HashAlgorithm.SHA256,
        )
        for slot in range(targets)
    )
    subscriber.start()
    time.sleep(2.0)
    cpu_s, started_s = time.process_time(), time.monotonic()
    time.sleep(3.0)
    cores = (time.process_time() - cpu_s) / (time.monotonic() - started_s)
    subscriber.stop()
    context.destroy(linger=0)
    return cores


def best_us(work: Callable[[], object], times: int, rounds: int = 7) -> float:
    """Microseconds of one call, in the best of several rounds."""
    found = []
    for _ in range(rounds):
        started = time.process_time_ns()
        for _ in range(times):
            work()
        found.append((time.process_time_ns() - started) / times / 1e3)
    return min(found)


def measure_lookups() -> dict[str, float]:
    """Microseconds of a reader's questions about a prompt of 128k tokens, with an index three quarters full."""
    slots, entries = 64, 500_000
    buckets = buckets_for(entries)
    region = memoryview(bytearray(index_bytes(slots, buckets)))
    writer, reader = KvIndexWriter(region, slots, buckets), KvIndexReader(region)
    chance = random.Random(1)
    chain = [chance.getrandbits(64) for _ in range(CHAIN_BLOCKS)]
    changes = Changes()
    for slot, depth in enumerate((CHAIN_BLOCKS, CHAIN_BLOCKS * 5 // 8, 100)):
        changes.stored(slot, chain[:depth], None)
    for slot in range(slots):
        changes.stored(slot, [chance.getrandbits(64) for _ in range(6000)], None)
        writer.set_view(slot, ViewState.EXACT, BLOCK_TOKENS)
    writer.apply(changes.batch())
    hashes = tuple(chain)
    return {
        "lookup_us_all": best_us(lambda: reader.leading_blocks(0, hashes), 2000),
        "lookup_us_part": best_us(lambda: reader.leading_blocks(1, hashes), 2000),
        "lookup_us_none": best_us(lambda: reader.leading_blocks(40, hashes), 2000),
        "last_storer_us": best_us(lambda: reader.last_storer(hashes), 2000),
    }


def measure_hashing() -> dict[str, float]:
    """Microseconds to hash 1,000 tokens, and to recognise a prompt of 32k tokens that was met before."""
    chance = random.Random(2)
    ids = array("I", (chance.randrange(128_000) for _ in range(32_000)))
    found = {}
    for size in (16, 128):
        for algorithm in (HashAlgorithm.SHA256, HashAlgorithm.SHA256_CBOR):
            hasher = BlockHasher(size, algorithm)
            work = functools.partial(hasher.chain, ids)
            found[f"hash_us_per_1k_tokens_{algorithm.value}_{size}"] = best_us(work, 2) / 32
    blocks = PromptBlocks(BlockHasher(BLOCK_TOKENS))
    blocks.work(ids).step(1 << 30)
    found["recognise_us_per_1k_tokens"] = best_us(lambda: blocks.work(ids).step(1), 20) / 32
    found["cold_prompt_us"] = best_us(
        lambda: PromptBlocks(BlockHasher(BLOCK_TOKENS)).work(ids).step(256, lambda block_hash: False), 50
    )
    return found


def main() -> None:
    """Run all and print a table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1500, help="batches of each engine")
    parser.add_argument("--idle-targets", type=int, default=500)
    options = parser.parse_args()
    sys.stderr.write("taking events in ...\n")
    result: dict[str, float] = measure_intake(options.engines, options.steps)
    buckets = buckets_for(1_000_000)
    result["bytes_per_block"] = memory_bytes(4096, buckets) / capacity_blocks(buckets)
    result["shared_bytes_per_block"] = index_bytes(4096, buckets) / capacity_blocks(buckets)
    result["default_budget_events_per_s"] = DEFAULT_BLOCKS_PER_S
    sys.stderr.write("idle targets ...\n")
    result[f"idle_cores_{options.idle_targets}_targets"] = idle_cost(options.idle_targets)
    sys.stderr.write("look-ups and hashing ...\n")
    result |= measure_lookups()
    result |= measure_hashing()
    width = max(map(len, result))
    for name, value in result.items():
        sys.stdout.write(f"{name:<{width}}  {value:>14,.3f}\n")
    sys.stdout.write(f"RESULT {json.dumps({name: round(value, 4) for name, value in result.items()})}\n")


if __name__ == "__main__":
    main()
