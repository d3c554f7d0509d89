"""The written file is a profile for the emulator and for fleets."""

import json
from pathlib import Path

import pytest
import yaml

from emulator.__main__ import read_profiles
from twofold import profiles
from twofold.calibration import profile_file
from twofold.calibration.fit import Fit
from twofold.calibration.limits import resolve
from twofold.calibration.values import EngineFacts
from twofold.model.profile import EngineProfile

FACTS = EngineFacts(
    model="m", version="0.32.0", block_size_tokens=128, kv_capacity_tokens=524_288, max_model_len_tokens=2048
)
LABELS = profile_file.Labels(name="mine", gpu="H100-SXM", model_class="8b", usd_per_hour=2.5)


def built() -> EngineProfile:
    fit = Fit(
        law=profiles.get("cpu-tiny").law,
        request_overhead_s=0.0021234567,
        request_overhead_per_token_s=1.5e-6,
        request_overhead_busy_s=0.001,
        step_jitter=0.1,
        points=(),
        intervals={},
    )
    return profile_file.build(fit, resolve(FACTS, {}, {}), LABELS, "measured")


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_the_file_reads_back(name: str, tmp_path: Path) -> None:
    profile = built()
    path = tmp_path / name
    profile_file.write(str(path), profile, comment="one\ntwo")
    assert profiles.resolve("mine", read_profiles(str(path))) == profile
    assert profile.request_overhead_s == 0.002123
    assert (profile.kv_capacity_tokens, profile.max_model_len_tokens, profile.usd_per_hour) == (524_288, 2048, 2.5)


def test_all_that_matters_is_written_also_where_it_is_the_default() -> None:
    (item,) = yaml.safe_load(profile_file.render(built()))
    assert item["max_num_batched_tokens"] == 2048
    assert item["max_num_seqs"] == 256
    assert isinstance(item["law"]["decode_per_kv_token_s"], float)
    (same,) = json.loads(profile_file.render(built(), as_json=True))
    assert same == item


def test_an_impossible_profile_is_refused() -> None:
    fit = Fit(
        law=profiles.get("cpu-tiny").law,
        request_overhead_s=-1.0,
        request_overhead_per_token_s=0.0,
        request_overhead_busy_s=0.0,
        step_jitter=0.0,
        points=(),
        intervals={},
    )
    with pytest.raises(profiles.ProfileError, match="request_overhead_s"):
        profile_file.build(fit, resolve(FACTS, {}, {}), LABELS, "")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(profiles.ProfileError, match="cannot write"):
        profile_file.write(str(tmp_path / "no" / "p.yaml"), built())
