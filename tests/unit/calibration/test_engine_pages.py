"""What is read from an engine's pages and streams, and what is made of it."""

import pytest

from twofold.calibration.engine import Engine, EngineError, facts_of_metrics, gauges_of_metrics
from twofold.calibration.limits import ASSUMED, GIVEN, SEEN, TOLD, fullest_step, resolve
from twofold.calibration.values import EngineFacts, Gauges

PAGE = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",enable_prefix_caching="True",engine="0",num_gpu_blocks="4096"} 1.0
vllm:cache_config_info{block_size="128",enable_prefix_caching="True",engine="1",num_gpu_blocks="4096"} 1.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 2.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 1.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0",finished_reason="stop"} 5.0
vllm:request_success_total{engine="0",finished_reason="length"} 7.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 10.0
vllm:iteration_tokens_total_bucket{engine="0",le="2048.0"} 14.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 14.0
# TYPE vllm:request_prefill_time_seconds histogram
vllm:request_prefill_time_seconds_count{engine="0"} 4.0
vllm:request_prefill_time_seconds_sum{engine="0"} 0.25
"""


def test_facts_of_a_page() -> None:
    facts = facts_of_metrics(PAGE)
    assert (facts.block_size_tokens, facts.kv_capacity_tokens, facts.engines) == (128, 128 * 4096, 2)
    assert facts.prefix_caching
    assert facts.has_metrics


def test_the_size_in_tokens_is_preferred_and_caching_may_be_off() -> None:
    page = PAGE.replace('num_gpu_blocks="4096"', 'num_gpu_blocks="4096",kv_cache_size_tokens="500000"')
    facts = facts_of_metrics(page.replace('"True"', '"False"'))
    assert facts.kv_capacity_tokens == 500_000
    assert not facts.prefix_caching


@pytest.mark.parametrize("page", ["", "up 1\n", "vllm:cache_config_info{} 1.0\n"])
def test_a_page_without_facts_gives_none(page: str) -> None:
    facts = facts_of_metrics(page)
    assert (facts.block_size_tokens, facts.kv_capacity_tokens) == (0, 0)


def test_counters_of_a_page() -> None:
    gauges = gauges_of_metrics(PAGE)
    assert (gauges.running, gauges.waiting, gauges.finished) == (5, 1, 12)
    assert (gauges.prefill_total_s, gauges.prefill_count) == (0.25, 4)
    assert gauges.step_tokens[:2] == ((1.0, 10), (2048.0, 14))
    assert gauges_of_metrics("") == Gauges()


def test_a_damaged_page_is_an_error_of_one_line() -> None:
    with pytest.raises(EngineError, match="malformed") as caught:
        gauges_of_metrics('vllm:num_requests_running{engine="0} nonsense\n')
    assert "\n" not in str(caught.value)


def test_the_fullest_step_is_found_between_two_pages() -> None:
    before = Gauges(step_tokens=((1.0, 10), (1024.0, 12), (2048.0, 12), (4096.0, 13), (float("inf"), 13)))
    after = Gauges(step_tokens=((1.0, 10), (1024.0, 13), (2048.0, 20), (4096.0, 21), (float("inf"), 21)))
    assert fullest_step(before, after, offered=16_000) == 2048
    assert fullest_step(before, after, offered=2048) == 0, "no more was offered than one step held"
    assert fullest_step(before, before, offered=16_000) == 0
    beyond = Gauges(step_tokens=(*before.step_tokens[:-1], (float("inf"), 15)))
    assert fullest_step(before, beyond, offered=16_000) == 0, "the last bucket has no bound"


def test_limits_by_order_of_trust() -> None:
    facts = EngineFacts(model="m", block_size_tokens=16, kv_capacity_tokens=1000, max_model_len_tokens=512)
    found = resolve(facts, {"block_size_tokens": 32}, {"max_num_seqs": 64, "kv_capacity_tokens": 7})
    assert (found.block_size_tokens, found.sources["block_size_tokens"]) == (32, GIVEN)
    assert (found.kv_capacity_tokens, found.sources["kv_capacity_tokens"]) == (1000, TOLD)
    assert (found.max_num_seqs, found.sources["max_num_seqs"]) == (64, SEEN)
    assert found.sources["max_num_batched_tokens"] == ASSUMED


def test_a_cache_of_unknown_size_is_asked_for() -> None:
    with pytest.raises(EngineError, match="--kv-capacity-tokens"):
        resolve(EngineFacts(model="m"), {}, {})


def test_prompts_are_new_every_time() -> None:
    engine = Engine("http://127.0.0.1:1", clock=lambda: 0.0, seed=1)
    first, second = engine.prompt(64), engine.prompt(64)
    assert len(first) == len(second) == 64
    assert first != second
