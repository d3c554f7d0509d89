"""The load generator against a server in this process."""

import asyncio
import time
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from emulator.tokens import encode
from twofold.model.fleet import Slo
from twofold.replay.cache import CacheLog
from twofold.replay.formats.generated import Parameters, load
from twofold.replay.measures import summarise
from twofold.replay.runner import LoadGenerator, RunOptions
from twofold.replay.workload import Blocks, Dialogue, Fork, Message, Session, Step, WorkloadError


def one(index: int, *, at_s: float = 0.0, output_tokens: int = 5) -> Session:
    prompt = Blocks(keys=array("Q", [1, 100 + index]), block_tokens=16, input_tokens=24)
    return Session(session_id=f"s{index}", start_s=at_s, items=(Step(prompt=prompt, output_tokens=output_tokens),))


def generator(fake: Any, **changes: Any) -> LoadGenerator:
    values: dict[str, Any] = {"urls": (fake.url,), "model": "fake", "timeout_s": 10.0} | changes
    return LoadGenerator(RunOptions(**values), time.monotonic)


async def test_every_token_of_an_open_loop_is_verified(fake: Any) -> None:
    run = generator(fake)
    await run.run(one(i) for i in range(20))
    figures = summarise(run.records, run.gaps, Slo(ttft_s=10, tpot_s=10))
    assert (figures.requests, figures.errors, figures.chain_violations) == (20, 0, 0)
    assert figures.tokens_delivered == figures.tokens_verified == 100
    assert figures.attainment == 1.0
    assert all(body["ignore_eos"] and body["min_tokens"] == body["max_tokens"] == 5 for body in fake.requests)
    assert len(set(fake.request_ids)) == 20


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_conversations_hold_the_answers_received(fake: Any, endpoint: str) -> None:
    sessions = list(load(Parameters(sessions=6, rate=1000, think_s=0, tool_s=0, agents=0.5, system_tokens=40), seed=3))
    run = generator(fake, endpoint=endpoint)
    await run.run(iter(sessions))
    assert len(run.records) == sum(len(list(session.steps())) for session in sessions)
    assert all(record.ok and not record.violation for record in run.records)
    assert sum(record.verified_tokens for record in run.records) == sum(
        step.output_tokens for session in sessions for step in session.steps()
    )
    if endpoint == "chat":
        roles = [message["role"] for body in fake.requests for message in body["messages"]]
        assert {"system", "user", "assistant", "tool"} <= set(roles)
        assert any("tools" in body for body in fake.requests)


async def test_the_ideal_hit_ratio_counts_what_the_server_saw(fake: Any) -> None:
    sessions = load(Parameters(sessions=5, rate=1e6, think_s=0, tool_s=0, agents=0.4, system_tokens=40), seed=5)
    run = generator(fake, endpoint="chat", concurrency_limit=1)
    await run.run(sessions)
    log = CacheLog(16)
    for prompt, record in zip(fake.prompts, sorted(run.records, key=lambda record: record.sent_s), strict=True):
        assert record.prompt_tokens == len(prompt)
        log.sent(log.hashes(prompt), len(prompt))
    seen = run.cache.endless()
    assert seen.prompt_tokens == log.endless().prompt_tokens
    assert seen.hit_tokens >= log.endless().hit_tokens > 0, "answers stored in the cache can only add hits"


@pytest.mark.parametrize(
    ("mangle", "expected"),
    [
        (lambda tokens: tokens[:2] + tokens[3:], "lost"),
        (lambda tokens: tokens[:3] + tokens[2:], "doubled"),
        (lambda tokens: [*tokens[:2], " zzz", *tokens[3:]], "altered"),
        (lambda tokens: [tokens[1], tokens[0], *tokens[2:]], "swapped"),
        (lambda tokens: [*tokens[:-1], tokens[-1][:2]], "cut"),
        (lambda tokens: [*tokens, " abc"], "one too many"),
    ],
)
async def test_a_wrong_token_is_a_violation_of_that_request_alone(
    fake: Any, mangle: Callable[[list[str]], list[str]], expected: str
) -> None:
    fake.mangle = lambda number, tokens: mangle(tokens) if number == 3 else tokens
    run = generator(fake, concurrency_limit=1)
    await run.run(one(i) for i in range(8))
    assert [bool(record.violation) for record in run.records] == [i == 3 for i in range(8)], expected
    assert all(record.ok for record in run.records)


async def test_text_split_anywhere_is_verified(fake: Any) -> None:
    def split(_number: int, tokens: list[str]) -> list[str]:
        text = "".join(tokens)
        return [text[:1], text[1:6], text[6:]]

    fake.mangle = split
    fake.usage_extra = 2
    run = generator(fake)
    await run.run(iter([one(0)]))
    assert run.records[0].verified_tokens == 5
    assert not run.records[0].violation


async def test_a_usage_that_contradicts_the_text_is_a_violation(fake: Any) -> None:
    fake.usage_extra = 1
    run = generator(fake)
    await run.run(iter([one(0)]))
    assert "usage says 6" in run.records[0].violation


async def test_a_wrong_finish_reason_is_a_violation(fake: Any) -> None:
    fake.finish_reason = "stop"
    run = generator(fake)
    await run.run(iter([one(0)]))
    assert "finish_reason 'stop'" in run.records[0].violation


async def test_errors_are_counted_by_kind(fake: Any) -> None:
    fake.status = 429
    run = generator(fake)
    await run.run(iter([one(0)]))
    fake.status, fake.cut_after = 200, 2
    cut = generator(fake)
    await cut.run(iter([one(0)]))
    fake.cut_after, fake.error_event = None, True
    event = generator(fake)
    await event.run(iter([one(0)]))
    gone = generator(fake, urls=("http://127.0.0.1:1",))
    await gone.run(iter([one(0)]))
    assert run.records[0].error == "http-429:rejected-saturated"
    assert cut.records[0].error == "reset"
    assert (cut.records[0].verified_tokens, cut.records[0].violation) == (2, "")
    assert event.records[0].error == "error-event"
    assert gone.records[0].error == "connect"
    assert "429" in run.first_error


async def test_a_silent_server_is_a_timeout(fake: Any) -> None:
    fake.hold.clear()
    run = generator(fake, timeout_s=0.2)
    await run.run(iter([one(0)]))
    assert run.records[0].error == "timeout"


async def test_arrivals_do_not_wait_for_answers(fake: Any) -> None:
    fake.hold.clear()
    run = generator(fake)
    task = asyncio.create_task(run.run(one(i, at_s=i * 0.01) for i in range(30)))
    await until(lambda: len(fake.requests) == 30)
    fake.hold.set()
    await task
    assert all(record.ok for record in run.records)


async def test_a_request_that_waits_for_a_slot_is_late(fake: Any) -> None:
    fake.hold.clear()
    run = generator(fake, concurrency_limit=1)
    task = asyncio.create_task(run.run(one(i) for i in range(2)))
    await until(lambda: len(fake.requests) == 1 and run.elapsed_s > 0.3)
    fake.hold.set()
    await task
    assert summarise(run.records, run.gaps, Slo()).lateness_p99_s > 0.2


async def test_an_interrupted_run_has_the_records_so_far(fake: Any) -> None:
    run = generator(fake)
    task = asyncio.create_task(run.run(one(i, at_s=0.0 if i < 3 else 3600.0 * i) for i in range(6)))
    await until(lambda: sum(record.end_s > 0 for record in run.records) == 3)
    run.interrupt()
    await asyncio.wait_for(task, 5)
    assert run.interrupted
    assert [record.ok for record in run.records] == [True] * 3


async def test_a_second_interrupt_gives_up_what_is_in_flight(fake: Any) -> None:
    fake.hold.clear()
    run = generator(fake)
    task = asyncio.create_task(run.run(iter([one(0)])))
    await until(lambda: len(fake.requests) == 1)
    run.interrupt()
    run.interrupt()
    await asyncio.wait_for(task, 5)
    assert run.records[0].error == "cancelled"


async def test_the_limit_counts_requests_and_urls_take_turns(fake: Any) -> None:
    run = generator(fake, limit=7, urls=(fake.url, fake.url + "/v1"))
    await run.run(one(i) for i in range(50))
    assert len(run.records) == len(fake.requests) == 7


async def test_the_duration_ends_a_run(fake: Any) -> None:
    run = generator(fake, duration_s=0.3)
    await run.run(one(i, at_s=i * 3600.0) for i in range(2))
    assert len(run.records) == 1
    assert not run.interrupted


async def test_forks_run_side_by_side_and_the_session_goes_on_after_them(fake: Any) -> None:
    def child(name: str, key: int) -> Session:
        prompt = Blocks(keys=array("Q", [key]), block_tokens=16, input_tokens=16)
        return Session(session_id=name, start_s=0.0, items=(Step(prompt=prompt, output_tokens=2),))

    first, last = (Step(prompt=one(i).items[0].prompt, output_tokens=3) for i in (0, 1))  # type: ignore[union-attr]
    items = (first, Fork(sessions=(child("a", 7), child("b", 8))), last)
    run = generator(fake)
    await run.run(iter([Session(session_id="s", start_s=0.0, items=items)]))
    assert [body["max_tokens"] for body in fake.requests] == [3, 2, 2, 3]


async def test_a_failed_step_ends_its_session_and_the_rest_is_counted(fake: Any) -> None:
    fake.status = 500
    step = Step(prompt=Dialogue(messages=(Message(role="user", key=1, tokens=3),)), output_tokens=2)
    run = generator(fake, endpoint="chat")
    await run.run(iter([Session(session_id="s", start_s=0.0, items=(step, step, step))]))
    assert (len(run.records), run.skipped_steps) == (1, 2)


async def test_whole_answers_are_verified_too(fake: Any) -> None:
    fake.cached_tokens = 12
    run = generator(fake, stream=False)
    await run.run(one(i) for i in range(3))
    figures = summarise(run.records, run.gaps, Slo())
    assert (figures.tokens_verified, figures.errors, figures.hit_ratio) == (15, 0, 0.5)


async def test_long_prompts_are_cut_on_demand(fake: Any) -> None:
    run = generator(fake, max_input_tokens=10)
    await run.run(iter([one(0)]))
    assert len(encode(fake.requests[0]["prompt"])) == 10
    assert run.prompts_cut == 1


async def test_the_salt_changes_every_prompt_and_no_length(fake: Any) -> None:
    for salt in (0, 1):
        run = generator(fake, salt=salt)
        await run.run(iter([one(0)]))
    first, second = (body["prompt"] for body in fake.requests)
    assert first != second
    assert len(first) == len(second)


async def test_a_damaged_workload_ends_the_run_with_its_error(fake: Any) -> None:
    def sessions() -> Any:
        yield one(0)
        raise WorkloadError("line 2: broken")

    run = generator(fake)
    with pytest.raises(WorkloadError, match="line 2"):
        await run.run(sessions())


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
