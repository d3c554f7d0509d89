"""How streams end: disconnects, aborts, signals and deaths as recorded, repeated on emulated and on real engines."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from .client import exchange
from .registry import Tally
from .stories import (
    Stream,
    apart,
    attempt,
    ending,
    load,
    movement,
    recorded_movement,
    scrape,
    sum_of,
    wait_until,
)
from .subjects import DRAINING, HURRIED, PLAIN, SMALL, Subject, kinds, opened

SILENCE_S = 2.0
"""How long a stream must say nothing to count as silent."""


def request_of(case: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    recorded = load(f"lifecycle/{case}")["request"]
    return recorded["path"], recorded["body"], recorded["headers"]


def check(tally: Tally, kind: str, case: str, expected: dict[str, Any], got: dict[str, Any]) -> None:
    difference = apart(expected, got)
    tally(kind, f"lifecycle/{case}", difference)
    assert difference is None, difference


@pytest.fixture(scope="module", params=kinds())
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine that survives the scenarios which use it."""
    with opened(request.param, PLAIN, tmp_path_factory.mktemp("plain")) as subject:
        yield subject


def test_client_disconnect(shared: Subject, tally: Tally) -> None:
    path, body, _ = request_of("client_disconnect")
    before = scrape(shared.url)
    stream = Stream(shared.url, path, body)
    stream.wait_events(22)
    during = scrape(shared.url)
    stream.hang_up()
    wait_until(lambda: scrape(shared.url).running == 0)
    wait_until(lambda: scrape(shared.url).kv_usage == 0)
    after = scrape(shared.url)
    assert scrape(shared.url).generated == after.generated, "tokens were counted after the end"
    expected = recorded_movement(load("lifecycle/client_disconnect")["timeline"])
    check(tally, shared.kind, "client_disconnect", expected, movement(before, during, after))


def test_client_disconnect_of_a_whole_answer(shared: Subject, tally: Tally) -> None:
    path, body, _ = request_of("client_disconnect_nonstream")
    recorded = load("lifecycle/client_disconnect_nonstream")
    before = scrape(shared.url)
    stream = Stream(shared.url, path, body, silence_s=0.5)
    wait_until(lambda: scrape(shared.url).generated > before.generated)
    during = scrape(shared.url)
    answer = stream.finish()
    wait_until(lambda: scrape(shared.url).running == 0)
    wait_until(lambda: scrape(shared.url).kv_usage == 0)
    expected = {"answer": ending(recorded["response"]), **recorded_movement(recorded["timeline"])}
    got = {"answer": ending(answer), **movement(before, during, scrape(shared.url))}
    check(tally, shared.kind, "client_disconnect_nonstream", expected, got)


@pytest.mark.parametrize("case", ["abort_requests", "abort_requests_completions"])
def test_abort_by_id(shared: Subject, tally: Tally, case: str) -> None:
    recorded = load(f"lifecycle/{case}")
    path, body, headers = request_of(case)
    before = scrape(shared.url)
    stream = Stream(shared.url, path, body, headers=headers)
    stream.wait_events(5)
    during = scrape(shared.url)
    ended = []
    for name, _ in recorded["aborts"]:
        answer = exchange(shared.url, "POST", "/inference/v1/abort_requests", {"request_ids": [name]})
        assert (answer.status, answer.body, answer.header("content-type")) == (200, b"", None)
        seen = stream.events()
        wait_until(lambda seen=seen: stream.ended or stream.events() > seen + 20)
        ended.append(stream.ended)
    answer = stream.finish()
    wait_until(lambda: scrape(shared.url).running == 0)
    expected = {
        "ended by": [mark[1].rpartition(" ")[2] == "True" for mark in recorded["marks_ms"] if "ended" in mark[1]],
        "stream": ending(recorded["response"]),
        **recorded_movement(recorded["timeline"]),
    }
    got = {"ended by": ended, "stream": ending(answer), **movement(before, during, scrape(shared.url))}
    check(tally, shared.kind, case, expected, got)


def test_stopped_engine_core(shared: Subject, tally: Tally) -> None:
    recorded = load("lifecycle/sigstop_engine_core")
    path, body, _ = request_of("sigstop_engine_core")
    probes = sorted({(probe, status) for _, probe, status in recorded["probes"]})
    stream = Stream(shared.url, path, body)
    stream.wait_events(5)
    shared.signal_core(signal.SIGSTOP)
    try:
        wait_silent(stream)
        answers = sorted((probe, exchange(shared.url, "GET", probe).status) for probe, _ in probes)
        frozen = scrape(shared.url)
        still = stream.events()
        stays = stream.events() == still and scrape(shared.url) == frozen
    finally:
        shared.signal_core(signal.SIGCONT)
    answer = stream.finish()
    expected = {"probes": probes, "stays": True, "stream": ending(recorded["response"])}
    got = {"probes": answers, "stays": stays, "stream": ending(answer)}
    check(tally, shared.kind, "sigstop_engine_core", expected, got)


def wait_silent(stream: Stream, quiet_s: float = 0.6) -> None:
    """Wait until nothing has come for a while."""
    nothing = threading.Event()
    while True:
        seen = stream.events()
        nothing.wait(quiet_s)
        if stream.events() == seen:
            return


@pytest.fixture(params=kinds())
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def two_streams(subject: Subject, case: str) -> tuple[Stream, Stream]:
    """The streamed and the whole request of a recorded signal, both running."""
    path, body, _ = request_of(case)
    stream = Stream(subject.url, path, body, silence_s=20)
    whole = Stream(subject.url, path, {**body, "stream": False}, silence_s=20)
    stream.wait_events(5)
    wait_until(lambda: scrape(subject.url).running == 2)
    return stream, whole


def give_up(*streams: Stream) -> list[Any]:
    """Wait for silence, then close; what came, as a client that gives up sees it."""
    found = []
    for stream in streams:
        wait_silent(stream, SILENCE_S)
        partial = stream.partial()
        if partial is not None and not stream.ended:
            partial.end = "timeout"
        found.append(ending(partial) if partial is not None else {"status": None, "end": "timeout"})
    for stream in streams:
        stream.hang_up()
    return found


def test_sigterm_by_default(kind: str, tally: Tally, tmp_path: Path) -> None:
    recorded = load("lifecycle/sigterm_default")
    with opened(kind, PLAIN, tmp_path) as subject:
        stream, whole = two_streams(subject, "sigterm_default")
        subject.signal_server(signal.SIGTERM)
        wait_until(lambda: attempt(subject.url, "GET", "/health") is None)
        late = attempt(subject.url, "POST", "/v1/completions", {**request_of("sigterm_default")[1], "max_tokens": 2})
        lives = subject.server_lives
        heard = give_up(stream, whole)
        got = {"stream": heard[0], "whole": heard[1], "late": ending(None) if late is None else ending(late)}
        got |= {"lives": lives, "gone": subject.server_gone(30)}
    expected = {
        "stream": ending(recorded["response"]),
        "whole": ending(recorded["nonstream_response"]),
        "late": ending(recorded["late_request"]),
        "lives": True,
        "gone": True,
    }
    check(tally, kind, "sigterm_default", expected, got)


def late_answers(subject: Subject, body: dict[str, Any]) -> dict[str, Any]:
    path = "/v1/chat/completions"
    answers = {
        "nonstream": attempt(subject.url, "POST", path, {**body, "stream": False, "max_tokens": 2}),
        "stream": attempt(subject.url, "POST", path, {**body, "max_tokens": 2}),
    }
    found: dict[str, Any] = {name: ending(answer) for name, answer in answers.items()}
    health = attempt(subject.url, "GET", "/health")
    found["health"] = health.status if health is not None else "ConnectionRefusedError"
    return found


def recorded_late(recorded: dict[str, Any]) -> dict[str, Any]:
    late = recorded["late"]
    return {"nonstream": ending(late["nonstream"]), "stream": ending(late["stream"]), "health": late["health"]}


def test_sigterm_by_default_in_a_chat(kind: str, tally: Tally, tmp_path: Path) -> None:
    recorded = load("lifecycle/sigterm_default_chat_quiet")
    path, body, _ = request_of("sigterm_default_chat_quiet")
    with opened(kind, PLAIN, tmp_path) as subject:
        stream = Stream(subject.url, path, body, silence_s=20)
        stream.wait_events(5)
        subject.signal_server(signal.SIGTERM)
        wait_until(lambda: attempt(subject.url, "GET", "/health") is None)
        late = late_answers(subject, body)
        lives = subject.server_lives
        got = {"late": late, "lives": lives, "stream": give_up(stream)[0], "gone": subject.server_gone(30)}
    expected = {"late": recorded_late(recorded), "lives": True, "stream": ending(recorded["response"]), "gone": True}
    check(tally, kind, "sigterm_default_chat_quiet", expected, got)


def test_sigterm_with_time_to_finish(kind: str, tally: Tally, tmp_path: Path) -> None:
    recorded = load("lifecycle/sigterm_drain_completes")
    path, body, _ = request_of("sigterm_drain_completes")
    with opened(kind, DRAINING, tmp_path) as subject:
        stream = Stream(subject.url, path, body, silence_s=20)
        stream.wait_events(5)
        subject.signal_server(signal.SIGTERM)
        wait_until(lambda: refuses_chats(subject, body))
        late = late_answers(subject, body)
        assert not stream.ended, "too fast for this test"
        answer = stream.finish()
        got = {"late": late, "stream": ending(answer), "gone": subject.server_gone(30)}
    expected = {"late": recorded_late(recorded), "stream": ending(recorded["response"]), "gone": True}
    check(tally, kind, "sigterm_drain_completes", expected, got)


def refuses_chats(subject: Subject, body: dict[str, Any]) -> bool:
    answer = attempt(subject.url, "POST", "/v1/chat/completions", {**body, "stream": False, "max_tokens": 1})
    return answer is not None and answer.status == 500


def test_sigterm_with_too_little_time(kind: str, tally: Tally, tmp_path: Path) -> None:
    recorded = load("lifecycle/sigterm_shutdown_timeout_15")
    with opened(kind, HURRIED, tmp_path) as subject:
        before = scrape(subject.url)
        stream, whole = two_streams(subject, "sigterm_shutdown_timeout_15")
        during = scrape(subject.url)
        subject.signal_server(signal.SIGTERM)
        body = {**request_of("sigterm_shutdown_timeout_15")[1], "max_tokens": 2}
        answers = []

        def turned_away() -> bool:
            answers.append(attempt(subject.url, "POST", "/v1/completions", body))
            return answers[-1] is not None and answers[-1].body == b"data: [DONE]\n\n"

        wait_until(turned_away)
        served = sum(answer is not None and b"finish_reason" in answer.body for answer in answers)
        health = exchange(subject.url, "GET", "/health").status
        wait_until(lambda: scrape(subject.url).success["abort"] > 0)
        after = scrape(subject.url)
        after.success["length"] -= served  # requests that came before the signal had its effect
        after.success["abort"] -= len(answers) - served - 1
        wait_until(lambda: attempt(subject.url, "GET", "/health") is None)
        heard = give_up(stream, whole)
        got = {"late": ending(answers[-1]), "health": health, "stream": heard[0], "whole": heard[1]}
        got |= {"ends counted": movement(before, during, after)["ends counted"], "gone": subject.server_gone(30)}
    expected = {
        "late": ending(recorded["late_request"]),
        "health": 200,
        "stream": ending({**recorded["response"], "end": "timeout"}),
        "whole": ending(recorded["nonstream_response"]),
        "ends counted": recorded_movement(recorded["timeline"])["ends counted"],
        "gone": True,
    }
    check(tally, kind, "sigterm_shutdown_timeout_15", expected, got)


def test_killed_api_server(kind: str, tally: Tally, tmp_path: Path) -> None:
    recorded = load("lifecycle/sigkill_api_server")
    with opened(kind, PLAIN, tmp_path) as subject:
        stream, whole = two_streams(subject, "sigkill_api_server")
        subject.signal_server(signal.SIGKILL)
        assert subject.server_gone(30)
        late = attempt(subject.url, "GET", "/health")
        got = {"stream": ending(stream.finish()), "whole": ending(whole.finish()), "late": ending(late)}
    expected = {
        "stream": ending(recorded["response"]),
        "whole": ending(recorded["nonstream_response"]),
        "late": ending(recorded["late_request"]),
    }
    check(tally, kind, "sigkill_api_server", expected, got)


def test_killed_engine_core(kind: str, tally: Tally, tmp_path: Path) -> None:
    recorded = load("lifecycle/sigkill_engine_core")
    with opened(kind, PLAIN, tmp_path) as subject:
        stream, whole = two_streams(subject, "sigkill_engine_core")
        subject.signal_core(signal.SIGKILL)
        got = {"stream": ending(stream.finish()), "whole": ending(whole.finish())}
        got |= {"gone": subject.server_gone(30), "late": ending(attempt(subject.url, "GET", "/health"))}
    expected = {
        "stream": ending(recorded["response"]),
        "whole": ending(recorded["nonstream_response"]),
        "gone": True,
        "late": ending(recorded["late_request"]),
    }
    check(tally, kind, "sigkill_engine_core", expected, got)


def test_preemption_by_priority(kind: str, tally: Tally, tmp_path: Path) -> None:
    recorded = load("lifecycle/preemption_priority")
    counters = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total")
    counters += ("vllm:prompt_tokens_total",)
    with opened(kind, SMALL, tmp_path) as subject:
        before = exchange(subject.url, "GET", "/metrics").body.decode()
        streams: dict[int, Stream] = {}
        for index, priority in enumerate((10, 0, 5)):
            body = {"model": "tiny", "prompt": [70 + (index * 31 + place * 7) % 180 for place in range(600)]}
            body |= {"max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True, "priority": priority}
            body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}
            streams[priority] = Stream(subject.url, "/v1/completions", body)
            streams[priority].wait_events(1)
        answers = {priority: stream.finish() for priority, stream in streams.items()}
        wait_until(lambda: scrape(subject.url).running == 0)
        after = exchange(subject.url, "GET", "/metrics").body.decode()
        usages = [answer.deltas()[-1]["usage"]["completion_tokens"] for answer in answers.values()]
        got = {
            "counted": {name: sum_of(after, name) - sum_of(before, name) for name in counters},
            "usage": usages,
            "stalled": max(streams, key=lambda priority: streams[priority].longest_gap_s),
            "ends": [answer.events()[-1][1] for answer in answers.values()],
        }
    results = recorded["results"].values()
    expected = {
        "counted": {name: recorded["metrics_after"][name] - recorded["metrics_before"][name] for name in counters},
        "usage": [400, 400, 400],
        "stalled": max(results, key=lambda result: result["largest_gaps_ms_at_token"][0][0])["priority"],
        "ends": ["[DONE]"] * 3,
    }
    check(tally, kind, "preemption_priority", expected, got)
