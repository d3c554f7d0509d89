"""Plans stay inside an engine's limits."""

from hypothesis import given
from hypothesis import strategies as st

from twofold.calibration.plan import BACKGROUND_TOKENS, OUTPUT_TOKENS, make_plan
from twofold.calibration.values import EngineFacts

facts = st.builds(
    EngineFacts,
    model=st.just("m"),
    max_model_len_tokens=st.integers(512, 131_072),
    kv_capacity_tokens=st.integers(4096, 4_000_000),
    block_size_tokens=st.sampled_from((16, 32, 128)),
    max_num_batched_tokens=st.integers(256, 16_384),
    max_num_seqs=st.integers(1, 1024),
)


@given(facts, st.booleans())
def test_no_point_is_beyond_the_limits(engine: EngineFacts, quick: bool) -> None:
    plan = make_plan(engine, quick=quick)
    assert len(plan.prompts) >= 4
    assert plan.decodes or engine.kv_capacity_tokens < 8192
    for prompt in plan.prompts:
        assert 1 <= prompt.tokens < engine.max_model_len_tokens
    for point in plan.decodes:
        assert point.sequences <= engine.max_num_seqs
        assert point.context_tokens + OUTPUT_TOKENS <= engine.max_model_len_tokens
        assert point.sequences * (point.context_tokens + OUTPUT_TOKENS) <= engine.kv_capacity_tokens
    for mixed in plan.mixed:
        assert mixed.sequences + mixed.tokens <= engine.max_num_batched_tokens, "the prompt must fit into one step"
        assert mixed.sequences + 1 <= engine.max_num_seqs
        assert mixed.sequences * BACKGROUND_TOKENS + mixed.tokens <= engine.kv_capacity_tokens


def test_a_quick_plan_is_smaller() -> None:
    engine = EngineFacts(model="m", max_model_len_tokens=8192, max_num_batched_tokens=2048, max_num_seqs=256)
    quick, full = make_plan(engine, quick=True), make_plan(engine, quick=False)
    assert quick.rounds * len(quick.points) < full.rounds * len(full.points) / 3
    assert {point.sequences for point in quick.decodes} < {point.sequences for point in full.decodes}


def test_an_engine_that_tells_nothing_gets_a_modest_plan() -> None:
    plan = make_plan(EngineFacts(model="m"), quick=False)
    assert max(point.tokens for point in plan.prompts) < 4096
