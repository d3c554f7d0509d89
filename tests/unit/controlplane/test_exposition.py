"""The metrics parser, on bodies of a real vLLM and on garbage."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from controlplane.probes.client import samples
from controlplane.probes.exposition import parse

RECORDINGS = Path(__file__).parent / "recordings"

SERIES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "prefix_queries_tokens": "vllm:prefix_cache_queries_total",
    "prefix_hits_tokens": "vllm:prefix_cache_hits_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "iterations": "vllm:iteration_tokens_total_count",
}


@pytest.mark.parametrize("name", ["metrics_after.txt", "dp2_metrics.txt"])
def test_it_agrees_with_the_reference_parser_on_recorded_bodies(name: str) -> None:
    body = (RECORDINGS / name).read_text()
    expected: dict[int, dict[str, float]] = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            for field, series in SERIES.items():
                if sample.name == series:
                    expected.setdefault(int(sample.labels["engine"]), {})[field] = sample.value
    readings = parse(body.encode())
    assert readings.ranks == expected
    assert set(expected) == ({0, 1} if name.startswith("dp2") else {0})


def test_facts_of_a_recorded_engine() -> None:
    readings = parse((RECORDINGS / "metrics_after.txt").read_bytes())
    assert readings.block_size_tokens == 128
    assert readings.kv_capacity_tokens == 524_288
    assert readings.hash_algorithm == "sha256"
    assert readings.engine_started_s == pytest.approx(1.79525290569e9)


def test_names_that_only_begin_alike_are_other_metrics() -> None:
    body = b'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7\nx vllm:num_requests_waiting{} 9\n'
    assert parse(body).ranks == {}


def test_series_of_several_adapters_add_up() -> None:
    lines = [b'vllm:num_requests_running{engine="0",model_name="%s"} %d' % pair for pair in ((b"a", 2), (b"b", 3))]
    body = b"\n".join(lines)
    assert parse(body).ranks == {0: {"running": 5.0}}


@pytest.mark.parametrize(
    "line",
    [
        b"vllm:num_requests_running{",
        b"vllm:num_requests_running{}",
        b"vllm:num_requests_running",
        b"vllm:num_requests_running{} NaN",
        b"vllm:num_requests_running{} +Inf",
        b"vllm:num_requests_running{} -1",
        b"vllm:num_requests_running{} 1e300",
        b'vllm:num_requests_running{engine="x"} 1',
        b'vllm:num_requests_running{engine="99999"} 1',
        b'vllm:num_requests_running{engine="\xc2\xb2"} 1',
        b"vllm:num_requests_running{" + b"x" * 20_000 + b"} 1",
    ],
)
def test_malformed_lines_are_left_out(line: bytes) -> None:
    readings = parse(line + b"\nvllm:num_requests_waiting 4\n")
    assert readings.ranks == {0: {"waiting": 4.0}}


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_garbage_never_crashes(raw: bytes) -> None:
    samples(parse(raw), lambda rank: (0, 0))


PIECES = st.sampled_from(
    [*(name.encode() for name in SERIES.values()), b"vllm:cache_config_info", b"{", b"}", b'engine="']
)
NOISE = st.sampled_from([b'"', b"\n", b" ", b"1", b"-", b"e9", b"NaN", b"block_size=", b"\\", b",", b"\x00", b"\xff"])


@given(st.lists(PIECES | NOISE, max_size=60).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_garbage_made_of_metrics_never_crashes(raw: bytes) -> None:
    for sample in samples(parse(raw), lambda rank: (0, 0)):
        assert 0 <= sample.kv_usage <= 1
        assert min(sample.running, sample.waiting, sample.iterations) >= 0
