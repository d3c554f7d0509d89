"""What a routing decision costs: microseconds per request for ``decide`` and ``account``, and apart for all around it.

Measured as a relay does it, with production settings: a replica of two relays beside another replica whose changes
keep coming in, prefix tables full to the last way, popularity warm, every target with requests decoding. Between any
two timed decisions the sibling relay makes one and a report on two targets arrives, so no cache of the last
decision's state survives. The figure is the mean of a round's requests without the slowest twentieth (the machine
interrupts), in the best of several rounds; the clock is one that needs no system call, which would empty CPU caches.
"""

import argparse
import functools
import gc
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import msgspec

from router.routing.accounts import AccountsWriter, LoadRow
from router.routing.buffers import in_memory
from router.routing.dirty_log import DirtyLog
from router.routing.features import parse_request, to_features
from router.routing.live import LiveFleet
from router.routing.prefix import chain
from router.routing.prefix_table import DEFAULT_ENTRIES, region_bytes
from router.routing.ring_build import build_table
from router.routing.ticket import Ticket
from router.routing.types import Decision, Endpoint, RequestFeatures, Resolved
from twofold.model.fleet import FleetSnapshot, Health, Pool, RoutingPolicy, Target
from twofold.model.profile import EngineProfile, StepLaw
from twofold.model.reasons import RouteReason

FLEETS = (10, 100, 2000)
SMALL_POOLS = (2, 3, 4)
CHUNKS = {"1k": 1, "32k": 32, "128k": 512}
"""Prompt name to its chunks: 1 KiB of text (256 tokens) each. "1k" and "32k" are bytes, "128k" are tokens."""
SHARED_CHUNKS = {"1k": 0, "32k": 2, "128k": 64}
"""Chunks that all prompts begin with."""
STEP_S = {"1k": 0.001, "32k": 0.02, "128k": 1.0}
"""Time between two requests of this relay."""
HEADLINE = ("1k", "128k")
SESSIONS, TURNS = 100, 3
FIRST_TOKEN_AFTER, END_AFTER = 8, 16
"""A request shows its first token, and ends, after so many later ones."""
PARTS = ("decide", "account", "first_token", "finish")


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
    # A pool of two could not serve the load of the long prompts: it is not to shed, but to decide.
    policy = RoutingPolicy(shed_ttft_s=0.0)
    return FleetSnapshot(epoch=1, version=1, pools=(pool,), profiles=profiles, targets=targets, policy=policy)


def requests_of(prompt: str, seed: int) -> list[RequestFeatures]:
    """One round: sessions of some turns each, that take turns, over a prefix shared by all."""
    rng = random.Random(seed)
    start = random.Random(prompt)
    shared = tuple(start.getrandbits(64) for _ in range(SHARED_CHUNKS[prompt]))
    chunks = CHUNKS[prompt]
    sessions = [shared + tuple(rng.getrandbits(64) for _ in range(chunks - len(shared))) for _ in range(SESSIONS)]
    return [
        RequestFeatures(
            request_id=f"{seed}-{turn}-{number}",
            pool="p",
            chain=session[: max(1, chunks - 8 * (TURNS - 1 - turn))],
            prompt_tokens=256 * max(1, chunks - 8 * (TURNS - 1 - turn)) + 40,
            unique_key=rng.getrandbits(64),
        )
        for turn in range(TURNS)
        for number, session in enumerate(sessions)
    ]


@functools.cache
def full_table() -> bytes:
    """A prefix table of the default size whose entries are all taken, by prompts of long ago: tags, 4 bytes each, come
    first, and none of them is free."""
    tags = random.Random(3).randbytes(4 * DEFAULT_ENTRIES)
    return tags.replace(b"\0", b"\1") + bytes(region_bytes() - len(tags))


class Replica:
    """Two relays of one replica and the load that other replicas report, over process memory."""

    def __init__(self, size: int, prompt: str, *, queued_s: float = 0.0, broken: int = 0, full: bool = True) -> None:
        snapshot = fleet_of(size)
        slots = {target.target_id: i for i, target in enumerate(snapshot.targets)}
        table, rings = build_table(snapshot, slots)
        buffers = in_memory(max(size, 16), 2)
        self.live, self.sibling = (LiveFleet(buffer) for buffer in buffers)
        for live in (self.live, self.sibling):
            live.install(table, memoryview(rings))
        if full:
            buffers[0].own.prefixes[:] = full_table()
        self._size = size
        self._prompt = prompt
        self._broken = broken
        self._queued_s = queued_s
        self._remote = AccountsWriter(buffers[0].remote.accounts, DirtyLog(buffers[0].remote.dirty))
        self._rng = random.Random(7)
        self._running: tuple[deque[Ticket], ...] = (deque(), deque())
        self._now_s = 1000.0
        self._preload()
        for _ in self.rounds(range(10_000, 10_003)):
            pass

    def _preload(self) -> None:
        """Requests that decode on every target; where asked, work queued before them and circuits open on idle ones."""
        for slot in range(self._broken, self._size):
            self._remote.set_remote(slot, self._reported(), self._now_s)
            for live in (self.live, self.sibling):
                for _ in range(2):
                    _occupy(live, slot, self._now_s).first_token(self._now_s)
        for slot in range(self._broken):
            for _ in range(3):
                self.live.record_failure(slot, self._now_s + 1e9)

    def _reported(self) -> LoadRow:
        queued = 1 if self._queued_s else 0
        decodes = self._rng.randrange(4, 12)
        return LoadRow(
            inflight=decodes + queued,
            decodes=decodes,
            queued_prefill_tokens=12_000.0 * self._queued_s,
            queued_prefill_s=self._queued_s,
            kv_tokens=3000.0 * decodes,
            stored_tokens=1e6,
        )

    def rounds(self, seeds: Iterable[int]) -> Iterator[dict[str, float]]:
        """Plays rounds of requests; yields microseconds per request and part."""
        clock = time.perf_counter
        overhead_s = statistics.median(-(clock() - clock()) for _ in range(1001))
        for seed in seeds:
            spent: dict[str, list[float]] = {part: [] for part in PARTS}
            requests = requests_of(self._prompt, seed)
            siblings = requests_of(self._prompt, seed + 1_000_000)
            for request, elsewhere in zip(requests, siblings, strict=True):
                self._now_s += STEP_S[self._prompt]
                now_s = self._now_s
                self._elsewhere(elsewhere, now_s)
                at0 = clock()
                decision = self.live.decide(request, now_s)
                at1 = clock()
                ticket = self.live.account(request, decision, now_s)
                at2 = clock()
                spent["decide"].append(at1 - at0 - overhead_s)
                spent["account"].append(at2 - at1 - overhead_s)
                self._go_on(0, ticket, now_s, spent, overhead_s)
            yield {part: 1e6 * typical(seconds) for part, seconds in spent.items()}

    def _elsewhere(self, request: RequestFeatures, now_s: float) -> None:
        """A request of the sibling relay, and news of two targets from the other replicas."""
        decision = self.sibling.decide(request, now_s)
        ticket = self.sibling.account(request, decision, now_s)
        self._go_on(1, ticket, now_s, {part: [] for part in PARTS}, 0.0)
        for _ in range(2):
            slot = self._rng.randrange(self._broken, self._size)
            self._remote.set_remote(slot, self._reported(), now_s)

    def _go_on(
        self, relay: int, ticket: Ticket, now_s: float, spent: dict[str, list[float]], overhead_s: float
    ) -> None:
        running = self._running[relay]
        running.append(ticket)
        clock = time.perf_counter
        if len(running) > FIRST_TOKEN_AFTER:
            started = running[-1 - FIRST_TOKEN_AFTER]
            before = clock()
            started.first_token(now_s)
            spent["first_token"].append(clock() - before - overhead_s)
        if len(running) > END_AFTER:
            ended = running.popleft()
            before = clock()
            ended.finish(now_s)
            spent["finish"].append(clock() - before - overhead_s)


def typical(seconds: list[float]) -> float:
    """Mean without the slowest twentieth."""
    kept = sorted(seconds)[: max(1, len(seconds) * 19 // 20)]
    return sum(kept) / len(kept)


def _occupy(live: LiveFleet, slot: int, now_s: float) -> Ticket:
    target = live.target(slot)
    assert target is not None
    request = RequestFeatures(request_id="load", pool="p", prompt_tokens=2000)
    decision = Decision(
        slot, target.target_id, RouteReason.HOME, "load", "p", "twofold", now_s, 2000, (), 0, 2000, 0.01, 0.02
    )
    return live.account(request, decision, now_s)


def measure(replica: Replica, rounds: int) -> dict[str, float]:
    """Microseconds per part, in the round whose decisions (decide + account) cost least."""
    gc.collect()
    gc.freeze()
    best = min(replica.rounds(range(rounds)), key=lambda parts: parts["decide"] + parts["account"])
    gc.unfreeze()
    return best | {"decision": best["decide"] + best["account"]}


def best_us(work: Callable[[], object], repeats: int, rounds: int) -> float:
    """Microseconds per call."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            work()
        best = min(best, (time.thread_time() - start) / repeats)
    return 1e6 * best


def measure_parsing(rounds: int) -> dict[str, float]:
    """Microseconds to parse a chat body of 1 and 32 KB, to make features of it, and to hash 32 KB."""
    resolved = Resolved(pool=Pool(name="p", models=("m",)))
    headers = {b"host": b"router", b"content-type": b"application/json", b"content-length": b"1", b"accept": b"*/*"}
    figures = {}
    for name, size in (("1k", 1024), ("32k", 32 * 1024)):
        text = ("word " * size)[: size // 2]
        messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        body = json.dumps({"model": "m", "messages": messages, "stream": True, "max_tokens": 100}).encode()
        parse = functools.partial(parse_request, Endpoint.CHAT, headers, body)
        make = functools.partial(to_features, parse(), resolved, request_id="r", sequence=0, arrival_s=0.0)
        figures[f"parse_{name}"] = best_us(parse, 200, rounds)
        figures[f"features_{name}"] = best_us(make, 200, rounds)
    prompt = random.Random(1).randbytes(32 * 1024)
    figures["hash_32k"] = best_us(lambda: chain(prompt, 1024, 0), 200, rounds)
    return figures


def measure_rings() -> tuple[float, int]:
    """(seconds of CPU to build the rings of 2,000 targets, their bytes)."""
    snapshot = fleet_of(2000)
    slots = {target.target_id: i for i, target in enumerate(snapshot.targets)}
    start_s = time.thread_time()
    _, rings = build_table(snapshot, slots)
    return time.thread_time() - start_s, len(rings)


APART: tuple[tuple[str, str, Callable[[str], Replica]], ...] = (
    *(
        (f"pool_of_{size}", "a pool of so many targets", lambda prompt, size=size: Replica(size, prompt))
        for size in SMALL_POOLS
    ),
    (
        "escape_examined",
        "3 s of work queued on each of 100 targets: the least-work target is examined too",
        lambda prompt: Replica(100, prompt, queued_s=3.0),
    ),
    (
        "ineligible_top",
        "the same, and the four targets with the least work have their circuits open",
        lambda prompt: Replica(100, prompt, queued_s=3.0, broken=4),
    ),
    ("empty_prefix_table", "100 targets, nothing known of any cache at first", lambda p: Replica(100, p, full=False)),
)
"""Name, what it is, and the replica of the cases that are shown apart."""


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as aligned text."""
    cells = list(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def main() -> None:
    """Prints tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="rounds of which the best counts")
    parser.add_argument("--quick", action="store_true", help="the headline cases only")
    arguments = parser.parse_args()
    # As a relay runs: what lives when it starts is frozen, and the collector comes rarely.
    gc.set_threshold(20_000, 20, 20)
    columns = ("decision", *PARTS)
    rows = [("prompt", "targets", *(f"{name} us" for name in columns))]
    per_decision: dict[str, dict[str, float]] = {}
    release: dict[str, float] = {}
    for prompt in HEADLINE if arguments.quick else CHUNKS:
        per_decision[prompt] = {}
        for size in FLEETS:
            print(f"{prompt} prompts, {size} targets", file=sys.stderr)
            best = measure(Replica(size, prompt), arguments.rounds)
            per_decision[prompt][str(size)] = round(best["decision"], 1)
            release[prompt] = round(best["first_token"] + best["finish"], 1)
            rows.append((prompt, str(size), *(f"{best[name]:.1f}" for name in columns)))
    print(table(rows))
    apart: dict[str, dict[str, float]] = {}
    if not arguments.quick:
        rows = [("case", *(f"{prompt} us" for prompt in HEADLINE), "")]
        for name, text, make in APART:
            print(name, file=sys.stderr)
            apart[name] = {prompt: round(measure(make(prompt), arguments.rounds)["decision"], 1) for prompt in HEADLINE}
            rows.append((name, *(str(apart[name][prompt]) for prompt in HEADLINE), text))
        print("\n" + table(rows))
    figures = measure_parsing(arguments.rounds)
    print("\n" + table([("step", "us"), *((name, f"{us:.1f}") for name, us in figures.items())]))
    built_s, ring_bytes = measure_rings()
    print(f"\nrings of 2000 targets: {ring_bytes} bytes, built in {1e3 * built_s:.0f} ms of CPU")
    result: dict[str, object] = {
        "us_per_decision": per_decision,
        "us_release": release,
        "us_apart": apart,
        "us_hash_32k_bytes": round(figures["hash_32k"], 1),
        "us_parse_1k": round(figures["parse_1k"] + figures["features_1k"], 1),
        "us_parse_32k": round(figures["parse_32k"] + figures["features_32k"], 1),
        "ring_bytes_2000": ring_bytes,
        "ring_build_2000_ms": round(1e3 * built_s, 1),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
