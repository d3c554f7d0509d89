"""What a routing decision costs: CPU time per request for decide, the accounts and the parsing around it.

CPU time of this thread, so that other processes on the machine count little; the best of several rounds.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterable

import msgspec

from router.routing.buffers import in_memory
from router.routing.features import parse_request, to_features
from router.routing.live import LiveFleet
from router.routing.prefix import chain
from router.routing.ring_build import build_table
from router.routing.types import Endpoint, RequestFeatures, Resolved
from twofold.model.fleet import FleetSnapshot, Health, Pool, Target
from twofold.model.profile import EngineProfile, StepLaw

FLEETS = (10, 100, 2000)
PROMPTS = {"1k": 1, "128k": 512}
"""Prompt name to chunks of 1 KiB text (256 tokens)."""
SHARED_CHUNKS = {"1k": 0, "128k": 64}
"""Chunks that all prompts begin with."""


def fleet_of(size: int) -> FleetSnapshot:
    """``size`` targets of one pool, half of them at half speed."""
    law = StepLaw(
        base_s=0.006,
        decode_per_seq_s=1e-4,
        decode_per_kv_token_s=1e-8,
        prefill_per_token_s=8e-5,
        prefill_per_token_context_s=2e-9,
    )
    fast = EngineProfile(name="fast", gpu="a", model_class="8b", law=law, kv_capacity_tokens=400_000)
    slow = msgspec.structs.replace(fast.scaled(2.0), name="slow")
    profiles = (fast, slow)
    targets = tuple(
        Target(
            target_id=f"w{i:05d}",
            worker_id=f"w{i:05d}",
            pool="p",
            url=f"http://10.0.0.1:{i}",
            profile=profiles[i % 2].name,
            ordinal=i,
            weight_tokens_s=profiles[i % 2].capacity_tokens_s(),
            health=Health.HEALTHY,
        )
        for i in range(size)
    )
    pool = Pool(name="p", models=("m",), reference_profile="fast")
    return FleetSnapshot(epoch=1, version=1, pools=(pool,), profiles=profiles, targets=targets)


def live_fleet(size: int, relays: int) -> tuple[LiveFleet, float, int]:
    """(a relay's live fleet, seconds to build its rings, bytes of the rings)."""
    snapshot = fleet_of(size)
    slots = {target.target_id: i for i, target in enumerate(snapshot.targets)}
    start_s = time.thread_time()
    table, rings = build_table(snapshot, slots)
    built_s = time.thread_time() - start_s
    live = LiveFleet(in_memory(max(size, 16), relays)[0])
    live.install(table, memoryview(rings))
    return live, built_s, len(rings)


def requests_of(prompt: str, count: int, seed: int) -> list[RequestFeatures]:
    """Requests of sessions with three turns each, over a prefix shared by all."""
    rng = random.Random(seed)
    shared = tuple(rng.getrandbits(64) for _ in range(SHARED_CHUNKS[prompt]))
    chunks = PROMPTS[prompt]
    made = []
    for number in range(count):
        if number % 3 == 0:
            session = shared + tuple(rng.getrandbits(64) for _ in range(chunks - len(shared)))
        length = max(1, chunks - 8 * (2 - number % 3))
        made.append(
            RequestFeatures(
                request_id=str(number),
                pool="p",
                chain=session[:length],
                prompt_tokens=256 * length + 40,
                unique_key=rng.getrandbits(64),
            )
        )
    return made


def bench_decisions(size: int, prompt: str, rounds: int, relays: int) -> dict[str, float]:
    """Microseconds per decide, account and (first token + end)."""
    live, _, _ = live_fleet(size, relays)
    best = {"decide": float("inf"), "account": float("inf"), "events": float("inf"), "all": float("inf")}
    now_s = 0.0
    clock = time.thread_time
    for round_number in range(rounds):
        requests = requests_of(prompt, 300, round_number)
        running: list[object] = []
        spent = dict.fromkeys(best, 0.0)
        for request in requests:
            now_s += 0.01
            start = clock()
            decision = live.decide(request, now_s)
            decided = clock()
            ticket = live.account(request, decision, now_s)
            accounted = clock()
            running.append(ticket)
            if len(running) > 8:
                old = running.pop(0)
                before = clock()
                old.assume_first_token(now_s)
                old.finish(now_s)
                spent["events"] += clock() - before
            spent["decide"] += decided - start
            spent["account"] += accounted - decided
        for ticket in running:
            ticket.finish(now_s)
        spent["all"] = spent["decide"] + spent["account"] + spent["events"]
        for name, seconds in spent.items():
            best[name] = min(best[name], 1e6 * seconds / len(requests))
    return best


def best_us(work: Callable[[], object], repeats: int, rounds: int) -> float:
    """Microseconds per call."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            work()
        best = min(best, (time.thread_time() - start) / repeats)
    return 1e6 * best


def bench_parsing(rounds: int) -> dict[str, float]:
    """Microseconds to parse a chat body of 1 and 32 KB, to make features of it, and to hash 32 KB."""
    resolved = Resolved(pool=Pool(name="p", models=("m",)))
    figures = {}
    for name, size in (("1k", 1024), ("32k", 32 * 1024)):
        text = ("word " * size)[: size // 2]
        messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        body = json.dumps({"model": "m", "messages": messages, "stream": True, "max_tokens": 100}).encode()
        parsed = parse_request(Endpoint.CHAT, {}, body)
        figures[f"parse_{name}"] = best_us(lambda body=body: parse_request(Endpoint.CHAT, {}, body), 500, rounds)
        figures[f"features_{name}"] = best_us(
            lambda parsed=parsed: to_features(parsed, resolved, request_id="r", sequence=0, arrival_s=0.0), 500, rounds
        )
    prompt = bytes(32 * 1024)
    figures["hash_32k"] = best_us(lambda: chain(prompt, 1024, 0), 500, rounds)
    return figures


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as aligned text."""
    cells = list(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def main() -> None:
    """Prints two tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of which the best counts")
    parser.add_argument("--relays", type=int, default=1, help="relays of the replica whose accounts are summed")
    arguments = parser.parse_args()
    result: dict[str, object] = {}
    per_decision: dict[str, dict[str, float]] = {}
    rows = [("prompt", "targets", "decide us", "account us", "events us", "all us")]
    for prompt in PROMPTS:
        per_decision[prompt] = {}
        for size in FLEETS:
            gc.collect()
            best = bench_decisions(size, prompt, arguments.rounds, arguments.relays)
            per_decision[prompt][str(size)] = round(best["all"], 1)
            rows.append((prompt, str(size), *(f"{best[name]:.1f}" for name in ("decide", "account", "events", "all"))))
    print(table(rows))
    figures = bench_parsing(arguments.rounds)
    print()
    print(table([("step", "us"), *((name, f"{us:.1f}") for name, us in figures.items())]))
    _, built_s, ring_bytes = live_fleet(2000, 1)
    print(f"\nrings of 2000 targets: {ring_bytes} bytes, built in {1e3 * built_s:.0f} ms of CPU")
    result["us_per_decision"] = per_decision
    result["us_hash_32k_bytes"] = round(figures["hash_32k"], 1)
    result["us_parse_1k"] = round(figures["parse_1k"], 1)
    result["us_parse_32k"] = round(figures["parse_32k"], 1)
    result["ring_bytes_2000"] = ring_bytes
    result["ring_build_2000_ms"] = round(1e3 * built_s, 1)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
