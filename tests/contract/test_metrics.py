"""Every recorded series by name, type, help text, labels and bucket bounds; and the moments at which they move."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from .client import exchange
from .registry import Tally
from .stories import Stream, apart, load, scrape, sum_of, wait_until
from .subjects import PLAIN, RANKS, Subject, kinds, opened

OWN = "twofold_emulator_"
"""Series that only the emulator has."""
HISTORY = ("http_requests", "http_request_", "http_response_")
"""Families with samples for whatever was asked before: only their label names and bounds are compared."""
PER_MACHINE = frozenset(
    {
        *("major", "minor", "patchlevel", "version"),
        *("num_gpu_blocks", "kv_cache_size_tokens", "kv_cache_memory_bytes"),
        "mamba_ssm_cache_dtype",
    }
)
"""Labels whose values describe the machine: Python's version, the size of the KV cache; and a setting of other kinds of
models, which a second real engine showed with another value than the recorded one."""
FLAG_DEPENDENT = "vllm:tool_call_parser_invocations"
"""Shown with ``--tool-call-parser`` alone; the recorded pair of ranks ran without it, those under test run with it."""


class Family(msgspec.Struct, kw_only=True):
    """A family of a page: what stands in its head, and its samples' names and labels."""

    help: str
    type: str
    samples: list[tuple[str, tuple[tuple[str, str], ...]]]


def families(text: str) -> dict[str, Family]:
    """The families of a page, in their order."""
    found: dict[str, Family] = {}
    current = Family(help="", type="", samples=[])
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name, _, help_text = line[7:].partition(" ")
            current = found[name] = Family(help=help_text, type="", samples=[])
        elif line.startswith("# TYPE "):
            current.type = line.rsplit(" ", 1)[1]
        else:
            match = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
            assert match, line
            labels = tuple(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            current.samples.append((match[1], labels))
    return found


def comparable(text: str, *, model: str) -> dict[str, Any]:
    """A page with what differs by nature taken out."""
    found: dict[str, Any] = {}
    for name, family in families(text).items():
        if name.startswith(OWN):
            continue
        samples: Any = [
            (sample, tuple((label, _value(label, value, model)) for label, value in labels))
            for sample, labels in family.samples
        ]
        if name.startswith(HISTORY):
            samples = sorted({(sample, _shape(labels)) for sample, labels in samples})
        found[name] = (family.type, family.help, samples)
    return found


def _value(label: str, value: str, model: str) -> str:
    if label in PER_MACHINE:
        return "*"
    return "tiny" if label == "model_name" and value == model else value


def _shape(labels: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((label, value if label == "le" else "*") for label, value in labels)


def page_of(subject: Subject) -> str:
    return exchange(subject.url, "GET", "/metrics").body.decode()


def compare(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    order = apart(list(expected), list(got))
    return order or apart(expected, got)


@pytest.fixture(scope="module", params=kinds())
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """A fresh engine; its tests run in their order."""
    with opened(request.param, PLAIN, tmp_path_factory.mktemp("metrics")) as running:
        yield running


def test_page_of_a_fresh_engine(subject: Subject, tally: Tally) -> None:
    recorded = load("metrics/before")["response"]
    exchange(subject.url, "GET", "/v1/models")  # the recorded engine had been asked something too
    answer = exchange(subject.url, "GET", "/metrics")
    text = answer.body.decode()
    found = compare(comparable(recorded["text"], model="tiny"), comparable(text, model=subject.model))
    found = found or apart(
        [(name, "*" if name in ("date", "content-length") else value) for name, value in recorded["headers"]],
        [(name, "*" if name in ("date", "content-length") else value) for name, value in answer.headers],
    )
    moved = [
        line
        for line in text.splitlines()
        if re.match(r"vllm:\w+_(total|count|sum|bucket)\b", line) and not line.endswith(" 0.0")
    ]
    found = found or apart([], moved)
    tally(subject.kind, "metrics/before", found)
    assert found is None, found


def count(page: str, name: str, **labels: str) -> float:
    return sum_of(page, f"vllm:{name}", **labels)


def moves(before: str, after: str, names: tuple[str, ...]) -> dict[str, float]:
    return {name: count(after, name) - count(before, name) for name in names}


SUMS = (
    *("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
    *("request_success_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count"),
    *("request_time_per_output_token_seconds_count", "e2e_request_latency_seconds_count"),
    *("iteration_tokens_total_sum", "iteration_tokens_total_count", "request_params_n_sum", "request_params_n_count"),
    *("request_max_num_generation_tokens_sum", "request_max_num_generation_tokens_count"),
    *("request_params_max_tokens_sum", "request_prompt_tokens_sum", "request_generation_tokens_sum"),
    *("request_prefill_kv_computed_tokens_sum", "request_num_preemptions_count"),
    *("prompt_tokens_cached_total", "prompt_tokens_cached_by_source_total", "prompt_tokens_by_source_total"),
)


def ask(subject: Subject, **fields: Any) -> None:
    body = {"model": subject.model, "temperature": 0, "ignore_eos": True, **fields}
    answer = exchange(subject.url, "POST", "/v1/completions", body)
    assert answer.status == 200, answer.body


def after_one(subject: Subject, **fields: Any) -> dict[str, float]:
    """How the sums move with one request."""
    before = page_of(subject)
    ended = count(before, "request_success_total")
    ask(subject, **fields)
    wait_until(lambda: count(page_of(subject), "request_success_total") >= ended + fields.get("n", 1))
    return moves(before, page_of(subject), SUMS)


def test_one_request(subject: Subject) -> None:
    prompt = [70 + index % 100 for index in range(2 * subject.block_tokens + 5)]
    length = len(prompt)
    moved = after_one(subject, prompt=prompt, max_tokens=4)
    assert moved == {
        **dict.fromkeys(SUMS, 1),
        "prompt_tokens_total": length,
        "generation_tokens_total": 4,
        "prefix_cache_queries_total": length,
        "prefix_cache_hits_total": 0,
        "inter_token_latency_seconds_count": 3,
        "iteration_tokens_total_sum": length + 4,
        "iteration_tokens_total_count": 4,
        "request_max_num_generation_tokens_sum": 4,
        "request_params_max_tokens_sum": 4,
        "request_prompt_tokens_sum": length,
        "request_generation_tokens_sum": 4,
        "request_prefill_kv_computed_tokens_sum": length,
        "prompt_tokens_cached_total": 0,
        "prompt_tokens_cached_by_source_total": 0,
        "prompt_tokens_by_source_total": length,
    }
    cached = 2 * subject.block_tokens
    moved = after_one(subject, prompt=prompt, max_tokens=1)
    assert moved["prefix_cache_hits_total"] == cached
    assert moved["prompt_tokens_cached_by_source_total"] == cached
    assert moved["request_prefill_kv_computed_tokens_sum"] == length - cached
    assert moved["iteration_tokens_total_sum"] == length - cached + 1
    assert moved["request_time_per_output_token_seconds_count"] == 1, "observed as 0 for a single token"


def test_choices_of_one_prompt_count_once_as_a_request(subject: Subject) -> None:
    moved = after_one(subject, prompt=[70, 71], max_tokens=3, n=3, temperature=1.0)
    assert moved["request_success_total"] == 3
    assert (moved["request_params_n_count"], moved["request_params_n_sum"]) == (1, 3)
    assert moved["request_max_num_generation_tokens_count"] == 1
    assert moved["request_max_num_generation_tokens_sum"] == 3
    assert moved["e2e_request_latency_seconds_count"] == 3


def test_prompt_logprobs_leave_the_prefix_cache_alone(subject: Subject) -> None:
    prompt = [75 + index % 50 for index in range(subject.block_tokens + 5)]
    ask(subject, prompt=prompt, max_tokens=1)
    moved = after_one(subject, prompt=prompt, max_tokens=1, prompt_logprobs=1)
    assert (moved["prefix_cache_queries_total"], moved["prefix_cache_hits_total"]) == (0, 0)


def test_gauges_while_requests_run(subject: Subject) -> None:
    body = {"model": subject.model, "prompt": [70, 71], "max_tokens": 1500, "ignore_eos": True, "stream": True}
    stream = Stream(subject.url, "/v1/completions", body)
    stream.wait_events(3)
    during = scrape(subject.url)
    assert (during.running, during.waiting) == (1, 0)
    assert during.kv_usage > 0
    assert exchange(subject.url, "GET", "/load").json() == {"server_load": 1}
    before = count(page_of(subject), "request_success_total")
    stream.hang_up()
    wait_until(lambda: scrape(subject.url).running == 0)
    wait_until(lambda: scrape(subject.url).kv_usage == 0)
    wait_until(lambda: exchange(subject.url, "GET", "/load").json() == {"server_load": 0})
    assert count(page_of(subject), "request_success_total") == before


def test_http_exchanges_count_when_they_have_ended(subject: Subject) -> None:
    def asked(status: str) -> float:
        return sum_of(page_of(subject), "http_requests_total", handler="/v1/completions", status=status)

    good, bad = asked("2xx"), asked("4xx")
    body = {"model": subject.model, "prompt": [70], "max_tokens": 1000, "ignore_eos": True, "stream": True}
    stream = Stream(subject.url, "/v1/completions", body)
    stream.wait_events(2)
    assert asked("2xx") == good
    stream.finish()
    wait_until(lambda: asked("2xx") == good + 1)
    assert exchange(subject.url, "POST", "/v1/completions", {**body, "model": "nope"}).status == 404
    wait_until(lambda: asked("4xx") == bad + 1)
    none = sum_of(page_of(subject), "http_requests_total", handler="none")
    exchange(subject.url, "GET", "/nowhere")
    for path in ("/health", "/ping", "/version", "/load", "/metrics"):
        exchange(subject.url, "GET", path)
    wait_until(lambda: sum_of(page_of(subject), "http_requests_total", handler="none") == none + 1)
    assert not re.search(r'http_requests_total\{handler="/(health|ping|version|load|metrics)"', page_of(subject))


def test_page_after_work(subject: Subject, tally: Tally) -> None:
    """By the end this engine has been asked for most things that the recorded one was."""
    recorded = load("metrics/after")["response"]["text"]
    exchange(subject.url, "GET", "/v1/models")
    found = compare(comparable(recorded, model="tiny"), comparable(page_of(subject), model=subject.model))
    tally(subject.kind, "metrics/after", found)
    assert found is None, found


ORIGIN = {"Origin": "http://example.test"}


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/v1/models"), ("GET", "/nowhere")])
def test_other_origins_get_no_permission(subject: Subject, method: str, path: str) -> None:
    """vLLM 0.32 allows none unless told to."""
    answer = exchange(subject.url, method, path, headers=ORIGIN)
    assert answer.header("access-control-allow-origin") is None
    assert answer.header("vary") == "Origin"


@pytest.mark.parametrize(("wanted", "text"), [("POST", "origin"), ("ZAP", "origin, method")])
def test_browsers_that_ask_before_are_refused(subject: Subject, wanted: str, text: str) -> None:
    asks = {**ORIGIN, "Access-Control-Request-Method": wanted, "Access-Control-Request-Headers": "content-type"}
    answer = exchange(subject.url, "OPTIONS", "/v1/completions", headers=asks)
    assert (answer.status, answer.body) == (400, f"Disallowed CORS {text}".encode())
    shown = [(name, value) for name, value in answer.headers if name not in ("date", "server", "connection")]
    assert shown == [
        (
            "vary",
            "Origin, Access-Control-Request-Method, Access-Control-Request-Headers, "
            "Access-Control-Request-Private-Network",
        ),
        ("access-control-allow-methods", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY"),
        ("access-control-max-age", "600"),
        ("access-control-allow-headers", "content-type"),
        ("content-length", str(len(answer.body))),
        ("content-type", "text/plain; charset=utf-8"),
    ]


@pytest.mark.parametrize("kind", kinds())
def test_page_of_two_ranks(kind: str, tally: Tally, tmp_path_factory: pytest.TempPathFactory) -> None:
    recorded = load("metrics/dp2")["response"]["text"]
    with opened(kind, RANKS, tmp_path_factory.mktemp("ranks")) as pair:
        exchange(pair.url, "GET", "/kv_event_sources")
        got = comparable(page_of(pair), model=pair.model)
    got = {name: family for name, family in got.items() if not name.startswith(FLAG_DEPENDENT)}
    found = compare(comparable(recorded, model="tiny"), got)
    tally(kind, "dp2/metrics", found)
    assert found is None, found
