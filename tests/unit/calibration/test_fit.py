"""The fit finds the constants that made the measurements, also among noise and outliers."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twofold.calibration.fit import CONSTANTS, FRONT_END, FitError, fit
from twofold.calibration.report import constants
from twofold.calibration.values import Decode, FirstToken, Measurements, Mixed
from twofold.model.profile import EngineProfile, StepLaw

BUDGET = 2048
PROMPTS = ((16, 0), (128, 0), (512, 0), (512, 384), (1024, 0), (2000, 0), (2000, 1920), (4000, 0), (6000, 4096))
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (88, 1000, 3000)
MIXED = ((1, 400), (1, 1500), (4, 400), (4, 1500), (12, 1500))

laws = st.builds(
    StepLaw,
    base_s=st.floats(1e-3, 5e-2),
    decode_per_seq_s=st.floats(2e-5, 5e-4),
    decode_per_kv_token_s=st.floats(2e-8, 1e-6),
    prefill_per_token_s=st.floats(5e-6, 3e-4),
    prefill_per_token_context_s=st.floats(1e-9, 3e-8),
    prefill_per_seq_s=st.floats(1e-4, 5e-3),
)
profiles = st.builds(
    EngineProfile,
    name=st.just("p"),
    gpu=st.just("g"),
    model_class=st.just("m"),
    law=laws,
    kv_capacity_tokens=st.just(1 << 20),
    max_num_batched_tokens=st.just(BUDGET),
    request_overhead_s=st.floats(1e-4, 5e-3),
    request_overhead_per_token_s=st.floats(1e-7, 1e-5),
)


def measured(profile: EngineProfile, *, noise: float = 0.0, outliers: float = 0.0, told: bool = True, seed: int = 0):
    """What an engine with this profile would show in five rounds."""
    rng = random.Random(seed)
    law = profile.law

    def noisy(seconds: float) -> float:
        worse = 5.0 if rng.random() < outliers else 1.0
        return seconds * worse * (1 + rng.uniform(-noise, noise))

    first: list[FirstToken] = []
    decodes: list[Decode] = []
    mixed: list[Mixed] = []
    for _ in range(5):
        for prompt, cached in PROMPTS:
            prefill_s = noisy(profile.prefill_s(prompt - cached, cached))
            ttft_s = prefill_s + noisy(profile.overhead_s(prompt))
            first.append(
                FirstToken(
                    prompt_tokens=prompt, cached_tokens=cached, ttft_s=ttft_s, prefill_s=prefill_s if told else None
                )
            )
        for batch in BATCHES:
            for context in CONTEXTS:
                step_s = noisy(law.decode_s(batch, batch * context))
                decodes.append(Decode(sequences=batch, context_tokens=context, step_s=step_s))
        for batch, new in MIXED:
            step_s = law.decode_s(batch, batch * 60) + law.prefill_per_seq_s + law.prefill_work_s(new, 0)
            mixed.append(Mixed(sequences=batch, context_tokens=60, new_tokens=new, step_s=noisy(step_s)))
    return Measurements(first_tokens=tuple(first), decodes=tuple(decodes), mixed=tuple(mixed))


def truth(profile: EngineProfile) -> dict[str, float]:
    return {name: getattr(profile if name in FRONT_END else profile.law, name) for name in CONSTANTS}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(profiles, st.booleans())
def test_exact_measurements_give_the_exact_law(profile: EngineProfile, told: bool) -> None:
    found = fit(measured(profile, told=told), max_num_batched_tokens=BUDGET, resamplings=0)
    assert constants(found) == pytest.approx(truth(profile), rel=1e-4)
    assert found.worst("ttft", "prefill", "itl", "mixed") < 1e-6
    assert found.r2("ttft") == pytest.approx(1.0)
    assert found.spread == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(profiles, st.integers(0, 1000))
def test_noise_and_outliers_leave_the_predictions_right(profile: EngineProfile, seed: int) -> None:
    found = fit(measured(profile, noise=0.03, outliers=0.03, seed=seed), max_num_batched_tokens=BUDGET, resamplings=0)
    law = found.law
    for batch, context in ((1, 100), (24, 700), (64, 2500)):
        assert law.decode_s(batch, batch * context) == pytest.approx(
            profile.law.decode_s(batch, batch * context), rel=0.12
        )
    for new, cached in ((100, 0), (1500, 0), (300, 1200)):
        ttft_s = (
            found.request_overhead_s
            + found.request_overhead_per_token_s * (new + cached)
            + law.base_s
            + law.prefill_per_seq_s
            + law.prefill_work_s(new, cached)
        )
        assert ttft_s == pytest.approx(profile.ttft_s(new, cached), rel=0.12)
    assert 0 < found.spread < 0.05


def test_noise_shows_in_the_intervals() -> None:
    profile = EngineProfile(
        name="p",
        gpu="g",
        model_class="m",
        law=StepLaw(
            base_s=3e-3,
            decode_per_seq_s=7e-5,
            decode_per_kv_token_s=2e-7,
            prefill_per_token_s=1e-5,
            prefill_per_token_context_s=9e-9,
            prefill_per_seq_s=1e-3,
        ),
        kv_capacity_tokens=1 << 20,
        max_num_batched_tokens=BUDGET,
        request_overhead_s=2e-3,
        request_overhead_per_token_s=1e-6,
    )
    widths = {}
    for noise in (0.02, 0.2):
        found = fit(measured(profile, noise=noise), max_num_batched_tokens=BUDGET)
        low, high = found.intervals["base_s"]
        assert low <= found.law.base_s * 1.02
        assert high >= found.law.base_s * 0.98
        widths[noise] = high - low
    assert widths[0.2] > 2 * widths[0.02]


def test_points_say_what_was_measured_and_what_the_profile_says() -> None:
    samples = Measurements(
        first_tokens=tuple(
            FirstToken(prompt_tokens=n, cached_tokens=0, ttft_s=0.01 + 1e-5 * n) for n in (10, 100, 1000, 2000)
        ),
        decodes=(
            Decode(sequences=1, context_tokens=50, step_s=0.004),
            Decode(sequences=1, context_tokens=50, step_s=0.006),
            Decode(sequences=8, context_tokens=50, step_s=0.010),
        ),
    )
    found = fit(samples, max_num_batched_tokens=BUDGET, resamplings=0)
    one = next(point for point in found.of("itl") if point.sequences == 1)
    assert one.repeats == 2
    assert one.measured_s == pytest.approx(0.005)
    assert one.error == pytest.approx(one.predicted_s / 0.005 - 1)
    assert found.error("mixed") is None
    assert found.r2("mixed") is None
    assert not found.of("prefill"), "an engine that does not tell its prefill time has no such points"


@pytest.mark.parametrize(
    "samples",
    [
        Measurements(),
        Measurements(decodes=(Decode(sequences=1, context_tokens=50, step_s=0.004),)),
        Measurements(first_tokens=(FirstToken(prompt_tokens=9, cached_tokens=0, ttft_s=0.01),)),
    ],
)
def test_too_little_is_said(samples: Measurements) -> None:
    with pytest.raises(FitError, match="needs at least"):
        fit(samples, max_num_batched_tokens=BUDGET, resamplings=0)


def test_whatever_was_measured_gives_a_law_that_a_profile_may_have() -> None:
    rng = random.Random(3)
    for _ in range(20):
        samples = Measurements(
            first_tokens=tuple(
                FirstToken(prompt_tokens=n, cached_tokens=0, ttft_s=rng.uniform(0.01, 0.3), prefill_s=0.01)
                for n in (16, 100, 1000, 2000)
            ),
            decodes=tuple(
                Decode(sequences=n, context_tokens=50, step_s=rng.uniform(0.001, 0.1)) for n in (1, 4, 16, 64)
            ),
        )
        law = fit(samples, max_num_batched_tokens=BUDGET, resamplings=0).law
        assert law.base_s > 0
        assert law.prefill_per_token_s > 0
        assert min(law.decode_per_seq_s, law.decode_per_kv_token_s, law.prefill_per_seq_s) >= 0
