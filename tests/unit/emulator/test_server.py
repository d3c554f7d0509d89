"""The server's parts in virtual time, without sockets: step timing, lateness, any request body, metrics."""

import heapq
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.model import EngineModel, FinishReason, Request
from emulator.server.app import EngineApp
from emulator.server.engine import RealTimeEngine
from emulator.server.exposition import Histogram
from emulator.server.faults import FaultError, FaultRequest, Faults, TokenFault
from emulator.server.group import EngineGroup
from emulator.server.host import configured_profile
from emulator.server.http import Exchange
from emulator.server.metrics import EngineMetrics
from emulator.server.page import PortMetrics
from emulator.server.settings import EngineSettings, Settings
from emulator.tokens import ChainChecker, encode
from twofold import profiles

PROFILE = profiles.get("cpu-tiny")


class VirtualTime:
    """A clock, a timer and an event loop in one, advanced by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.late_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    def clock(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when_s, self._sequence, callback))

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_at(self.now_s, callback)

    def step(self) -> bool:
        """Run the next callback, ``late_s`` after its time. False when there is none."""
        if not self._heap:
            return False
        when_s, _, callback = heapq.heappop(self._heap)
        self.now_s = max(self.now_s, when_s) + self.late_s
        callback()
        return True

    def run(self) -> None:
        while self.step():
            pass


class Connection:
    """Collects what an exchange writes."""

    def __init__(self) -> None:
        self.paused = False
        self.sent = b""
        self.done = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def exchange_done(self, exchange: Exchange) -> None:
        self.done = True


class Recorder:
    """A sink that notes when each token came."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.tokens: list[tuple[float, int]] = []
        self.dead = False

    def token(self, token_id: int, request: Request) -> None:
        self.tokens.append((self.time.now_s, token_id))

    def died(self) -> None:
        self.dead = True


def build(**changes: Any) -> tuple[VirtualTime, RealTimeEngine, EngineApp]:
    time = VirtualTime()
    model = EngineModel(msgspec.structs.replace(PROFILE, **changes))
    metrics = EngineMetrics(model, "tiny")
    engine = RealTimeEngine(model, metrics, time, time.clock, time.call_soon)  # type: ignore[arg-type]
    port = PortMetrics("tiny", [metrics], time.clock)
    app = EngineApp(EngineGroup([engine]), EngineSettings(model="tiny", max_model_len=2048, scale_out=True), port)
    return time, engine, app


def call(
    app: EngineApp, path: str, body: Any, headers: dict[bytes, bytes] | None = None
) -> tuple[Connection, Exchange]:
    connection = Connection()
    head = {b"content-type": b"application/json", **(headers or {})}
    exchange = Exchange(connection, "POST", path.encode(), head)  # type: ignore[arg-type]
    exchange.body = body if isinstance(body, bytes) else json.dumps(body).encode()
    app.handle(exchange)
    return connection, exchange


def test_tokens_come_exactly_when_the_law_says() -> None:
    time, engine, _ = build()
    sink = Recorder(time)
    prompt = encode("a few words to begin with")
    engine.submit(Request("a", prompt, 4, arrival_s=time.now_s), sink)
    time.run()
    law, length = PROFILE.law, len(prompt)
    due = 100.0 + law.base_s + law.prefill_work_s(length, 0)
    for index, (at_s, _) in enumerate(sink.tokens):
        assert at_s == pytest.approx(due, abs=1e-9)
        due += law.decode_s(1, length + index)
    assert engine.metrics.lateness_s.count == 4
    assert engine.metrics.lateness_s.sum == pytest.approx(0)
    assert not engine.busy


def test_lateness_is_measured_and_does_not_add_up() -> None:
    time, engine, _ = build()
    time.late_s = 0.0005
    sink = Recorder(time)
    engine.submit(Request("a", [1, 2, 3], 50, arrival_s=time.now_s), sink)
    time.run()
    assert engine.metrics.lateness_s.sum / engine.metrics.lateness_s.count == pytest.approx(0.0005)
    assert sink.tokens[-1][0] - sink.tokens[0][0] == pytest.approx(49 * PROFILE.law.decode_s(1, 27), rel=0.01)
    assert engine.steps_resynced == 0


def test_an_engine_far_behind_gives_the_lost_time_up() -> None:
    time, engine, _ = build()
    time.late_s = 0.2
    engine.submit(Request("a", [1], 5), Recorder(time))
    time.run()
    assert engine.steps_resynced == 5
    assert engine.metrics.lateness_s.quantile(0.99) >= 0.2
    assert engine.metrics.lateness_ratio.quantile(0.5) > 10


def test_an_idle_engine_schedules_nothing() -> None:
    time, engine, _ = build()
    assert not time.step()
    engine.submit(Request("a", [1], 2), Recorder(time))
    time.run()
    assert not time.step()
    assert engine.metrics.load.running == 0


def test_finished_from_outside_hears_nothing_more() -> None:
    time, engine, _ = build()
    first, second = Recorder(time), Recorder(time)
    engine.submit(Request("a", [1], 50), first)
    engine.submit(Request("b", [2], 50), second)
    for _ in range(10):
        time.step()
    count = len(first.tokens)
    engine.finish("a", FinishReason.ABORT)
    time.run()
    assert len(first.tokens) == count
    assert len(second.tokens) == 50
    assert sum(engine.metrics.finished.values()) == 1


def test_a_stopped_engine_is_silent_and_a_killed_one_tells() -> None:
    time, engine, _ = build()
    sink = Recorder(time)
    engine.submit(Request("a", [1], 50), sink)
    time.step()
    time.step()
    engine.stop()
    time.run()
    assert len(sink.tokens) == 1
    time, engine, _ = build()
    sink = Recorder(time)
    engine.submit(Request("a", [1], 50), sink)
    engine.kill()
    time.run()
    assert sink.dead
    assert engine.model.pool.usage == 0


def test_a_paused_client_gets_merged_events() -> None:
    time, _, app = build()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 30, "stream": True}
    connection, _ = call(app, "/v1/completions", body)
    for _ in range(8):
        time.step()
    events = connection.sent.count(b"data: ")
    connection.paused = True
    for _ in range(10):
        time.step()
    assert connection.sent.count(b"data: ") == events
    connection.paused = False
    time.run()
    assert connection.done
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines(connection) if b"[DONE]" not in line]
    assert max(map(len, texts)) == 11 * 4
    checker = ChainChecker(encode("x"))
    checker.feed("".join(texts))
    checker.finish(30)


def lines(connection: Connection) -> list[bytes]:
    return [line for line in connection.sent.split(b"\n") if line.startswith(b"data: ")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("prompt", "messages", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "stop", "echo"),
        *("temperature", "top_p", "min_tokens", "stop_token_ids", "ignore_eos", "priority", "cache_salt", "tools"),
        *("request_id", "logprobs", "top_logprobs", "input", "system", "suffix", "model", "stop_sequences", "tokens"),
        *("return_token_ids", "add_generation_prompt", "continue_final_message", "instructions", "presence_penalty"),
        *("response_format", "structured_outputs", "tool_choice", "prompt_logprobs", "logit_bias", "allowed_token_ids"),
        *("bad_words", "kv_transfer_params", "token_ids", "sampling_params", "output_mode", "generate_response"),
        *("generate_responses", "generate_chunk", "stream_state", "prompt_token_ids", "chat_request", "prompt_tokens"),
        *("top_k", "min_p", "return_tokens_as_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
    ]
)
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize", "/detokenize"),
    *("/inference/v1/generate", "/inference/v1/abort_requests", "/v1/completions/render", "/v1/messages/render"),
    *("/v1/chat/completions/render", "/v1/responses/render", "/v1/completions/derender"),
    "/v1/chat/completions/derender",
)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(PATHS), st.dictionaries(FIELDS, JSON, max_size=6), st.booleans())
def test_any_json_body_is_answered_without_a_server_error(path: str, fields: dict[str, Any], base: bool) -> None:
    time, engine, app = build(max_model_len_tokens=64)
    app.settings = msgspec.structs.replace(app.settings, max_model_len=64)
    whole: dict[str, Any] = {}
    if base:
        whole = {"prompt": "a", "messages": [{"role": "user", "content": "b"}], "input": "c", "max_tokens": 3}
        whole |= {"token_ids": [1], "sampling_params": {name: fields[name] for name in fields}}
        choice = {"index": 0, "token_ids": [97]}
        whole |= {"generate_response": {"choices": [choice]}, "generate_responses": [{"choices": [choice]}]}
        whole |= {"generate_chunk": {"choices": [choice]}, "tokens": [1]}
    connection, exchange = call(app, path, {**whole, **fields})
    time.run()
    assert exchange.finished, connection.sent
    status = int(connection.sent.split(b" ", 2)[1])
    # Of a constraint of the wrong type vLLM makes a server error, and so does the emulator.
    assert status in (200, 400, 404) or b"object has no attribute 'get'" in connection.sent, connection.sent
    assert not engine.busy
    assert app.active == 0


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(PATHS))
def test_any_bytes_are_answered(data: bytes, path: str) -> None:
    time, _, app = build()
    connection, exchange = call(app, path, data)
    time.run()
    assert exchange.finished
    assert int(connection.sent.split(b" ", 2)[1]) in (200, 400, 404)


def test_histogram_quantiles() -> None:
    histogram = Histogram((1, 2, 4))
    assert histogram.quantile(0.5) == 0
    for value in (0.5, 1.5, 1.6, 3.0, 100.0):
        histogram.observe(value)
    assert [histogram.quantile(share) for share in (0.1, 0.5, 0.8, 1.0)] == [1, 2, 4, 4]
    assert histogram.count == 5


def test_faults_count_down_and_describe_themselves() -> None:
    faults = Faults()
    assert not faults.armed
    faults.add(FaultRequest(kind="drop_token", tokens=2, count=2))
    kinds = [faults.next_token(last=False) for _ in range(5)]
    assert kinds == [TokenFault.NONE, TokenFault.NONE, TokenFault.DROP, TokenFault.DROP, TokenFault.NONE]
    faults.add(FaultRequest(kind="corrupt_token"))
    assert faults.next_token(last=True) is TokenFault.NONE, "an ending is never tampered with"
    assert faults.describe() == {"tokens": ["corrupt"]}
    assert faults.next_token(last=False) is TokenFault.CORRUPT
    for bad in (
        FaultRequest(kind="nothing"),
        FaultRequest(kind="slow", factor=-1),
        FaultRequest(kind="status", status=200),
        FaultRequest(kind="die_after_tokens", mode="softly"),
        FaultRequest(kind="drop_token", tokens=-1),
        FaultRequest(kind="drop_token", count=0),
    ):
        with pytest.raises(FaultError):
            faults.add(bad)


def test_configured_profile_applies_flags_in_the_emulators_time() -> None:
    profile = configured_profile(Settings(time_scale=10.0, kv_capacity_tokens=1280, max_num_seqs=3), PROFILE)
    assert profile.name == "cpu-tiny@x10"
    assert profile.law.base_s == pytest.approx(PROFILE.law.base_s / 10)
    assert (profile.max_num_seqs, profile.max_model_len_tokens) == (3, 9 * 128)
    assert configured_profile(Settings(), PROFILE) == PROFILE
