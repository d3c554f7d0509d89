"""What the API server adds to the first token of a request, and to nothing else."""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from emulator.model import EngineModel, FinishReason, Request, SchedulingPolicy
from emulator.server.engine import RealTimeEngine
from emulator.server.metrics import EngineMetrics
from twofold import profiles

PROFILE = msgspec.structs.replace(
    profiles.get("cpu-tiny"),
    law=msgspec.structs.replace(profiles.get("cpu-tiny").law, prefill_per_seq_s=1.5e-3),
    request_overhead_s=4e-3,
    request_overhead_per_token_s=1e-5,
)


class Time:
    """A clock, a timer and an event loop in one."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    def clock(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when_s, self._sequence, callback))

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_at(self.now_s, callback)

    def run(self, until_s: float = float("inf")) -> None:
        while self._heap and self._heap[0][0] <= until_s:
            when_s, _, callback = heapq.heappop(self._heap)
            self.now_s = max(self.now_s, when_s)
            callback()
        self.now_s = max(self.now_s, until_s) if until_s < float("inf") else self.now_s


class Sink:
    def __init__(self, time: Time) -> None:
        self.time = time
        self.at_s: list[float] = []

    def token(self, token_id: int, request: Request) -> None:
        self.at_s.append(self.time.now_s)

    def died(self) -> None:
        raise AssertionError


def engine(time: Time, **options: Any) -> RealTimeEngine:
    model = EngineModel(PROFILE, **options)
    return RealTimeEngine(model, EngineMetrics(model, "m"), time, time.clock, time.call_soon)  # type: ignore[arg-type]


def send(running: RealTimeEngine, time: Time, name: str, prompt: int, outputs: int = 3, priority: int = 0) -> Sink:
    sink = Sink(time)
    ids = [ord(name[0]), *range(1, prompt)]
    running.submit(
        Request(name, ids, outputs, arrival_s=time.now_s, priority=priority, ignore_eos=True, min_tokens=outputs), sink
    )
    return sink


@pytest.mark.parametrize("prompt", [1, 100, 1900])
def test_the_first_token_comes_when_the_profile_says(prompt: int) -> None:
    time = Time()
    sink = send(engine(time), time, "a", prompt)
    time.run()
    assert sink.at_s[0] - 100.0 == pytest.approx(PROFILE.ttft_s(prompt, 0), abs=1e-9)
    assert sink.at_s[1] - sink.at_s[0] == pytest.approx(PROFILE.law.decode_s(1, prompt), abs=1e-9)


def test_running_streams_do_not_wait_for_a_request_on_its_way() -> None:
    time = Time()
    running = engine(time)
    first = send(running, time, "a", 10, outputs=200)
    time.run(100.1)
    before = len(first.at_s)
    second = send(running, time, "b", 10, outputs=1)
    time.run()
    meanwhile = [at_s for at_s in first.at_s[before:] if at_s < second.at_s[0]]
    assert meanwhile, "steps went on while the API server was busy with the other request"
    gaps = {round(later - earlier, 4) for earlier, later in zip(first.at_s, first.at_s[1:], strict=False)}
    prompt_s = PROFILE.law.prefill_per_seq_s + PROFILE.law.prefill_work_s(10, 0)
    assert max(gaps) == pytest.approx(max(PROFILE.law.decode_s(1, n) for n in (10, 210)) + prompt_s, rel=0.02)


def test_requests_keep_their_order() -> None:
    time = Time()
    running = engine(time)
    long = send(running, time, "a", 1900, outputs=1)
    short = send(running, time, "b", 1, outputs=1)
    time.run()
    assert long.at_s[0] <= short.at_s[0]


def test_a_request_may_be_given_up_on_its_way() -> None:
    time = Time()
    running = engine(time)
    sink = send(running, time, "a", 100)
    time.run(100.001)
    assert running.busy
    assert running.finish("a", FinishReason.ABORT) is not None
    time.run()
    assert sink.at_s == []
    assert not running.busy
    again = send(running, time, "b", 10)
    time.run()
    assert len(again.at_s) == 3


def test_nothing_happens_while_the_only_request_is_on_its_way() -> None:
    time = Time()
    running = engine(time)
    send(running, time, "a", 100)
    time.run(100.0 + PROFILE.overhead_s(100) - 1e-6)
    assert running.model.counters.steps == 0


def test_priorities_hold_among_those_that_have_arrived() -> None:
    time = Time()
    running = engine(time, policy=SchedulingPolicy.PRIORITY)
    running.model.profile = msgspec.structs.replace(PROFILE, max_num_seqs=1)
    send(running, time, "a", 10, outputs=20)
    time.run(100.01)
    low = send(running, time, "b", 10, outputs=1, priority=5)
    high = send(running, time, "c", 10, outputs=1, priority=1)
    time.run()
    assert high.at_s[0] < low.at_s[0]


def test_a_request_that_meets_running_ones_takes_longer() -> None:
    time = Time()
    running = engine(time)
    running.model.profile = msgspec.structs.replace(PROFILE, request_overhead_busy_s=0.05)
    alone = send(running, time, "a", 10, outputs=100)
    time.run(100.1)
    beside = send(running, time, "b", 10, outputs=1)
    time.run()
    assert alone.at_s[0] - 100.0 == pytest.approx(PROFILE.ttft_s(10, 0))
    assert beside.at_s[0] - 100.1 > PROFILE.ttft_s(10, 0) + 0.05


def test_steps_scatter_around_the_law_and_keep_its_mean() -> None:
    time = Time()
    running = engine(time)
    flat = msgspec.structs.replace(PROFILE.law, decode_per_kv_token_s=0.0)
    running.model.profile = msgspec.structs.replace(PROFILE, law=flat, step_jitter=0.3)
    sink = send(running, time, "a", 10, outputs=1500)
    time.run()
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(sink.at_s))
    law_s = flat.decode_s(1, 0)
    assert sum(gaps) / len(gaps) == pytest.approx(law_s, rel=0.05)
    assert gaps[len(gaps) // 2] == pytest.approx(law_s * math.exp(-(0.3**2) / 2), rel=0.05)
    assert gaps[len(gaps) * 9 // 10] / gaps[len(gaps) // 2] == pytest.approx(math.exp(0.3 * 1.2816), rel=0.08)
