"""Measuring an emulated engine gives its own law back: plan, measurement and fit together, in virtual time."""

import asyncio

import msgspec
import pytest

from twofold import profiles
from twofold.calibration import limits, plan
from twofold.calibration.fit import CONSTANTS, FRONT_END, fit
from twofold.calibration.measure import Busy, Measurer, Progress, decode_sample, mixed_samples
from twofold.calibration.report import constants
from twofold.calibration.values import Gauges, Timing
from twofold.model.profile import EngineProfile

from .virtual import VirtualEngine, run

TINY = msgspec.structs.replace(
    profiles.get("cpu-tiny"),
    law=msgspec.structs.replace(profiles.get("cpu-tiny").law, prefill_per_seq_s=1.1e-3),
    request_overhead_s=2.5e-3,
    request_overhead_per_token_s=1.5e-6,
)
GPU = msgspec.structs.replace(
    profiles.get("l4-8b-tp1"), request_overhead_s=4e-3, request_overhead_per_token_s=1e-6, max_model_len_tokens=8192
)


async def measure(profile: EngineProfile, *, quick: bool):
    engine = VirtualEngine(profile)
    loop = asyncio.get_running_loop()
    facts = msgspec.structs.replace(
        await engine.facts(),
        model="tiny",
        max_model_len_tokens=profile.max_model_len_tokens,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        max_num_seqs=profile.max_num_seqs,
    )
    points = msgspec.structs.replace(plan.make_plan(facts, quick=quick), rounds=2)
    measurer = Measurer(engine, facts, clock=loop.time, deadline_s=loop.time() + 3600)
    seen: list[Progress] = []
    measurements = await measurer.run(points, seen.append)
    return measurer, points, seen, facts, measurements


@pytest.mark.parametrize("profile", [TINY, GPU], ids=lambda profile: profile.name)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_the_law_of_an_emulated_engine_comes_back(profile: EngineProfile, quick: bool) -> None:
    measurer, points, seen, facts, measurements = run(measure(profile, quick=quick))
    found = fit(measurements, max_num_batched_tokens=profile.max_num_batched_tokens, resamplings=0)
    wanted = {name: getattr(profile if name in FRONT_END else profile.law, name) for name in CONSTANTS}
    assert {k: v for k, v in constants(found).items() if wanted[k]} == pytest.approx(
        {k: v for k, v in wanted.items() if v}, rel=0.03
    )
    assert found.worst("ttft", "itl", "mixed") < 0.02
    assert (facts.kv_capacity_tokens, facts.block_size_tokens) == (
        profile.kv_capacity_tokens // profile.block_size_tokens * profile.block_size_tokens,
        profile.block_size_tokens,
    )
    assert measurer.rounds == points.rounds
    assert (measurer.merged_answers, measurer.cold_hits, measurer.foreign_requests) == (0, 0, 0)
    assert (seen[0].done, seen[-1].done) == (0, seen[-1].total)


def test_rounds_stop_before_the_deadline() -> None:
    async def short() -> tuple[Measurer, plan.Plan, float]:
        engine = VirtualEngine(TINY)
        loop = asyncio.get_running_loop()
        facts = msgspec.structs.replace(await engine.facts(), model="tiny", max_model_len_tokens=2048)
        points = plan.make_plan(facts, quick=False)
        begun_s = loop.time()
        measurer = Measurer(engine, facts, clock=loop.time, deadline_s=begun_s + 20)
        await measurer.run(points)
        return measurer, points, loop.time() - begun_s

    measurer, points, seconds = run(short())
    assert 1 <= measurer.rounds < points.rounds
    assert seconds < 20


class Occupied(VirtualEngine):
    """Serves somebody else's requests too."""

    running = 0
    foreign = 0

    async def gauges(self) -> Gauges:
        gauges = await super().gauges()
        self.foreign += self.foreign_each
        return msgspec.structs.replace(
            gauges, running=gauges.running + self.running, finished=gauges.finished + self.foreign
        )

    foreign_each = 0


async def occupied(*, running: int = 0, foreign_each: int = 0, force: bool = False) -> Measurer:
    engine = Occupied(TINY)
    engine.running, engine.foreign_each = running, foreign_each
    loop = asyncio.get_running_loop()
    facts = msgspec.structs.replace(await engine.facts(), model="tiny", max_model_len_tokens=2048)
    measurer = Measurer(engine, facts, clock=loop.time, deadline_s=loop.time() + 1, force=force)
    await measurer.run(plan.make_plan(facts, quick=True))
    return measurer


def test_an_engine_in_traffic_is_left_alone() -> None:
    with pytest.raises(Busy, match="serves 3 requests"):
        run(occupied(running=3))


def test_traffic_that_comes_meanwhile_is_noticed() -> None:
    with pytest.raises(Busy, match="requests of others meanwhile"):
        run(occupied(foreign_each=1))


def test_force_measures_all_the_same_and_counts_the_others() -> None:
    measurer = run(occupied(running=3, foreign_each=1, force=True))
    assert measurer.rounds == 1
    assert measurer.foreign_requests > 0


def timing(*events_s: float, sent_s: float = 0.0, tokens: int = 0) -> Timing:
    return Timing(sent_s=sent_s, events_s=events_s, tokens=tokens or len(events_s), cached_tokens=0)


def steady(first_s: float, step_s: float, tokens: int) -> Timing:
    return timing(*(first_s + step_s * i for i in range(tokens)))


def test_a_mean_step_says_what_the_steps_held() -> None:
    point = plan.DecodePoint(sequences=2, context_tokens=100)
    early, late = steady(1.0, 0.1, 21), steady(2.0, 0.1, 21)
    sample = decode_sample([early, late], point, 0, None)
    assert sample.step_s == pytest.approx(0.1)
    assert sample.decodes == pytest.approx(1.5), "half of all steps were of both"
    assert sample.prompts == pytest.approx(1 / 40), "one prompt was computed in one of forty steps"
    assert sample.prompt_tokens == pytest.approx(100 / 40)
    assert sample.attention == pytest.approx(100 * 50 / 40)
    assert decode_sample([early, late], point, 96, None).prompt_tokens == pytest.approx(4 / 40)


def test_streams_that_begin_in_one_step_do_not_wait_for_each_other() -> None:
    point = plan.DecodePoint(sequences=3, context_tokens=10)
    sample = decode_sample([steady(1.0, 0.1, 11), steady(1.001, 0.1, 11), steady(1.002, 0.1, 11)], point, 0, None)
    assert sample.prompts == 0
    assert sample.decodes == pytest.approx(3, rel=0.02)


def test_a_stalled_client_does_not_change_what_the_engine_tells() -> None:
    point = plan.DecodePoint(sequences=1, context_tokens=10)
    stalled = timing(1.0, 1.1, *([5.0] * 9))
    assert decode_sample([stalled], point, 0, 1.0).step_s == pytest.approx(0.1)
    assert decode_sample([stalled], point, 0, None).step_s == pytest.approx(0.4)


def test_events_of_several_tokens_count_as_such() -> None:
    several = timing(*(0.2 * i for i in range(1, 12)), tokens=21)
    sample = decode_sample([several], plan.DecodePoint(sequences=1, context_tokens=1), 0, None)
    assert sample.step_s == pytest.approx(0.1)


def test_a_mixed_step_is_what_the_engine_says_or_the_widest_gap_around_a_prompt() -> None:
    streams = [timing(1.0, 1.1, 1.2, 1.7, 1.8), timing(1.01, 1.11, 1.21, 1.71, 1.81), timing(1.0, 1.1, 1.2, 1.9, 2.0)]
    prompt = timing(1.75, sent_s=1.15)
    point = plan.MixedPoint(sequences=3, tokens=50)
    told, seen = mixed_samples(streams, [(prompt, 0.45), (prompt, None)], point)
    assert told.step_s == 0.45
    assert seen.step_s == pytest.approx(0.5), "the middle one: a hiccup of one connection is not the step"
    assert (seen.new_tokens, seen.sequences) == (50, 3)
    ended = timing(1.0, 1.16)
    assert mixed_samples([*streams, ended], [(prompt, 0.45)], plan.MixedPoint(sequences=4, tokens=50)) == []


@pytest.mark.parametrize(
    ("budget", "seqs"), [(512, 64), (1024, 256), (2048, 128), (4096, 256), (8192, 64), (16_384, 128)]
)
def test_a_flood_shows_the_limits(budget: int, seqs: int) -> None:
    async def flooded() -> dict[str, int]:
        engine = VirtualEngine(msgspec.structs.replace(TINY, max_num_batched_tokens=budget, max_num_seqs=seqs))
        unknown = frozenset(("max_num_batched_tokens", "max_num_seqs"))
        return await limits.observe(engine, await engine.facts(), unknown)

    assert run(flooded()) == {"max_num_batched_tokens": budget, "max_num_seqs": seqs}


def test_scatter_and_busy_front_ends_are_seen() -> None:
    profile = msgspec.structs.replace(TINY, step_jitter=0.2, request_overhead_busy_s=0.012)
    _, _, _, _, measurements = run(measure(profile, quick=True))
    found = fit(measurements, max_num_batched_tokens=profile.max_num_batched_tokens, resamplings=0)
    assert found.step_jitter == pytest.approx(0.2, rel=0.25)
    assert found.request_overhead_busy_s == pytest.approx(0.012, abs=profile.law.decode_s(4, 400) / 2)
    steady = fit(run(measure(TINY, quick=True))[4], max_num_batched_tokens=2048)
    assert steady.step_jitter < 0.02
    assert steady.request_overhead_busy_s < TINY.law.decode_s(4, 400) / 2
