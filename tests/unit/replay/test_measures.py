"""Percentiles, attainment and goodput by hand."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.model.fleet import Slo
from twofold.replay.engines import CacheCounters, parse_counters
from twofold.replay.measures import LogHistogram, Record, quantile, summarise
from twofold.replay.report import percent, result_line, seconds, ttft_over_time


def record(due_s: float, *, first: float = 0.5, step: float = 0.1, tokens: int = 11, **changes: Any) -> Record:
    last_s = due_s + first + step * (tokens - 1)
    values: dict[str, Any] = {
        "request_id": f"r{due_s}",
        "label": "",
        "due_s": due_s,
        "sent_s": due_s + 0.001,
        "first_s": due_s + first,
        "last_s": last_s,
        "end_s": last_s,
        "output_tokens": tokens,
        "verified_tokens": tokens,
    }
    return Record(**(values | changes))


def test_attainment_needs_both_latencies_and_a_complete_answer() -> None:
    slo = Slo(ttft_s=1.0, tpot_s=0.2)
    records = [
        record(0.0),
        record(1.0, first=1.5),
        record(2.0, step=0.3),
        record(3.0, error="reset"),
        record(4.0, tokens=1, step=9.0),
    ]
    figures = summarise(records, LogHistogram(), slo)
    assert figures.attainment == pytest.approx(2 / 5)
    assert (figures.errors, figures.errors_by_kind) == (1, {"reset": 1})
    assert figures.duration_s == pytest.approx(5.5)
    assert figures.goodput_rps == pytest.approx(2 / 5.5)
    assert figures.requests_per_s == pytest.approx(4 / 5.5)


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = record(10.0, sent_s=12.0, first=2.5)
    figures = summarise([late], LogHistogram(), Slo())
    assert figures.ttft_p50_s == pytest.approx(2.5)
    assert figures.lateness_p99_s == pytest.approx(2.0)


def test_percentiles_are_interpolated() -> None:
    assert quantile([1, 2, 3, 4], 0.5) == 2.5
    assert quantile([3, 1, 2], 0.0) == 1
    assert quantile([], 0.5) is None
    figures = summarise([record(float(i), first=(i + 1) / 100) for i in range(101)], LogHistogram(), Slo())
    assert figures.ttft_p50_s == pytest.approx(0.51)
    assert figures.ttft_p99_s == pytest.approx(1.0)
    assert figures.tpot_p50_s == pytest.approx(0.1)


def test_the_hit_ratio_is_that_of_requests_that_report_one() -> None:
    records = [
        record(0.0, usage_prompt_tokens=100, cached_tokens=80),
        record(1.0, usage_prompt_tokens=300, cached_tokens=0),
        record(2.0, usage_prompt_tokens=1000),
        record(3.0, usage_prompt_tokens=1000, cached_tokens=1000, error="reset"),
    ]
    assert summarise(records, LogHistogram(), Slo()).hit_ratio == pytest.approx(0.2)
    assert summarise(records[2:], LogHistogram(), Slo()).hit_ratio is None


def test_an_empty_run_has_no_figures_and_no_crash() -> None:
    figures = summarise([], LogHistogram(), Slo())
    assert (figures.requests, figures.attainment, figures.ttft_p50_s, figures.itl_p50_s) == (0, None, None, None)


@given(st.lists(st.floats(2e-6, 1e4), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_histogram_quantiles_are_within_two_percent_of_nearest_rank(values: list[float], q: float) -> None:
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert histogram.quantile(q) == pytest.approx(exact, rel=0.021)


@given(st.floats(-1.0, 1e12, allow_nan=False))
def test_a_histogram_takes_any_duration(value: float) -> None:
    histogram = LogHistogram()
    histogram.add(value)
    assert histogram.count == 1
    assert histogram.quantile(1.0) is not None


def test_engine_counters_are_read_from_a_metrics_page() -> None:
    page = """# HELP vllm:prefix_cache_queries_total x
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 20.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 30.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="1000",engine="0"} 1.0
"""
    counters = parse_counters(page)
    assert counters == CacheCounters(queries_tokens=120, hits_tokens=30, kv_capacity_tokens=16000)
    assert counters.hit_ratio_since(CacheCounters(queries_tokens=20, hits_tokens=10)) == pytest.approx(0.2)
    assert counters.hit_ratio_since(counters) is None
    assert CacheCounters().hit_ratio_since(counters) is None
    with pytest.raises(ValueError):
        parse_counters("vllm:prefix_cache_hits_total{ 3")


def test_ttft_over_time_is_by_the_time_requests_were_due() -> None:
    records = [record(float(i), first=0.1 if i < 50 else 0.9) for i in range(100)]
    times, values = ttft_over_time(records, 0.5, buckets=10)
    assert len(times) == 10
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.9)
    assert ttft_over_time([], 0.5) == ([], [])


def test_figures_for_people() -> None:
    assert [seconds(value) for value in (None, 0.0123, 0.9996, 12.0)] == ["-", "12.3 ms", "1 s", "12 s"]
    assert [percent(value) for value in (None, 0.1234)] == ["-", "12.3%"]
    assert result_line({"a": 1, "b": None}) == 'RESULT {"a":1,"b":null}'
