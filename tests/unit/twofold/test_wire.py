"""Wire conversion: values survive the round trip, deltas lead from any snapshot to any other of the epoch."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold import wire
from twofold.model.fleet import (
    EngineFacts,
    EngineLoad,
    FleetSnapshot,
    HashAlgorithm,
    Health,
    Pool,
    RoutingPolicy,
    Slo,
    Target,
)
from twofold.model.profile import EngineProfile, StepLaw
from twofold.model.reasons import TargetCondition
from twofold.v1 import fleet_pb2 as pb

names = st.text("abcdef", min_size=1, max_size=4)
counts = st.integers(0, 2**31)
seconds = st.floats(0, 1e6)
laws = st.builds(
    StepLaw,
    base_s=st.floats(1e-6, 1),
    decode_per_seq_s=seconds,
    decode_per_kv_token_s=seconds,
    prefill_per_token_s=seconds,
    prefill_per_token_context_s=seconds,
    prefill_per_seq_s=seconds,
)
profiles = st.builds(
    EngineProfile,
    name=names,
    gpu=names,
    model_class=names,
    law=laws,
    kv_capacity_tokens=counts,
    max_num_batched_tokens=st.integers(1, 2**20),
    usd_per_hour=st.none() | seconds,
    request_overhead_s=seconds,
    request_overhead_per_token_s=seconds,
    request_overhead_busy_s=seconds,
    step_jitter=st.floats(0, 2),
)
targets = st.builds(
    Target,
    target_id=names,
    worker_id=names,
    pool=names,
    url=names,
    profile=names,
    ordinal=counts,
    weight_tokens_s=seconds,
    data_parallel_rank=st.none() | st.integers(0, 64),
    health=st.sampled_from(Health),
    cordoned=st.booleans(),
    conditions=st.lists(st.sampled_from(TargetCondition), max_size=3).map(tuple),
    facts=st.builds(
        EngineFacts,
        version=names,
        hash_algorithm=st.sampled_from(HashAlgorithm),
        served_models=st.lists(names, max_size=2).map(tuple),
    ),
    load=st.builds(EngineLoad, observed_s=seconds, running=counts, kv_usage=seconds),
    incarnation=counts,
)
pools = st.builds(
    Pool,
    name=names,
    models=st.lists(names, min_size=1, max_size=3).map(tuple),
    chunk_bytes=st.integers(1, 65536),
    bytes_per_token=st.floats(0.1, 10),
    hash_algorithm=st.sampled_from(HashAlgorithm),
    slo=st.builds(Slo, ttft_s=seconds, tpot_s=seconds, percentile=st.floats(0, 1)),
)


def unique(key: str):  # type: ignore[no-untyped-def]
    return lambda value: getattr(value, key)


@st.composite
def snapshots(draw: st.DrawFn, version: int = 1) -> FleetSnapshot:
    return FleetSnapshot(
        epoch=7,
        version=version,
        pools=tuple(draw(st.lists(pools, max_size=3, unique_by=unique("name")))),
        profiles=tuple(draw(st.lists(profiles, max_size=3, unique_by=unique("name")))),
        targets=tuple(
            sorted(draw(st.lists(targets, max_size=5, unique_by=unique("target_id"))), key=lambda t: t.target_id)
        ),
        policy=draw(st.builds(RoutingPolicy, alpha=st.floats(0, 1), margin_s=seconds)),
    )


@given(snapshots())
def test_snapshot_round_trip(snapshot: FleetSnapshot) -> None:
    message = pb.FleetSnapshot.FromString(wire.snapshot_to_proto(snapshot).SerializeToString())
    assert wire.snapshot_from_proto(message) == snapshot


@given(snapshots(1), snapshots(2))
def test_delta_leads_to_the_new_snapshot(old: FleetSnapshot, new: FleetSnapshot) -> None:
    got = wire.apply_delta(old, wire.diff(old, new))
    kept = {profile.name: profile for profile in got.profiles}
    assert got.targets == new.targets
    assert {pool.name: pool for pool in got.pools} == {pool.name: pool for pool in new.pools}
    assert all(kept[profile.name] == profile for profile in new.profiles)
    assert (got.epoch, got.version, got.policy) == (new.epoch, new.version, new.policy)


def test_delta_from_elsewhere_is_refused() -> None:
    base = FleetSnapshot(epoch=1, version=1)
    delta = wire.diff(base, msgspec.structs.replace(base, version=2))
    with pytest.raises(wire.WireError, match="delta starts at 1/1"):
        wire.apply_delta(msgspec.structs.replace(base, version=5), delta)


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_converted_never_worse(data: bytes) -> None:
    message = pb.FleetSnapshot()
    try:
        message.ParseFromString(data)
    except Exception:
        return
    try:
        wire.snapshot_from_proto(message)
    except wire.WireError:
        pass
