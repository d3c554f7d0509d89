"""Ranks, pauses, adapters and queue limits in virtual time, without sockets."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from emulator.model import Adapter, EngineModel, FinishReason, Pause, Request, SchedulingPolicy
from emulator.server.app import EngineApp
from emulator.server.engine import PauseMode, RealTimeEngine
from emulator.server.errors import ApiError
from emulator.server.exposition import Histogram, Page, number, shown
from emulator.server.group import EngineGroup, Lane
from emulator.server.metrics import EngineMetrics
from emulator.server.page import PortMetrics
from emulator.server.settings import EngineSettings
from twofold import profiles

from .test_server import Recorder, VirtualTime, call

PROFILE = profiles.get("cpu-tiny")
LEFT = Adapter(adapter_id=1, name="left", path="/left")
RIGHT = Adapter(adapter_id=2, name="right", path="/right")


def engines(count: int, time: VirtualTime, **changes: Any) -> list[RealTimeEngine]:
    found = []
    for rank in range(count):
        model = EngineModel(msgspec.structs.replace(PROFILE, **changes))
        metrics = EngineMetrics(model, "tiny", engine=str(rank))
        found.append(RealTimeEngine(model, metrics, time, time.clock, time.call_soon))  # type: ignore[arg-type]
    return found


def request(name: str, tokens: int = 50, prompt: int = 3) -> Request:
    return Request(name, [70] * prompt, tokens)


def test_idle_ranks_take_turns() -> None:
    time = VirtualTime()
    ranks = engines(3, time)
    group = EngineGroup(ranks)
    for index in range(6):
        Lane(group).submit(request(f"r{index}"), Recorder(time))
    assert [rank.unfinished for rank in ranks] == [2, 2, 2]


def test_the_rank_with_least_in_flight_is_chosen() -> None:
    time = VirtualTime()
    ranks = engines(3, time)
    group = EngineGroup(ranks)
    for index in range(4):
        Lane(group, rank=index % 2).submit(request(f"pinned{index}"), Recorder(time))
    chosen = [group.choose() for _ in range(2)]
    assert chosen[0] is ranks[2]


def test_waiting_on_a_full_cache_weighs_more() -> None:
    """Equal numbers of requests, but those of one rank wait for memory: vLLM adds 6 * waiting * (usage - 0.5)."""
    time = VirtualTime()
    ranks = engines(2, time)
    full, free = ranks
    full.metrics.load = msgspec.structs.replace(full.metrics.load, running=2, waiting=2, kv_usage=1.0)
    free.metrics.load = msgspec.structs.replace(free.metrics.load, running=8, waiting=0, kv_usage=0.9)
    assert EngineGroup(ranks).choose() is free
    full.metrics.load = msgspec.structs.replace(full.metrics.load, kv_usage=0.5)
    assert EngineGroup(ranks).choose() is full


def test_loads_are_seen_a_tenth_of_a_second_late() -> None:
    time = VirtualTime()
    ranks = engines(2, time)
    group = EngineGroup(ranks)
    group.choose()
    ranks[1].metrics.load = msgspec.structs.replace(ranks[1].metrics.load, running=50)
    chosen = [group.choose() for _ in range(2)]
    assert ranks[1] in chosen
    time.now_s += 0.11
    assert [group.choose() for _ in range(3)] == [ranks[0]] * 3


def test_choices_of_one_prompt_are_spread_and_counted_as_one_request() -> None:
    time = VirtualTime()
    ranks = engines(2, time)
    lane = Lane(EngineGroup(ranks))
    for index in range(4):
        lane.submit(request(f"c{index}", tokens=5 + index), Recorder(time), 2)
    assert [rank.unfinished for rank in ranks] == [2, 2]
    time.run()
    histograms = [rank.metrics.histograms for rank in ranks]
    assert sum(found["request_params_n"].count for found in histograms) == 2
    assert sum(found["request_params_n"].sum for found in histograms) == 4
    assert sum(found["request_max_num_generation_tokens"].sum for found in histograms) == 6 + 8


@pytest.mark.parametrize("mode", list(PauseMode))
def test_pauses(mode: PauseMode) -> None:
    time = VirtualTime()
    (engine,) = engines(1, time)
    sink, late = Recorder(time), Recorder(time)
    engine.submit(request("a", tokens=20), sink)
    for _ in range(6):
        time.step()
    before = len(sink.tokens)
    done: list[float] = []
    engine.pause(mode, clear_cache=True, done=lambda: done.append(time.now_s))
    engine.submit(request("b", tokens=3), late)
    time.run()
    assert len(done) == 1
    assert engine.paused
    assert not late.tokens
    if mode is PauseMode.KEEP:
        assert before <= len(sink.tokens) < 20
        assert engine.model.counters.preemptions == 1, "the cache is cleared, so what is frozen is computed anew"
    else:
        assert (len(sink.tokens) == 20) == (mode is PauseMode.WAIT)
        assert (engine.metrics.finished["abort"] == 1) == (mode is PauseMode.ABORT)
    engine.resume()
    time.run()
    assert len(late.tokens) == 3
    if mode is PauseMode.KEEP:
        assert len(sink.tokens) == 20


def test_pausing_an_idle_engine_is_done_at_once() -> None:
    time = VirtualTime()
    (engine,) = engines(1, time)
    done: list[bool] = []
    for mode in PauseMode:
        engine.pause(mode, clear_cache=True, done=lambda: done.append(True))
    assert len(done) == 3


def test_an_abort_while_the_last_token_is_on_its_way_changes_nothing() -> None:
    time = VirtualTime()
    (engine,) = engines(1, time)
    sink = Recorder(time)
    engine.submit(request("a", tokens=1), sink)
    time.step()
    assert not engine.abort("a")
    engine.abort_all()
    time.run()
    assert len(sink.tokens) == 1
    assert engine.metrics.finished["length"] == 1


def adapted(name: str, adapter: Adapter | None, tokens: int = 4) -> Request:
    return Request(name, [70, 71, 72], tokens, adapter=adapter)


@pytest.mark.parametrize("policy", list(SchedulingPolicy))
def test_a_step_runs_so_many_adapters_and_skips_the_rest_in_order(policy: SchedulingPolicy) -> None:
    model = EngineModel(PROFILE, policy=policy, max_loras=1)
    for item in (adapted("l1", LEFT), adapted("r1", RIGHT), adapted("base", None), adapted("r2", RIGHT)):
        model.add(item)
    model.add(adapted("l2", LEFT))
    first = model.step(0.0)
    assert [found.request_id for found in first.admitted] == ["l1", "base", "l2"]
    assert (first.load.waiting, first.load.deferred) == (2, 2)
    order = []
    while model.has_work:
        order += [found.request_id for found in model.step(0.0).admitted]
    assert order == ["r1", "r2"]
    assert model.waiting.num_deferred == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((None, LEFT, RIGHT)), st.integers(1, 6), st.integers(0, 2)), max_size=25),
    st.integers(1, 3),
    st.sampled_from(list(SchedulingPolicy)),
    st.lists(st.integers(0, 24), max_size=5),
)
def test_every_request_ends_whatever_its_adapter(
    wanted: list[tuple[Adapter | None, int, int]], max_loras: int, policy: SchedulingPolicy, aborted: list[int]
) -> None:
    model = EngineModel(msgspec.structs.replace(PROFILE, max_num_seqs=4), policy=policy, max_loras=max_loras)
    for index, (adapter, tokens, priority) in enumerate(wanted):
        model.add(Request(str(index), [70, 71], tokens, adapter=adapter, priority=priority))
    finished = set()
    for step in range(1000):
        if not model.has_work:
            break
        result = model.step(float(step))
        running = {item.adapter.adapter_id for item in model.running + result.finished if item.adapter is not None}
        assert len(running) <= max_loras
        assert 0 <= result.load.deferred <= result.load.waiting
        finished |= {item.request_id for item in result.finished}
        if step == 1:
            for index in aborted:
                model.finish(str(index), FinishReason.ABORT)
    assert len(finished | {str(index) for index in aborted}) >= len(wanted)
    assert (len(model.waiting), model.waiting.num_deferred) == (0, 0)


def test_adapters_have_caches_of_their_own() -> None:
    model = EngineModel(PROFILE)
    prompt = [70 + index % 20 for index in range(300)]
    cached = []
    for index, adapter in enumerate((None, LEFT, RIGHT, LEFT, None)):
        item = Request(str(index), prompt, 1, adapter=adapter)
        model.add(item)
        while model.has_work:
            model.step(0.0)
        cached.append(item.cached_tokens)
    assert cached == [0, 0, 0, 256, 256]


def test_pause_states_of_the_model() -> None:
    model = EngineModel(PROFILE)
    model.add(request("a"))
    model.step(0.0)
    model.add(request("b"))
    model.paused = Pause.NEW
    assert model.has_work
    assert not model.step(0.0).admitted
    model.paused = Pause.ALL
    assert not model.has_work


def test_queue_limits() -> None:
    time = VirtualTime()
    refused: list[str] = []
    ranks = engines(2, time)
    group = EngineGroup(ranks, max_queued_requests=3, max_queued_tokens=10, count_rejection=refused.append)
    group.check_admission(3)
    with pytest.raises(ApiError) as caught:
        group.check_admission(4)
    assert caught.value.status == 503
    Lane(group).submit(request("a", prompt=6), Recorder(time))
    group.check_admission(1)
    Lane(group).submit(request("b", prompt=6), Recorder(time))
    with pytest.raises(ApiError):
        group.check_admission(1)
    assert refused == ["max_num_queued_reqs", "max_num_queued_tokens"]
    for _ in range(4):
        time.step()
    group.check_admission(1)


def test_counters_begin_anew_and_gauges_stay() -> None:
    time = VirtualTime()
    (engine,) = engines(1, time)
    engine.submit(request("a", tokens=9), Recorder(time))
    for _ in range(5):
        time.step()
    metrics = engine.metrics
    assert metrics.generation_tokens > 0
    assert metrics.load.running == 1
    metrics.reset()
    assert (metrics.generation_tokens, metrics.histograms["time_to_first_token_seconds"].count) == (0, 0)
    assert metrics.load.running == 1
    page = PortMetrics("tiny", [metrics], time.clock).render().decode()
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 1.0' in page


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
OPERATIONS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/abort_requests", "/reset_prefix_cache", "/wake_up")
FIELDS = st.sampled_from(("lora_name", "lora_path", "load_inplace", "lora_int_id", "request_ids"))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(OPERATIONS),
    st.dictionaries(FIELDS, ANYTHING, max_size=4) | ANYTHING,
    st.text(st.characters(codec="ascii", exclude_characters="#"), max_size=12),
)
def test_operations_answer_any_body_and_query(path: str, body: Any, query: str) -> None:
    time = VirtualTime()
    (engine,) = engines(1, time)
    port = PortMetrics("tiny", [engine.metrics], time.clock)
    app_settings = EngineSettings(model="tiny", max_model_len=2048, dev_mode=True, enable_lora=True)
    app = EngineApp(EngineGroup([engine]), app_settings, port)
    connection, exchange = call(app, f"{path}?tags={query}&reset_running_requests={query}", body)
    assert exchange.finished
    status = int(connection.sent.split(b" ", 2)[1])
    assert status in (200, 400, 404) or b"Failed to abort requests" in connection.sent, connection.sent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0"),
        (1.5, "1.5"),
        (999999, "999999.0"),
        (1795252935.874602, "1.795252935874602e+09"),
        (1e6, "1e+06"),
        (12345678.0, "1.2345678e+07"),
        (float("inf"), "+Inf"),
        (-3.25, "-3.25"),
        (1e-7, "1e-07"),
    ],
)
def test_numbers_are_those_of_the_client_library(value: float, text: str) -> None:
    assert number(value) == text
    assert number(value) == floatToGoString(value)


def test_labels_are_escaped_and_sorted() -> None:
    assert shown((("b", 'x"\\\n'), ("a", "1"))) == r'{a="1",b="x\"\\\n"}'
    assert shown(()) == ""


def test_a_page_parses() -> None:
    page = Page()
    histogram = Histogram((1, 2))
    histogram.observe(1.5, 3)
    page.histogram("h", "a histogram", [((("x", "y"),), histogram)], [5.0])
    page.counter("c", "a counter", [((), 2)], [5.0])
    page.counter("empty", "nothing yet", [], [])
    page.summary("s", "a summary", [((), 2, 7.5)], [5.0])
    found = {family.name: family for family in text_string_to_metric_families(page.render().decode())}
    assert [sample.value for sample in found["h"].samples] == [0, 3, 3, 3, 4.5]
    assert found["s"].samples[1].value == 7.5
    assert "empty_created" not in page.render().decode()
