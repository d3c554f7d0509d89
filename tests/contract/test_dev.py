"""vLLM's development mode, LoRA adapters, priorities and queue limits, on emulated and on real engines."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from .client import Response, exchange
from .comparison import difference
from .registry import Tally
from .stories import Stream, apart, ending, load, output_tokens, scrape, sum_of, wait_until
from .subjects import (
    DEVELOPMENT,
    DEVELOPMENT_WITHOUT_SCALE_OUT,
    EMULATED,
    LIMITED,
    Subject,
    kinds,
    make_adapter,
    opened,
)

SIMPLE = ("priority_5", "priority_neg", "priority_string", "is_sleeping", "is_paused", "world_size")
SIMPLE += ("kv_event_sources_topic", "reset_prefix_cache", "sleep_level9", "is_sleeping_after", "server_info")
SIMPLE += ("lora_load_missing_path", "lora_load_no_name", "lora_load_empty_name", "lora_load_dup_base")
SIMPLE += ("lora_unload_unknown", "lora_unload_missing")
LORA = ("lora_load_ok", "lora_load_again", "models_with_lora", "lora_completion", "lora_unload_ok")
LORA += ("lora_completion_after_unload", "models_after_unload")
WITHOUT_SCALE_OUT = (
    "scale_out_disabled_abort",
    "scale_out_disabled_generate",
    "scale_out_disabled_render",
    "dev_abort_requests_all",
)
DIFFERENT_BY_NATURE = {
    "server_info": "the values describe the machine and all of vLLM's settings; only the three top keys are compared",
    "kv_event_sources_topic": "the ports are those of the recording; all the rest is compared",
}


@pytest.fixture(scope="module", params=kinds())
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with opened(request.param, DEVELOPMENT, tmp_path_factory.mktemp("development")) as running:
        yield running


def without_details(value: Any) -> Any:
    """The engine of these recordings ran without ``--enable-prompt-tokens-details``, those under test run with it."""
    if isinstance(value, dict) and isinstance(value.get("usage"), dict):
        return {**value, "usage": {**value["usage"], "prompt_tokens_details": None}}
    return value


def compared(case: str, recorded: dict[str, Any], response: Response) -> str | None:
    """What differs beyond the details of usage."""
    expected = {**recorded["response"]}
    if "json" in expected:
        expected["json"] = without_details(expected["json"])
        body = msgspec.json.encode(without_details(response.json()))
        response = msgspec.structs.replace(response, body=body)
    return difference(case, {**recorded, "response": expected}, response)


def replay(subject: Subject, recorded: dict[str, Any], **body: Any) -> Response:
    request = recorded["request"]
    sent = {**request["body"], **body} if "body" in request else None
    return exchange(subject.url, request["method"], request["path"], sent, headers=request["headers"])


def by_nature(case: str, recorded: dict[str, Any], response: Response) -> str | None:
    expected, got = recorded["response"]["json"], response.json()
    if case == "server_info":
        return apart([200, sorted(expected)], [response.status, sorted(got)])
    shapes = [
        {
            rank: {
                name: re.sub(r":\d+$", "", value) if isinstance(value, str) else value for name, value in config.items()
            }
            for rank, config in answer.items()
        }
        for answer in (expected, got)
    ]
    return apart(shapes[0], shapes[1])


@pytest.mark.parametrize("case", SIMPLE)
def test_exchange(subject: Subject, tally: Tally, case: str) -> None:
    recorded = load(f"dev/{case}")
    response = replay(subject, recorded)
    found = (by_nature if case in DIFFERENT_BY_NATURE else compared)(case, recorded, response)
    tally(subject.kind, f"dev/{case}", found)
    assert found is None, found


def test_adapters(subject: Subject, tally: Tally, tmp_path: Path) -> None:
    """One story, in the order of the recording: load, load again, list, use, unload, use, list."""
    path = make_adapter(tmp_path / "adapter", subject.kind)
    found = {}
    for case in LORA:
        recorded = load(f"dev/{case}")
        body = {"lora_path": str(path)} if "lora_path" in recorded["request"].get("body", {}) else {}
        found[case] = compared(case, recorded, replay(subject, recorded, **body))
        tally(subject.kind, f"dev/{case}", found[case])
    assert not any(found.values()), found


def test_adapters_do_not_share_cached_prefixes(subject: Subject, tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "adapter", subject.kind)
    prompt = [70 + index % 90 for index in range(2 * subject.block_tokens + 1)]

    def cached(model: str) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = exchange(subject.url, "POST", "/v1/completions", body).json()
        assert answer["model"] == model
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    names = ("first", "second")
    for name in names:
        load_it = {"lora_name": name, "lora_path": str(path)}
        assert exchange(subject.url, "POST", "/v1/load_lora_adapter", load_it).status == 200
    try:
        assert [cached("tiny"), cached("first"), cached("second")] == [0, 0, 0]
        assert [cached("tiny"), cached("first"), cached("second")] == [2 * subject.block_tokens] * 3
        page = exchange(subject.url, "GET", "/metrics").body.decode()
        shown = [line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{")]
        assert any('running_lora_adapters="first"' in line and 'max_lora="1"' in line for line in shown)
    finally:
        for name in names:
            exchange(subject.url, "POST", "/v1/unload_lora_adapter", {"lora_name": name})


def test_requests_of_another_adapter_wait_as_deferred(subject: Subject, tmp_path: Path) -> None:
    """With one adapter a step, the second adapter's request waits until the first one's has ended."""
    path = make_adapter(tmp_path / "adapter", subject.kind)
    names = ("left", "right")
    for name in names:
        load_it = {"lora_name": name, "lora_path": str(path)}
        assert exchange(subject.url, "POST", "/v1/load_lora_adapter", load_it).status == 200
    body = {"prompt": [70, 71], "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}
    first = Stream(subject.url, "/v1/completions", {**body, "model": "left"})
    first.wait_events(2)
    second = Stream(subject.url, "/v1/completions", {**body, "model": "right", "max_tokens": 3})
    base = Stream(subject.url, "/v1/completions", {**body, "model": "tiny", "max_tokens": 3})

    def deferred() -> bool:
        page = exchange(subject.url, "GET", "/metrics").body.decode()
        return sum_of(page, "vllm:num_requests_waiting_by_reason", reason="deferred") == 1

    wait_until(deferred)
    base.finish()
    assert not first.ended, "too fast for this test"
    assert second.events() == 0
    first.finish()
    assert ending(second.finish())["last events"][-1] == "[DONE]"
    for name in names:
        exchange(subject.url, "POST", "/v1/unload_lora_adapter", {"lora_name": name})


@pytest.mark.parametrize(
    "case", ["pause_keep_mid_stream", "pause_wait_mid_stream", "pause_abort_mid_stream", "sleep_level1_mid_stream"]
)
def test_pause_mid_stream(subject: Subject, tally: Tally, case: str) -> None:
    recorded = load(f"dev/{case}")
    wakes = "/wake_up" if recorded["control"].startswith("/sleep") else "/resume"
    before = scrape(subject.url)
    stream = Stream(subject.url, "/v1/completions", recorded["request"]["body"])
    stream.wait_events(10)
    control = exchange(subject.url, "POST", recorded["control"], {})
    came = stream.events()
    body = {"model": "tiny", "prompt": "def main", "max_tokens": 4, "temperature": 0}
    late: list[Response] = []
    thread = threading.Thread(target=lambda: late.append(exchange(subject.url, "POST", "/v1/completions", body)))
    thread.start()
    thread.join(0.7)
    got: dict[str, Any] = {
        "control": ending(control),
        "late answered": bool(late),
        "frozen": stream.events() == came and not stream.ended,
        "asleep": exchange(subject.url, "GET", "/is_sleeping").json(),
        "paused": exchange(subject.url, "GET", "/is_paused").json(),
    }
    again = exchange(subject.url, "POST", wakes, {})
    got["again"] = str(again.json())
    answer = stream.finish()
    thread.join(30)
    wait_until(lambda: scrape(subject.url).running == 0)
    after = scrape(subject.url)
    got |= {
        "stream": ending(answer),
        "whole": output_tokens(answer.chunks) == 600,
        "late": ending(late[0]),
        "aborts counted": after.success["abort"] - before.success["abort"],
    }
    aborts = "abort" in case or "sleep" in case
    expected = {
        "control": ending(recorded["control_response"]),
        "late answered": "None" not in _mark(recorded, "late request answered"),
        "frozen": "keep" in case,
        "asleep": {"is_sleeping": True},
        "paused": {"is_paused": True},
        "again": _mark(recorded, f"POST {wakes}").partition("-> 200 ")[2],
        "stream": ending(recorded["response"]),
        "whole": not aborts,
        "late": ending(recorded["late_response"]),
        "aborts counted": float(aborts),
    }
    found = apart(expected, got)
    tally(subject.kind, f"dev/{case}", found)
    assert found is None, found
    assert exchange(subject.url, "GET", "/is_sleeping").json() == {"is_sleeping": False}


def _mark(recorded: dict[str, Any], beginning: str) -> str:
    return str(next(text for _, text in recorded["marks_ms"] if text.startswith(beginning)))


def test_sleep_shows_in_the_metrics_and_wakes_in_parts(subject: Subject) -> None:
    def states() -> list[float]:
        page = exchange(subject.url, "GET", "/metrics").body.decode()
        names = ("awake", "weights_offloaded", "discard_all")
        return [sum_of(page, "vllm:engine_sleep_state", sleep_state=name) for name in names]

    def wake(query: str) -> Any:
        return exchange(subject.url, "POST", f"/wake_up{query}", {}).json()

    assert states() == [1, 0, 0]
    assert exchange(subject.url, "POST", "/sleep?level=2", {}).json() == {"status": "sleeping", "level": 2}
    assert states() == [0, 0, 1]
    assert wake("?tags=weights") == {"status": "sleeping", "tags": ["weights"]}
    assert exchange(subject.url, "GET", "/is_sleeping").json() == {"is_sleeping": True}
    assert wake("?tags=kv_cache") == {"status": "awake", "tags": ["kv_cache"]}
    assert states() == [1, 0, 0]
    assert exchange(subject.url, "POST", "/sleep?level=0", {}).json() == {"status": "sleeping", "level": 0}
    assert states() == [0, 0, 0]
    assert wake("") == {"status": "awake", "tags": None}
    page = exchange(subject.url, "GET", "/metrics").body.decode()
    family = "vllm:sleep_mode_operation_duration_seconds"
    assert f"# TYPE {family} histogram\n" in page
    assert f'{family}_bucket{{le="600.0",operation="sleep"}} ' in page
    assert sum_of(page, f"{family}_count", operation="wake") >= 3
    assert sum_of(page, "vllm:sleep_mode_operations_in_flight") == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/pause?mode=stop", "Input should be 'abort', 'wait' or 'keep'"),
        ("/pause?clear_cache=perhaps", "bool_parsing"),
        ("/sleep?level=-1", "greater_than_equal"),
        ("/sleep?level=deep", "int_parsing"),
    ],
)
def test_wrong_queries_are_400(subject: Subject, path: str, message: str) -> None:
    answer = exchange(subject.url, "POST", path, {})
    assert answer.status == 400
    assert message in answer.json()["error"]["message"]
    assert exchange(subject.url, "GET", "/is_paused").json() == {"is_paused": False}


def test_abort_of_every_request(subject: Subject) -> None:
    body = {"model": "tiny", "prompt": [70, 71], "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    streams = [Stream(subject.url, "/v1/completions", {**body, "stream": True}) for _ in range(2)]
    for stream in streams:
        stream.wait_events(3)
    assert exchange(subject.url, "POST", "/abort_requests", {}).json() == {"status": "aborted", "aborted": 2}
    for stream in streams:
        events = ending(stream.finish())["last events"]
        assert (events[0]["finish_reason"], events[1]) == ("abort", "[DONE]")
    assert exchange(subject.url, "POST", "/abort_requests", raw=b"{").status == 400


def test_reset_of_the_prefix_cache_under_load(subject: Subject) -> None:
    """It fails while blocks are held; with reset_running_requests those are recomputed, and no token is lost."""
    body = {"model": "tiny", "prompt": [70 + index % 60 for index in range(300)], "max_tokens": 1000, "temperature": 0}
    stream = Stream(
        subject.url, "/v1/completions", {**body, "ignore_eos": True, "stream": True, "return_token_ids": True}
    )
    stream.wait_events(20)
    assert exchange(subject.url, "POST", "/reset_prefix_cache", {}).json() == {"success": False}
    answer = exchange(subject.url, "POST", "/reset_prefix_cache?reset_running_requests=true", {})
    assert answer.json() == {"success": True}
    assert output_tokens(stream.finish().chunks) == 1000


@pytest.fixture(scope="module", params=kinds())
def closed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    flavour = DEVELOPMENT_WITHOUT_SCALE_OUT
    with opened(request.param, flavour, tmp_path_factory.mktemp("closed")) as running:
        yield running


@pytest.mark.parametrize("case", WITHOUT_SCALE_OUT)
def test_exchange_without_scale_out(closed: Subject, tally: Tally, case: str) -> None:
    recorded = load(f"dev/{case}")
    found = compared(case, recorded, replay(closed, recorded))
    tally(closed.kind, f"dev/{case}", found)
    assert found is None, found


@pytest.mark.parametrize("kind", kinds())
def test_queue_limits(kind: str, tmp_path: Path) -> None:
    with opened(kind, LIMITED, tmp_path) as subject:
        body = {"model": "tiny", "prompt": [70, 71], "max_tokens": 1900, "temperature": 0, "ignore_eos": True}
        streams = [Stream(subject.url, "/v1/completions", {**body, "stream": True}) for _ in range(2)]
        for stream in streams:
            stream.wait_events(1)
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        refused = [
            exchange(subject.url, "POST", "/v1/completions", {**body, "stream": True}),
            exchange(subject.url, "POST", "/v1/chat/completions", chat),
        ]
        for answer in refused:
            error = answer.json()["error"]
            assert (answer.status, error["type"], error["code"]) == (503, "Service Unavailable", 503)
            assert error["message"].startswith("The engine is currently busy and cannot accept new requests.")
        assert exchange(subject.url, "POST", "/v1/completions", {**body, "model": "nope"}).status == 404
        page = exchange(subject.url, "GET", "/metrics").body.decode()
        assert sum_of(page, "vllm:admission_rejections_total", reason="max_num_queued_reqs") == 2
        streams[0].hang_up()
        wait_until(lambda: scrape(subject.url).running == 1)
        assert exchange(subject.url, "POST", "/v1/chat/completions", chat).status == 200
        streams[1].hang_up()


def test_limit_of_queued_tokens(tmp_path: Path) -> None:
    """Only on the emulator: a real engine of this size prefills too fast to be caught."""
    flavour = msgspec.structs.replace(
        LIMITED, emulator=("--max-num-queued-tokens", "1000", "--time-scale", "0.02", "--max-num-seqs", "1")
    )
    with opened(EMULATED, flavour, tmp_path) as subject:
        body = {"model": "tiny", "prompt": [70] * 900, "max_tokens": 2, "stream": True}
        streams = [Stream(subject.url, "/v1/completions", body) for _ in range(2)]
        wait_until(lambda: exchange(subject.url, "GET", "/load").json() == {"server_load": 2})
        answer = exchange(subject.url, "POST", "/v1/completions", body)
        assert answer.status == 503
        assert "prefill token backlog" in answer.json()["error"]["message"]
        for stream in streams:
            stream.hang_up()
