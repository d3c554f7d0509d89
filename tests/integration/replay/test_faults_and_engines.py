"""What is asked of engines, and planting a fault, against a server in this process."""

import time
from array import array
from typing import Any

import pytest

from twofold.replay import engines, faults
from twofold.replay.probe import ProbeError, find_model, follows_chain
from twofold.replay.runner import LoadGenerator, RunOptions
from twofold.replay.workload import Blocks, Session, Step


def sessions(count: int) -> list[Session]:
    prompt = Blocks(keys=array("Q", [5]), block_tokens=16, input_tokens=16)
    step = Step(prompt=prompt, output_tokens=4)
    return [Session(session_id=f"s{i}", start_s=0.2 * i, items=(step,)) for i in range(count)]


def altered(tokens: list[str]) -> list[str]:
    return [tokens[0], " zzz", *tokens[2:]]


async def run_with_plant(fake: Any, count: int = 6) -> tuple[LoadGenerator, faults.Verdict]:
    options = RunOptions(urls=(fake.url,), model="fake", concurrency_limit=1)
    generator = LoadGenerator(options, time.monotonic)
    plant = faults.Plant([fake.url], after=2)
    async with plant.planted(generator):
        await generator.run(iter(sessions(count)))
    return generator, await plant.verdict(generator.records)


async def test_exactly_the_planted_fault_is_caught_and_set_apart(fake: Any) -> None:
    fake.stats = {"engines": [{"running": 1, "faults": {}}]}
    fake.mangle = lambda number, tokens: altered(tokens) if number == 4 else tokens
    generator, verdict = await run_with_plant(fake)
    assert fake.faults == [{"engine": 0, "kind": "corrupt_token", "count": 1}]
    assert (verdict.planted, verdict.caught) == (1, 1)
    others = verdict.others(generator.records)
    assert len(others) == 5
    assert not any(record.violation for record in others)
    assert sum(record.verified_tokens for record in others) == sum(record.output_tokens for record in others)


async def test_a_second_wrong_token_is_not_excused(fake: Any) -> None:
    fake.stats = {"engines": [{"running": 1, "faults": {}}]}
    fake.mangle = lambda number, tokens: altered(tokens) if number in (3, 5) else tokens
    generator, verdict = await run_with_plant(fake)
    assert verdict.caught == 1
    assert sum(bool(record.violation) for record in verdict.others(generator.records)) == 1


async def test_a_wrong_token_before_the_planted_one_is_not_excused(fake: Any) -> None:
    fake.stats = {"engines": [{"running": 1, "faults": {}}]}
    fake.mangle = lambda number, tokens: altered(tokens) if number == 0 else tokens
    generator, verdict = await run_with_plant(fake)
    assert (verdict.planted, verdict.caught) == (1, 0)
    assert sum(bool(record.violation) for record in verdict.others(generator.records)) == 1


async def test_the_busiest_engine_gets_the_fault(fake: Any) -> None:
    fake.stats = {"engines": [{"running": running, "faults": {}} for running in (0, 3, 2)]}
    await run_with_plant(fake)
    assert [fault["engine"] for fault in fake.faults] == [1]


async def test_an_unseen_fault_is_not_caught(fake: Any) -> None:
    fake.stats = {"engines": [{"running": 1, "faults": {}}]}
    _, verdict = await run_with_plant(fake)
    assert (verdict.planted, verdict.caught) == (1, 0)
    assert "did not see it" in verdict.notes[0]


async def test_an_unused_fault_is_taken_back(fake: Any) -> None:
    fake.stats = {"engines": [{"running": 1, "faults": {"tokens": ["corrupt"]}}]}
    _, verdict = await run_with_plant(fake)
    assert (verdict.planted, verdict.caught) == (0, 0)
    assert "taken back" in verdict.notes[0]


async def test_a_fault_port_that_does_not_answer_is_a_note(fake: Any) -> None:
    plant = faults.Plant(["http://127.0.0.1:1"], after=0)
    generator = LoadGenerator(RunOptions(urls=(fake.url,), model="fake"), time.monotonic)
    async with plant.planted(generator):
        await generator.run(iter(sessions(3)))
    verdict = await plant.verdict(generator.records)
    assert verdict.planted == 0
    assert "no fault was planted" in verdict.notes[0]


async def test_counters_are_summed_over_engines(fake: Any) -> None:
    fake.metrics = 'vllm:prefix_cache_queries_total{engine="0"} 10\nvllm:prefix_cache_hits_total{engine="0"} 4\n'
    counters = await engines.read_counters([fake.url, fake.url + "/metrics"])
    assert (counters.queries_tokens, counters.hits_tokens) == (20, 8)
    assert await engines.read_counters([]) == engines.CacheCounters()


async def test_a_metrics_page_is_read_to_its_end(fake: Any) -> None:
    filler = "".join(f'other_metric{{number="{i}"}} 1\n' for i in range(50_000))
    fake.metrics = filler + 'vllm:prefix_cache_queries_total{engine="0"} 7\n'
    assert (await engines.read_counters([fake.url])).queries_tokens == 7


async def test_engines_that_do_not_answer_are_named(fake: Any) -> None:
    with pytest.raises(engines.EngineError, match=r"http://127\.0\.0\.1:1/metrics"):
        await engines.read_counters(["http://127.0.0.1:1"])
    with pytest.raises(engines.EngineError, match="status 404"):
        await engines.engine_stats(fake.url + "/nowhere")


async def test_the_probe_tells_emulated_engines_from_others(fake: Any) -> None:
    assert await find_model(fake.url) == "fake"
    assert await follows_chain(fake.url, "fake")
    fake.mangle = lambda _number, tokens: [" not", *tokens[1:]]
    assert not await follows_chain(fake.url, "fake")
    fake.status = 500
    assert not await follows_chain(fake.url, "fake")
    with pytest.raises(ProbeError, match="cannot connect"):
        await find_model("http://127.0.0.1:1")
