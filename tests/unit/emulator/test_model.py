"""Properties of the engine model: no block leaks, every request ends, the output never depends on the schedule."""

from array import array
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.model import (
    AllBlocksCleared,
    BlockPool,
    BlockRemoved,
    BlockStored,
    EngineModel,
    FinishReason,
    Request,
    SchedulingPolicy,
    Status,
)
from emulator.tokens import EOS_ID, TokenChain, encode
from twofold import profiles
from twofold.model.profile import EngineProfile

BLOCK = 4


def tiny(blocks: int = 40, *, budget: int = 16, seqs: int = 6, length: int = 64) -> EngineProfile:
    return msgspec.structs.replace(
        profiles.get("cpu-tiny"),
        kv_capacity_tokens=blocks * BLOCK,
        block_size_tokens=BLOCK,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        max_model_len_tokens=min(length, (blocks - 1) * BLOCK),
    )


def prompt(length: int, family: int = 0) -> list[int]:
    return [family * 7 + index % 11 for index in range(length)]


def expected_output(prompt_ids: list[int], count: int) -> list[int]:
    chain = TokenChain(prompt_ids)
    return [chain.next() for _ in range(count)]


def run(model: EngineModel, limit: int = 10_000) -> list[Request]:
    finished: list[Request] = []
    now = 0.0
    for _ in range(limit):
        if not model.has_work:
            return finished
        result = model.step(now)
        now += result.duration_s
        finished += result.finished
        check_invariants(model)
    raise AssertionError("the engine did not finish")


def check_invariants(model: EngineModel) -> None:
    held = Counter(block for request in model.unfinished() for block in request.blocks)
    assert 0 not in held
    for block in range(1, model.pool.num_blocks):
        assert model.pool.references(block) == held[block]
    free = model.pool.free_order()
    assert len(free) == len(set(free)) == model.pool.num_free
    assert set(free).isdisjoint(held)
    assert len(free) + len(held) == model.pool.num_blocks - 1
    assert len(model.running) <= model.profile.max_num_seqs
    for request in model.unfinished():
        if request.status is not Status.RUNNING:
            assert not request.blocks
    contents: dict[int, tuple[int, ...]] = {}
    for request in model.unfinished():
        for index, block in enumerate(request.blocks[: request.stored_blocks]):
            content = tuple(request.ids[: (index + 1) * BLOCK])
            assert contents.setdefault(block, content) == content, "one block holds two different prefixes"


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt length
        st.integers(1, 20),  # max_tokens
        st.integers(0, 2),  # prompt family: requests share prefixes within one
        st.integers(-2, 2),  # priority
        st.integers(0, 6),  # step at which it arrives
        st.booleans(),  # aborted some steps later
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=120, deadline=None)
@given(REQUESTS, st.sampled_from(SchedulingPolicy), st.integers(17, 40), st.integers(3, 40), st.booleans())
def test_every_request_ends_with_its_own_tokens(
    specs: list[tuple[int, int, int, int, int, bool]],
    policy: SchedulingPolicy,
    blocks: int,
    budget: int,
    prefix_caching: bool,
) -> None:
    model = EngineModel(tiny(blocks, budget=budget), policy=policy, prefix_caching=prefix_caching, record_events=True)
    requests = {}
    ever_stored: set[tuple[int, ...]] = set()
    copies: Counter[int] = Counter()
    now, step, finished = 0.0, 0, []
    while step <= 6 or model.has_work:
        for index, (length, max_tokens, family, priority, arrives, _) in enumerate(specs):
            if arrives == step:
                request = Request(f"r{index}", prompt(length, family), max_tokens, arrival_s=now, priority=priority)
                requests[request.request_id] = request
                model.add(request)
        for index, spec in enumerate(specs):
            if spec[5] and step == spec[4] + 4:
                model.finish(f"r{index}", FinishReason.ABORT)
        if model.has_work:
            before = {request.request_id: request.cached_tokens for request in model.unfinished()}
            result = model.step(now)
            now += result.duration_s
            finished += result.finished
            assert result.scheduled_tokens <= budget
            for request in result.admitted:
                assert before[request.request_id] is None
                cached = request.cached_tokens or 0
                assert cached % BLOCK == 0
                assert cached < request.prompt_tokens
                assert not cached or tuple(request.ids[:cached]) in ever_stored
                ever_stored.update(full_prefixes(request))
            for event in result.events:
                if isinstance(event, BlockStored):
                    copies.update(event.block_hashes)
                elif isinstance(event, BlockRemoved):
                    copies[event.block_hash] -= 1
                    assert copies[event.block_hash] >= 0
            for request in [*model.unfinished(), *result.finished]:
                if request.cached_tokens is not None:
                    ever_stored.update(full_prefixes(request))
        check_invariants(model)
        assert sum(copies.values()) == model.pool.num_cached
        step += 1
        assert step < 5000
    for index, spec in enumerate(specs):
        request = requests[f"r{index}"]
        whole = expected_output(list(prompt(spec[0], spec[2])), request.output_tokens)
        assert request.output_ids == whole
        assert request.status is Status.FINISHED
        if request.finish_reason is FinishReason.LENGTH:
            room = model.profile.max_model_len_tokens - request.prompt_tokens
            assert request.output_tokens == min(spec[1], room)
        else:
            assert request.finish_reason is FinishReason.ABORT
            assert spec[5]
    assert model.pool.num_free == model.pool.num_blocks - 1
    assert len(model.waiting) == 0
    assert model.waiting.tokens == 0


def full_prefixes(request: Request) -> set[tuple[int, ...]]:
    return {tuple(request.ids[:end]) for end in range(BLOCK, len(request.ids) + 1, BLOCK)}


def test_running_first_then_chunked_prefill_within_the_budget() -> None:
    model = EngineModel(tiny(budget=10))
    model.add(Request("a", prompt(4), 5))
    first = model.step(0.0)
    assert (first.scheduled_tokens, len(first.tokens), first.decodes) == (4, 1, 0)
    model.add(Request("b", prompt(25, 1), 2))
    second = model.step(1.0)
    assert second.scheduled_tokens == 10  # one decode and a chunk of nine
    assert (second.decodes, [request.request_id for request, _ in second.tokens]) == (1, ["a"])
    third = model.step(2.0)
    assert third.scheduled_tokens == 10
    fourth = model.step(3.0)
    assert fourth.scheduled_tokens == 1 + 7
    assert [request.request_id for request, _ in fourth.tokens] == ["a", "b"]


def test_step_time_is_the_law_of_the_profile() -> None:
    profile = tiny(budget=100, length=100, blocks=60)
    law = profile.law
    model = EngineModel(profile)
    model.add(Request("a", prompt(30), 3))
    assert model.step(0.0).duration_s == pytest.approx(law.base_s + law.prefill_work_s(30, 0))
    model.add(Request("b", prompt(20, 1), 3))
    assert model.step(0.0).duration_s == pytest.approx(law.decode_s(1, 30) + law.prefill_work_s(20, 0))
    assert model.step(0.0).duration_s == pytest.approx(law.decode_s(2, 31 + 20))


def test_head_of_line_blocking_and_whole_prompt_admission() -> None:
    model = EngineModel(tiny(blocks=21, budget=8))  # 20 usable blocks
    model.add(Request("a", prompt(40), 20))
    model.step(0.0)
    model.add(Request("big", prompt(60, 1), 2))  # 15 blocks; the 12 of "a" would be too many beside it
    model.add(Request("small", prompt(4, 2), 2))
    for _ in range(5):
        model.step(0.0)
    assert model.running[0].request_id == "a"
    assert len(model.waiting) == 2, "the small request must wait behind the big one"


def test_chunked_prefill_reserves_nothing_but_needs_room_for_the_whole_prompt() -> None:
    model = EngineModel(tiny(blocks=21, budget=8))
    model.add(Request("a", prompt(60), 2))
    model.step(0.0)
    assert len(model.running[0].blocks) == 2
    assert model.pool.num_free == 18


def test_preemption_recomputes_the_last_one_from_the_front_of_the_queue() -> None:
    model = EngineModel(tiny(blocks=11, budget=64, length=40))  # 10 usable blocks
    model.add(Request("a", prompt(16), 20))
    model.add(Request("b", prompt(16, 1), 20))
    model.step(0.0)
    model.add(Request("c", prompt(4, 2), 1))
    preempted: list[Request] = []
    while not preempted:
        result = model.step(0.0)
        preempted = result.preempted
    assert [request.request_id for request in preempted] == ["b"]
    assert result.admitted == []
    waiting = model.waiting.peek()
    assert waiting is preempted[0], "a preempted request goes to the front"
    finished = run(model)
    by_id = {request.request_id: request for request in finished}
    assert by_id["b"].output_ids == expected_output(prompt(16, 1), 20)
    assert by_id["b"].preemptions >= 1
    assert model.counters.preemptions == sum(request.preemptions for request in finished)


def test_priority_policy_admits_by_priority_and_preempts_the_least_important() -> None:
    model = EngineModel(tiny(blocks=11, budget=64, seqs=2, length=40), policy=SchedulingPolicy.PRIORITY)
    model.add(Request("late", prompt(16), 20, priority=5, arrival_s=0.0))
    model.add(Request("soon", prompt(16, 1), 20, priority=-1, arrival_s=1.0))
    model.add(Request("mid", prompt(16, 2), 20, priority=0, arrival_s=2.0))
    first = model.step(2.0)
    assert [request.request_id for request in first.admitted] == ["soon", "mid"]
    preempted: list[Request] = []
    while not preempted:
        preempted = model.step(3.0).preempted
    assert preempted[0].request_id == "mid"
    assert [request.request_id for request in run(model)] == ["soon", "mid", "late"]


def test_fcfs_ignores_priority() -> None:
    model = EngineModel(tiny(seqs=1))
    model.add(Request("a", prompt(4), 2, priority=9))
    model.add(Request("b", prompt(4), 2, priority=-9))
    assert [request.request_id for request in run(model)] == ["a", "b"]


def test_prefix_hit_stops_one_token_short() -> None:
    model = EngineModel(tiny())
    model.add(Request("a", prompt(2 * BLOCK), 1))
    run(model)
    model.add(Request("b", prompt(2 * BLOCK), 1))
    model.add(Request("c", prompt(2 * BLOCK + 1), 1))
    finished = {request.request_id: request.cached_tokens for request in run(model)}
    assert finished == {"b": BLOCK, "c": 2 * BLOCK}
    assert model.counters.prefix_cache_queries == 3 * 2 * BLOCK + 1
    assert model.counters.prefix_cache_hits == 3 * BLOCK


def test_blocks_filled_by_decode_are_cached() -> None:
    model = EngineModel(tiny())
    model.add(Request("a", prompt(5), 12))
    (first,) = run(model)
    model.add(Request("b", [*first.ids, 1], 1))
    (second,) = run(model)
    assert second.cached_tokens == 16  # 5 + 12 ids; the last one's KV was never computed


def test_cache_salt_separates() -> None:
    model = EngineModel(tiny())
    for request_id, salt in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "")):
        model.add(Request(request_id, prompt(17), 1, cache_salt=salt))
        (done,) = run(model)
        assert done.cached_tokens == (16 if request_id == "c" else 0)


def test_natural_end_stop_ids_and_min_tokens() -> None:
    profile = tiny(blocks=2000, length=4000, budget=4000)
    ids = prompt(3)
    chain = TokenChain(ids)
    natural = 0
    while not chain.ends_here():
        chain.next()
        natural += 1
    model = EngineModel(profile)
    model.add(Request("natural", ids, 3000, natural_end=True))
    model.add(Request("longer", ids, natural + 5, natural_end=True, min_tokens=natural + 3))
    model.add(Request("ignoring", ids, natural + 5, natural_end=True, ignore_eos=True))
    stop = expected_output(ids, 6)[4]
    model.add(Request("stopped", ids, 50, stop_token_ids=frozenset([stop])))
    done = {request.request_id: request for request in run(model)}
    assert done["natural"].output_ids[-1] == EOS_ID
    assert done["natural"].output_tokens == natural + 1
    assert (done["natural"].finish_reason, done["natural"].stop_reason) == (FinishReason.STOP, None)
    assert done["longer"].output_tokens >= natural + 4
    assert done["ignoring"].finish_reason is FinishReason.LENGTH
    assert done["stopped"].output_tokens == 5
    assert (done["stopped"].finish_reason, done["stopped"].stop_reason) == (FinishReason.STOP, stop)


def test_model_length_ends_a_request() -> None:
    model = EngineModel(tiny(length=20))
    model.add(Request("a", prompt(15), 100))
    (done,) = run(model)
    assert (len(done.ids), done.finish_reason) == (20, FinishReason.LENGTH)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="exceeds the KV cache"):
        EngineModel(msgspec.structs.replace(tiny(), max_model_len_tokens=1000))
    model = EngineModel(tiny(length=20))
    model.add(Request("a", prompt(3), 1))
    with pytest.raises(ValueError, match="in use"):
        model.add(Request("a", prompt(3), 1))
    with pytest.raises(ValueError, match="no room"):
        model.add(Request("b", prompt(20), 1))
    assert model.finish("nobody", FinishReason.ABORT) is None
    for bad in ({"prompt_ids": [], "max_tokens": 1}, {"prompt_ids": [1], "max_tokens": 0}):
        with pytest.raises(ValueError):
            Request("x", **bad)  # type: ignore[arg-type]


def test_reset_prefix_cache_only_when_idle() -> None:
    model = EngineModel(tiny(), record_events=True)
    model.add(Request("a", prompt(9), 3))
    model.step(0.0)
    assert not model.reset_prefix_cache()
    run(model)
    assert model.pool.num_cached > 0
    assert model.reset_prefix_cache()
    assert model.pool.num_cached == 0
    model.add(Request("b", prompt(9), 1))
    result = model.step(0.0)
    assert isinstance(result.events[0], AllBlocksCleared), "events leave with the next step, as in vLLM"
    assert result.admitted[0].cached_tokens == 0


def test_free_list_order_is_vllms() -> None:
    pool = BlockPool(8, BLOCK)
    assert pool.free_order() == [1, 2, 3, 4, 5, 6, 7]
    blocks = pool.allocate(4)
    pool.store(blocks, [11, 12, 13], 0, 3, array("I", range(16)))
    pool.release(blocks)
    assert pool.free_order() == [4, 5, 6, 7, 3, 2, 1], "unhashed first, hashed last, tail before head"
    assert pool.find([11, 12, 13], 3) == [1, 2, 3]
    pool.touch([1, 2])
    assert pool.free_order() == [4, 5, 6, 7, 3]
    assert pool.allocate(5) == [4, 5, 6, 7, 3]
    assert pool.find([11, 12, 13], 3) == [1, 2], "the hash is forgotten when the block is handed out"
    with pytest.raises(ValueError, match="free"):
        pool.allocate(1)
    pool.release([1, 2])
    with pytest.raises(ValueError, match="twice"):
        pool.release([1])


def test_a_block_cached_twice_is_found_until_both_copies_go() -> None:
    model = EngineModel(tiny(blocks=30), record_events=True)
    model.add(Request("a", prompt(2 * BLOCK), 1))
    run(model)
    model.add(Request("b", prompt(2 * BLOCK), 1))
    run(model)
    assert model.pool.num_cached == 3, "the second block was stored again, as vLLM does"


def test_same_step_twins_share_blocks() -> None:
    model = EngineModel(tiny(budget=64))
    model.add(Request("a", prompt(17), 1))
    model.add(Request("b", prompt(17), 1))
    result = model.step(0.0)
    assert [request.cached_tokens for request in result.admitted] == [0, 16]


def test_text_prompt_end_to_end() -> None:
    model = EngineModel(tiny(length=60, blocks=40))
    ids = encode("hello emulated world")
    model.add(Request("a", ids, 8))
    (done,) = run(model)
    assert done.output_ids == expected_output(ids, 8)
