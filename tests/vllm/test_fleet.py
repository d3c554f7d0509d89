"""Twofold in front of real engines: errors, disconnects, and engines that stop or die under it."""

import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from support.fleets import watched_fleet
from support.up import Up

from .vllm_engine import VllmEngine, start_all

MakeEngine = Callable[..., VllmEngine]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
PROMPT = "def main(argv):\n    import os, sys\n"
WAIT_S = 60


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait until ``condition()`` holds; fails the test with ``what`` after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


def post(url: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WAIT_S)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **(headers or {})})
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


@pytest.fixture
def mortal_fleet(make_engine: MakeEngine, tmp_path: Path) -> Iterator[tuple[Up, list[VllmEngine]]]:
    """A fleet on two engines of the test's own, to be broken."""
    pair = [make_engine(), make_engine()]
    start_all(pair)
    up = Up(watched_fleet([engine.url for engine in pair], pair[0].model), tmp_path / "fleet")
    try:
        up.wait_ready(2)
        yield up, pair
    finally:
        up.stop()


def stream_until_first_token(client: openai.OpenAI, model: str, prompt: str, max_tokens: int) -> Any:
    """A started stream, one chunk read."""
    stream = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, stream=True, **GREEDY)
    next(iter(stream))
    return stream


class TestErrors:
    def test_unknown_model_is_404_in_the_openai_shape(self, service_url: str) -> None:
        status, headers, body = post(service_url, "/v1/completions", b'{"model": "nope", "prompt": "x"}')
        assert status == 404
        assert headers["x-twofold-reason"] == "model-not-found"
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    def test_unknown_model_is_404_in_the_anthropic_shape(self, service_url: str) -> None:
        body = b'{"model": "nope", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}'
        status, _, answer = post(service_url, "/v1/messages", body)
        assert status == 404
        assert json.loads(answer)["type"] == "error"

    def test_bad_json_is_400(self, service_url: str) -> None:
        status, headers, _ = post(service_url, "/v1/chat/completions", b'{"model": ')
        assert (status, headers["x-twofold-reason"]) == (400, "bad-request")

    def test_an_error_of_the_engine_comes_through_unchanged(
        self, service_url: str, engines: Sequence[VllmEngine]
    ) -> None:
        body = json.dumps({"model": engines[0].model, "prompt": PROMPT, "max_tokens": 8, "temperature": -1}).encode()
        direct = post(engines[0].url, "/v1/completions", body)
        routed = post(service_url, "/v1/completions", body)
        assert routed[0] == direct[0] == 400
        assert routed[2] == direct[2]

    def test_request_id_is_passed_on_and_echoed(self, service_url: str, model_name: str) -> None:
        body = json.dumps({"model": model_name, "prompt": PROMPT, "max_tokens": 2}).encode()
        status, headers, answer = post(service_url, "/v1/completions", body, {"X-Request-Id": "abc-123"})
        assert status == 200
        assert headers["x-request-id"] == "abc-123"
        assert json.loads(answer)["id"] == "cmpl-abc-123"


class TestDisconnect:
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_leaves_frees_the_engine(
        self, service_url: str, model_name: str, engines: Sequence[VllmEngine], stream: bool
    ) -> None:
        body = {"model": model_name, "prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
        parts = urlsplit(service_url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WAIT_S)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})

        def running() -> float:
            return sum(engine.metric("vllm:num_requests_running") for engine in engines)

        wait_for(lambda: running() == 1, "the request runs")
        connection.close()
        wait_for(lambda: running() == 0, "the engine drops the request", 10)


def usable_targets(up: Up) -> int:
    """Targets that the first replica's relays may send work to."""
    return int(up.state(up.admin_urls[0]).get("usable_targets", 0))


def completes_everywhere(client: openai.OpenAI, model: str, requests: int) -> bool:
    """Whether so many requests of different prompts all end normally."""
    answers = [
        client.completions.create(model=model, prompt=f"{number} {PROMPT}", max_tokens=4, **GREEDY)
        for number in range(requests)
    ]
    return all(answer.choices[0].finish_reason == "length" for answer in answers)


def test_engines_that_are_killed_come_back_and_are_terminated(mortal_fleet: tuple[Up, list[VllmEngine]]) -> None:
    """One story for one pair of engines, because a pair takes a minute to start."""
    up, pair = mortal_fleet
    model = pair[0].model
    with openai.OpenAI(base_url=f"{up.urls[0]}/v1", api_key="x", max_retries=0, timeout=60) as client:
        streams = [stream_until_first_token(client, model, f"{PROMPT}{i}", 1500) for i in range(4)]
        busy = max(pair, key=lambda engine: engine.metric("vllm:num_requests_running"))
        victims = round(busy.metric("vllm:num_requests_running"))
        assert victims > 0
        port = urlsplit(busy.url).port
        assert port is not None
        busy.signal(signal.SIGKILL)
        broken = 0
        for stream in streams:
            try:
                assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
            except openai.APIError:
                broken += 1
        assert broken == victims, "only what ran on the killed engine may break"
        assert completes_everywhere(client, model, 6), "new work goes to the other engine, unseen by the client"
        wait_for(lambda: usable_targets(up) == 1, "the fleet gives the killed engine up")

        busy.stop()
        busy.port = port
        busy.start()
        busy.wait_ready()
        wait_for(lambda: usable_targets(up) == 2, "the engine that came back is admitted again")

        pair[0].signal(signal.SIGTERM)
        assert completes_everywhere(client, model, 12)
        wait_for(lambda: usable_targets(up) == 1, "the fleet gives the terminated engine up")
