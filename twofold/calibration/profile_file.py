"""The profile that a measurement yields, and the file that holds it."""

import json
from pathlib import Path
from typing import Any

import msgspec

from twofold.calibration.fit import Fit
from twofold.calibration.values import EngineFacts
from twofold.model.profile import EngineProfile
from twofold.profiles import ProfileError, load_profiles

_DIGITS = 4


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of an engine, and in words where each comes from."""

    kv_capacity_tokens: int
    block_size_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len_tokens: int
    prefix_caching: bool
    sources: dict[str, str]


class Labels(msgspec.Struct, frozen=True, kw_only=True):
    """What no measurement can tell."""

    name: str
    gpu: str
    model_class: str
    tensor_parallel: int = 1
    data_parallel: int = 1
    usd_per_hour: float | None = None


def build(fit: Fit, limits: Limits, labels: Labels, source: str) -> EngineProfile:
    """The profile. Raises ProfileError where the parts do not make one."""
    law = msgspec.structs.asdict(fit.law)
    profile = EngineProfile(
        name=labels.name,
        gpu=labels.gpu,
        model_class=labels.model_class,
        law=msgspec.convert({name: _rounded(value) for name, value in law.items()}, type(fit.law)),
        request_overhead_s=_rounded(fit.request_overhead_s),
        request_overhead_per_token_s=_rounded(fit.request_overhead_per_token_s),
        request_overhead_busy_s=_rounded(fit.request_overhead_busy_s),
        step_jitter=_rounded(fit.step_jitter),
        kv_capacity_tokens=limits.kv_capacity_tokens,
        tensor_parallel=labels.tensor_parallel,
        data_parallel=labels.data_parallel,
        block_size_tokens=limits.block_size_tokens,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_model_len_tokens=limits.max_model_len_tokens,
        usd_per_hour=labels.usd_per_hour,
        source=source,
    )
    return load_profiles([mapping(profile)])[profile.name]


def source_text(facts: EngineFacts, fit: Fit, when: str) -> str:
    """Where the constants come from, for the profile's ``source``."""
    ttft, itl = fit.error("ttft"), fit.error("itl")
    errors = ", ".join(
        f"{kind} within {value:.1%}" for kind, value in (("TTFT", ttft), ("ITL", itl)) if value is not None
    )
    engine = f"vLLM {facts.version}" if facts.version else "an engine"
    return f"measured {when} on {engine} serving {facts.model} by twofold profile; mean error of the fit: {errors}"


def mapping(profile: EngineProfile) -> dict[str, Any]:
    """The profile as an entry of a fleet file's ``profiles``; without a price where there is none."""
    fields = dict(msgspec.to_builtins(profile))
    if profile.usd_per_hour is None:
        del fields["usd_per_hour"]
    return fields


def write(path: str, profile: EngineProfile, *, comment: str = "") -> None:
    """Write a list with the one profile: JSON where the name ends in .json, else YAML. Raises ProfileError."""
    try:
        Path(path).write_text(render(profile, as_json=path.endswith(".json"), comment=comment), encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror or error}") from None


def render(profile: EngineProfile, *, as_json: bool = False, comment: str = "") -> str:
    """The text of a profile file."""
    items = [mapping(profile)]
    if as_json:
        return json.dumps(items, indent=2) + "\n"
    import yaml

    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.safe_dump(items, sort_keys=False, width=110)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
