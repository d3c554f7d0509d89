"""Data-parallel ranks behind one port as recorded, and elastic expert parallelism, which nobody could record here."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .client import Response, exchange
from .conftest import Emulator
from .registry import Tally
from .stories import Stream, apart, attempt, ending, load, output_tokens, sum_of, wait_until
from .subjects import RANKS, Subject, kinds, opened
from .test_dev import by_nature, compared, replay

FIRST = ("kv_event_sources", "is_scaling", "rank_header_0", "rank_header_1", "rank_header_1")
THEN = ("no_rank_0", "no_rank_1", "no_rank_2", "no_rank_3", "rank_header_2", "scale_elastic_ep_dp2", "health_after")
COUNTED = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total")


def per_rank(page: str) -> dict[str, list[float]]:
    """The counters that tell where requests went."""
    found = {
        name: [sum_of(page, f"vllm:{name}", engine=rank) for rank in ("0", "1")]
        for name in (*COUNTED, "num_requests_running")
    }
    found["ends"] = [
        sum_of(page, "vllm:request_success_total", engine=rank, finished_reason="length") for rank in ("0", "1")
    ]
    return found


@pytest.fixture(params=kinds())
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    with opened(request.param, RANKS, tmp_path) as running:
        yield running


def test_ranks_as_recorded(subject: Subject, tally: Tally) -> None:
    """The recorded session from its beginning, so that each request meets the same caches and the same balancer; then
    the death of a rank, because a pair of real ranks takes a minute to start."""
    found: dict[str, str | None] = {}
    for case in (*FIRST, *THEN):
        recorded = load(f"dp2/{case}")
        judge = by_nature if case == "kv_event_sources" else compared
        found[case] = judge(case, recorded, replay(subject, recorded))
        tally(subject.kind, f"dp2/{case}", found[case])
    wait_until(lambda: sum_of(page_of(subject), "vllm:request_success_total") == 7)
    counted = apart(per_rank(load("metrics/dp2")["response"]["text"]), per_rank(page_of(subject)))
    died = death_of_a_rank(subject)
    tally(subject.kind, "dp2/sigkill_one_rank", died)
    problems = {name: text for name, text in {**found, "counted": counted, "died": died}.items() if text}
    assert not problems, problems


def page_of(subject: Subject) -> str:
    return exchange(subject.url, "GET", "/metrics").body.decode()


def death_of_a_rank(subject: Subject) -> str | None:
    """The other rank's stream ends with "abort" at once, its own with an error seconds later, then the server goes."""
    recorded = load("dp2/sigkill_one_rank")
    request = recorded["request"]
    streams = [
        Stream(subject.url, request["path"], request["body"], headers={"X-data-parallel-rank": str(rank)})
        for rank in range(2)
    ]
    for stream in streams:
        stream.wait_events(20)
    began_s = time.monotonic()
    subject.signal_core(signal.SIGKILL, recorded["killed_rank"])
    ends, at_s = [], []
    for stream in streams:
        ends.append(ending(stream.finish()))
        at_s.append(time.monotonic() - began_s)
    gone = subject.server_gone(30)
    by_rank = recorded["streams_by_rank"]
    own_ms = by_rank["1"]["end_ms"] - recorded["kill_ms"]
    expected = {"streams": [ending(by_rank[rank]) for rank in ("0", "1")], "gone": True, "health": None, "later": True}
    got = {
        "streams": ends,
        "gone": gone,
        "health": attempt(subject.url, "GET", "/health"),
        "later": at_s[1] - at_s[0] > own_ms / 2000,
    }
    return apart(expected, got)


Start = Callable[..., Emulator]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Emulator] = []

    def launch(*flags: str) -> Emulator:
        running.append(Emulator(tmp_path, *flags))
        return running[-1]

    yield launch
    for process in running:
        process.kill()


ELASTIC = ("--enable-elastic-ep", "--elastic-ep-max-dp-size", "4", "--elastic-ep-prepare-s", "0.2")
BODY = {"model": "tiny", "prompt": [70, 71, 72], "max_tokens": 1500, "ignore_eos": True, "stream": True}


def scale(emulator: Emulator, size: Any, **fields: Any) -> Response:
    body = {"new_data_parallel_size": size, **fields}
    return exchange(emulator.url, "POST", "/scale_elastic_ep", body)


def scaling(emulator: Emulator, size: int, **fields: Any) -> tuple[threading.Thread, list[Response]]:
    answers: list[Response] = []
    thread = threading.Thread(target=lambda: answers.append(scale(emulator, size, **fields)))
    thread.start()
    return thread, answers


def stream_on(emulator: Emulator, rank: int, tokens: int = 1500) -> Stream:
    fields = {**BODY, "return_token_ids": True, "max_tokens": tokens}
    return Stream(emulator.url, "/v1/completions", fields, headers={"X-data-parallel-rank": str(rank)})


def refuses_all(emulator: Emulator) -> bool:
    return exchange(emulator.url, "GET", "/version").status == 503


def page(emulator: Emulator) -> str:
    return exchange(emulator.url, "GET", "/metrics").body.decode()


def test_growing_freezes_streams_refuses_every_path_and_resets_counters(start: Start) -> None:
    slow = ("--time-scale", "0.2")
    emulator = start(*ELASTIC, "--elastic-ep-commit-s", "0.6", *slow, "--data-parallel-size", "2")
    exchange(emulator.url, "POST", "/v1/completions", {**BODY, "max_tokens": 5, "stream": False})
    assert sum_of(page(emulator), "vllm:generation_tokens_total") == 5
    stream = stream_on(emulator, 1, 400)
    stream.wait_events(5)
    thread, answers = scaling(emulator, 4)
    wait_until(lambda: refuses_all(emulator))
    came = stream.events()
    for method, path in (("GET", "/health"), ("GET", "/metrics"), ("POST", "/is_scaling_elastic_ep"), ("GET", "/nope")):
        answer = exchange(emulator.url, method, path)
        assert (answer.status, answer.body) == (
            503,
            b'{"error":"The model is currently scaling. Please try again later."}',
        )
        assert answer.header("vary") is None
    assert stream.events() - came < 3, "running streams freeze"
    thread.join(20)
    assert (answers[0].status, answers[0].json()) == (200, {"message": "Scaled to 4 data parallel engines"})
    assert not stream.ended, "too fast for this test"
    assert output_tokens(stream.finish().chunks) == 400
    text = page(emulator)
    assert sum_of(text, "vllm:generation_tokens_total") < 400, "counters began anew"
    assert 'vllm:num_requests_running{engine="3",model_name="tiny"} 0.0' in text
    assert exchange(emulator.url, "POST", "/is_scaling_elastic_ep", {}).json() == {"is_scaling_elastic_ep": False}
    short = {**BODY, "max_tokens": 1, "stream": False}
    statuses = [
        exchange(emulator.url, "POST", "/v1/completions", short, headers={"X-data-parallel-rank": rank}).status
        for rank in ("3", "4")
    ]
    assert statuses == [200, 400]


def test_shrinking_aborts_what_runs_on_ranks_that_leave(start: Start) -> None:
    slow = ("--time-scale", "0.2")
    emulator = start(*ELASTIC, "--elastic-ep-commit-s", "0.1", *slow, *RANKS.emulator, *RANKS.kv_events_args())
    assert sorted(exchange(emulator.url, "GET", "/kv_event_sources").json()) == ["0", "1"]
    stays, leaves = stream_on(emulator, 0, 400), stream_on(emulator, 1, 2000)
    for stream in (stays, leaves):
        stream.wait_events(5)
    thread, answers = scaling(emulator, 1)
    events = ending(leaves.finish())["last events"]
    assert (events[0]["finish_reason"], events[1]) == ("abort", "[DONE]")
    assert output_tokens(stays.finish().chunks) == 400
    thread.join(20)
    assert answers[0].status == 200
    assert sum_of(page(emulator), "vllm:request_success_total", finished_reason="abort", engine="1") == 1
    short = {**BODY, "max_tokens": 1, "stream": False}
    pinned = exchange(emulator.url, "POST", "/v1/completions", short, headers={"X-data-parallel-rank": "1"})
    assert "out of range [0, 1)" in pinned.json()["error"]["message"]
    assert sorted(exchange(emulator.url, "GET", "/kv_event_sources").json()) == ["0"]
    assert scale(emulator, 2).status == 200
    assert exchange(emulator.url, "POST", "/v1/completions", short, headers={"X-data-parallel-rank": "1"}).status == 200
    assert sorted(exchange(emulator.url, "GET", "/kv_event_sources").json()) == ["0", "1"]


def test_a_failed_commit_refuses_every_path_for_good(start: Start) -> None:
    emulator = start(*ELASTIC, "--elastic-ep-commit-s", "0.1", "--data-parallel-size", "2")
    assert exchange(emulator.admin, "POST", "/faults", {"kind": "fail_scaling", "step": "commit"}).status == 200
    answer = scale(emulator, 3)
    assert answer.status == 500
    assert answer.json()["error"] == {
        "message": "Scale failed",
        "type": "Internal Server Error",
        "param": None,
        "code": 500,
    }
    assert refuses_all(emulator)
    assert scale(emulator, 2).status == 503


def test_a_failed_preparation_changes_nothing(start: Start) -> None:
    emulator = start(*ELASTIC, "--elastic-ep-commit-s", "0.1")
    exchange(emulator.admin, "POST", "/faults", {"kind": "fail_scaling", "step": "prepare"})
    assert scale(emulator, 2).status == 500
    assert exchange(emulator.url, "GET", "/health").status == 200
    assert scale(emulator, 2).status == 200


def test_limits_of_the_size(start: Start) -> None:
    experts = ("--num-experts", "64", "--num-redundant-experts", "16")
    emulator = start(*ELASTIC, "--elastic-ep-commit-s", "0", "--data-parallel-size", "4", *experts)
    for size, message in (
        (5, "Cannot scale to data_parallel_size 5; --elastic-ep-max-dp-size is 4."),
        (3, "Cannot scale to data_parallel_size 3, minimum is 4"),
    ):
        answer = scale(emulator, size)
        assert (answer.status, answer.json()["error"]["message"]) == (400, message)
    assert scale(emulator, 4).status == 200
    roomy = start(
        *ELASTIC,
        "--elastic-ep-commit-s",
        "0",
        "--data-parallel-size",
        "4",
        "--num-experts",
        "64",
        "--num-redundant-experts",
        "64",
    )
    assert [scale(roomy, size).status for size in (2, 1, 4)] == [200, 400, 200]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"null", b"\xff", b'{"new_data_parallel_size": {}}'])
def test_garbage_changes_no_size(start: Start, raw: bytes) -> None:
    emulator = start(*ELASTIC)
    answer = exchange(emulator.url, "POST", "/scale_elastic_ep", raw=raw)
    assert answer.status in (400, 500)
    assert b"Traceback" not in answer.body
    assert exchange(emulator.url, "GET", "/health").status == 200


def test_draining_waits_and_gives_up_in_time(start: Start) -> None:
    emulator = start(
        *ELASTIC, "--elastic-ep-commit-s", "0.1", "--elastic-ep-drain-requests", "--data-parallel-size", "2"
    )
    stream = stream_on(emulator, 1)
    stream.wait_events(5)
    answer = scale(emulator, 1, drain_timeout=1)
    assert (answer.status, answer.json()["error"]["type"]) == (408, "Request Timeout")
    assert answer.json()["error"]["message"] == "Scale failed due to request drain timeout after 1 seconds"
    assert exchange(emulator.url, "GET", "/health").status == 200, "the flag is taken back"
    assert scale(emulator, 4).status == 500, "another size is prepared already"
    thread, answers = scaling(emulator, 1, drain_timeout=60)
    wait_until(lambda: refuses_all(emulator))
    assert ending(stream.finish())["last events"][0]["finish_reason"] == "length", "drained, not aborted"
    thread.join(20)
    assert answers[0].status == 200


def test_requests_spread_over_ranks_and_stay_where_pinned(start: Start) -> None:
    emulator = start("--data-parallel-size", "4", "--time-scale", "0.5")
    streams = [Stream(emulator.url, "/v1/completions", BODY) for _ in range(8)]
    for stream in streams:
        stream.wait_events(1)
    wait_until(lambda: sum_of(page(emulator), "vllm:num_requests_running") == 8)
    running = [sum_of(page(emulator), "vllm:num_requests_running", engine=str(rank)) for rank in range(4)]
    assert running == [2, 2, 2, 2]
    for stream in streams:
        stream.hang_up()
    wait_until(lambda: sum_of(page(emulator), "vllm:num_requests_running") == 0)
    pinned = [stream_on(emulator, 2) for _ in range(3)]
    wait_until(lambda: sum_of(page(emulator), "vllm:num_requests_running", engine="2") == 3)
    for stream in pinned:
        stream.hang_up()
