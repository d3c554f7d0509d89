"""The built-in profiles are sane, complete, and equal to the derivation they claim."""

import itertools

import pytest

from twofold import profiles
from twofold.model.profile import EngineProfile
from twofold.profiles import ProfileError

# ms per step, per sequence, per 1,000 KV tokens, per prefill token; KV tokens: derived independently of this package.
EXPECTED = {
    "l4-8b-tp1": (71.68, 0.0668, 0.5601, 0.44242, 23193),
    "a10g-8b-tp1": (35.99, 0.0473, 0.2801, 0.50984, 23193),
    "l40s-8b-tp1": (25.08, 0.0394, 0.1945, 0.13862, 187988),
    "a100-80gb-8b-tp1": (10.8, 0.0256, 0.0824, 0.13546, 407714),
    "h100-8b-tp1": (6.69, 0.02, 0.0502, 0.03609, 407714),
    "h200-8b-tp1": (4.76, 0.0167, 0.035, 0.03609, 826568),
    "l40s-70b-tp4": (75.7, 0.0197, 0.1216, 0.42171, 65917),
    "a100-80gb-70b-tp4": (26.99, 0.0128, 0.0515, 0.34425, 417480),
    "h100-70b-tp8": (9.03, 0.0071, 0.0157, 0.0493, 1265869),
    "h200-70b-tp2": (21.39, 0.0118, 0.0438, 0.17057, 328369),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_derivation_gives_the_known_rates(name: str) -> None:
    base, per_seq, per_1k_kv, prefill, capacity = EXPECTED[name]
    profile = profiles.get(name)
    law = profile.law
    assert law.base_s * 1e3 == pytest.approx(base, rel=2e-3)
    assert law.decode_per_seq_s * 1e3 == pytest.approx(per_seq, rel=1e-2)
    assert law.decode_per_kv_token_s * 1e6 == pytest.approx(per_1k_kv, rel=1e-2)
    assert law.prefill_per_token_s * 1e3 == pytest.approx(prefill, rel=2e-3)
    assert profile.kv_capacity_tokens == pytest.approx(capacity, rel=1e-3)


def test_every_required_combination_exists() -> None:
    for gpu in ("l4", "a10g", "l40s", "a100-80gb", "h100", "h200"):
        assert f"{gpu}-8b-tp1" in profiles.names()
        assert any(name.startswith(f"{gpu}-70b-tp") for name in profiles.names())
    assert "h100-70b-tp1" not in profiles.names()
    assert "a100-80gb-70b-tp2" not in profiles.names()


def test_a_faster_gpu_is_faster() -> None:
    def speed(name: str) -> tuple[float, float]:
        profile = profiles.get(name)
        return profile.capacity_tokens_s(), 1 / profile.law.decode_s(16, 16 * 2000)

    decode_order = ["l4", "a10g", "l40s", "a100-80gb", "h100", "h200"]
    decode = [speed(f"{gpu}-8b-tp1")[1] for gpu in decode_order]
    assert decode == sorted(decode)
    prefill = [speed(f"{gpu}-8b-tp1")[0] for gpu in ("a10g", "l4", "l40s", "a100-80gb", "h100", "h200")]
    assert prefill == sorted(prefill)
    assert speed("h100-8b-tp1") > speed("h100-70b-tp4")


@pytest.mark.parametrize("family", ["h100-8b", "a10g-8b", "h200-70b"])
def test_more_gpus_are_faster_but_not_more_than_linear(family: str) -> None:
    members = [p for p in map(profiles.get, profiles.names()) if p.name.rsplit("-", 1)[0] == family]
    assert len(members) >= 3
    members.sort(key=lambda profile: profile.tensor_parallel)
    for small, large in itertools.pairwise(members):
        gain = large.capacity_tokens_s() / small.capacity_tokens_s()
        assert 1 < gain < large.tensor_parallel / small.tensor_parallel
        assert large.law.decode_s(8, 8000) < small.law.decode_s(8, 8000)
        assert large.kv_capacity_tokens > small.kv_capacity_tokens
        assert (large.usd_per_hour or 0) > (small.usd_per_hour or 0)


@pytest.mark.parametrize("name", profiles.names())
def test_each_profile_is_sane(name: str) -> None:
    profile = profiles.get(name)
    assert profile.name == name
    assert profile.source
    assert profile.max_model_len_tokens <= profile.kv_capacity_tokens
    assert profile.prefill_s(4096, 0) < profile.prefill_s(4096, 16_000) < profile.prefill_s(8192, 16_000)
    assert profile.prefill_s(1000, 0) > profile.law.base_s
    # One request reads its own weights at most once a step: no GPU here decodes a model faster than 1,000 tokens/s.
    assert profile.law.decode_s(1, 1000) > 1e-3
    assert profile.scaled(0.5).prefill_s(4096, 0) == pytest.approx(profile.prefill_s(4096, 0) / 2)


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ProfileError, match="h100-8b-tp1"):
        profiles.get("h1000")


def test_user_profile_on_a_base() -> None:
    loaded = profiles.load_profiles(
        [
            {"name": "mine", "base": "h100-8b-tp1", "usd_per_hour": 2.5, "law": {"base_s": 0.001}},
            {"name": "mine-big", "base": "mine", "max_num_seqs": 7},
        ]
    )
    mine, reference = loaded["mine"], profiles.get("h100-8b-tp1")
    assert (mine.usd_per_hour, mine.law.base_s) == (2.5, 0.001)
    assert mine.law.prefill_per_token_s == reference.law.prefill_per_token_s
    assert loaded["mine-big"].law == mine.law
    assert profiles.get("mine", loaded) is mine
    assert isinstance(profiles.resolve("l4-8b-tp1"), EngineProfile)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "x"}, "missing required field"),
        ({"name": "x", "base": "nope"}, "unknown engine profile 'nope'"),
        ({"name": "x", "base": "l4-8b-tp1", "speed": 3}, "unknown field 'speed'"),
        ({"name": "x", "base": "l4-8b-tp1", "law": {"speed": 3}}, r"unknown field 'law\.speed'"),
        ({"name": "x", "base": "l4-8b-tp1", "block_size_tokens": 0}, "block_size_tokens must be above 0"),
        ({"name": "x", "base": "l4-8b-tp1", "block_size_tokens": "a"}, "Expected `int`"),
        ({"name": "x", "base": "l4-8b-tp1", "law": {"decode_per_seq_s": -1.0}}, "must not be negative"),
    ],
)
def test_bad_user_profile_is_one_line(item: dict[str, object], message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        profiles.load_profiles([item])
    assert "\n" not in str(caught.value)


def test_user_profile_twice() -> None:
    item = {"name": "x", "base": "l4-8b-tp1"}
    with pytest.raises(ProfileError, match="defined twice"):
        profiles.load_profiles([item, item])
