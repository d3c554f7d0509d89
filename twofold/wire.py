"""Values of ``twofold.model`` to and from protobuf messages of ``twofold.v1``, and deltas between snapshots."""

import msgspec

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

_HEALTH_TO_PB = {
    Health.STARTING: pb.HEALTH_STARTING,
    Health.HEALTHY: pb.HEALTH_HEALTHY,
    Health.SUSPECT: pb.HEALTH_SUSPECT,
    Health.GONE: pb.HEALTH_GONE,
    Health.RECONFIGURING: pb.HEALTH_RECONFIGURING,
}
_HEALTH_FROM_PB = {number: health for health, number in _HEALTH_TO_PB.items()}
_CONDITIONS = {condition.value: condition for condition in TargetCondition}


class WireError(ValueError):
    """A message that cannot be a value of the model; the text names the field."""


def profile_to_proto(profile: EngineProfile) -> pb.EngineProfile:
    """Engine profile as a message."""
    message = pb.EngineProfile(
        name=profile.name,
        gpu=profile.gpu,
        model_class=profile.model_class,
        law=pb.StepLaw(**msgspec.structs.asdict(profile.law)),
        kv_capacity_tokens=profile.kv_capacity_tokens,
        tensor_parallel=profile.tensor_parallel,
        pipeline_parallel=profile.pipeline_parallel,
        data_parallel=profile.data_parallel,
        expert_parallel=profile.expert_parallel,
        block_size_tokens=profile.block_size_tokens,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        max_num_seqs=profile.max_num_seqs,
        max_model_len_tokens=profile.max_model_len_tokens,
        source=profile.source,
        request_overhead_s=profile.request_overhead_s,
        request_overhead_per_token_s=profile.request_overhead_per_token_s,
        request_overhead_busy_s=profile.request_overhead_busy_s,
        step_jitter=profile.step_jitter,
    )
    if profile.usd_per_hour is not None:
        message.usd_per_hour = profile.usd_per_hour
    return message


def profile_from_proto(message: pb.EngineProfile) -> EngineProfile:
    """Engine profile of a message. Raises WireError without name, token budget or law."""
    if not message.name:
        raise WireError("profile.name is empty")
    if message.max_num_batched_tokens == 0:
        raise WireError(f"profile {message.name}: max_num_batched_tokens is 0")
    law = StepLaw(
        base_s=message.law.base_s,
        decode_per_seq_s=message.law.decode_per_seq_s,
        decode_per_kv_token_s=message.law.decode_per_kv_token_s,
        prefill_per_token_s=message.law.prefill_per_token_s,
        prefill_per_token_context_s=message.law.prefill_per_token_context_s,
        prefill_per_seq_s=message.law.prefill_per_seq_s,
    )
    if law.base_s <= 0 and law.prefill_per_token_s <= 0:
        raise WireError(f"profile {message.name}: law has no time in it")
    return EngineProfile(
        name=message.name,
        gpu=message.gpu,
        model_class=message.model_class,
        law=law,
        kv_capacity_tokens=message.kv_capacity_tokens,
        tensor_parallel=message.tensor_parallel or 1,
        pipeline_parallel=message.pipeline_parallel or 1,
        data_parallel=message.data_parallel or 1,
        expert_parallel=message.expert_parallel,
        block_size_tokens=message.block_size_tokens or 16,
        max_num_batched_tokens=message.max_num_batched_tokens,
        max_num_seqs=message.max_num_seqs or 256,
        max_model_len_tokens=message.max_model_len_tokens,
        usd_per_hour=message.usd_per_hour if message.HasField("usd_per_hour") else None,
        source=message.source,
        request_overhead_s=message.request_overhead_s,
        request_overhead_per_token_s=message.request_overhead_per_token_s,
        request_overhead_busy_s=message.request_overhead_busy_s,
        step_jitter=message.step_jitter,
    )


def target_to_proto(target: Target) -> pb.Target:
    """Target as a message."""
    facts, load = target.facts, target.load
    message = pb.Target(
        target_id=target.target_id,
        worker_id=target.worker_id,
        pool=target.pool,
        url=target.url,
        profile=target.profile,
        ordinal=target.ordinal,
        weight_tokens_s=target.weight_tokens_s,
        health=_HEALTH_TO_PB[target.health],
        cordoned=target.cordoned,
        draining=target.draining,
        conditions=[condition.value for condition in target.conditions],
        facts=pb.EngineFacts(
            version=facts.version,
            block_size_tokens=facts.block_size_tokens,
            kv_capacity_tokens=facts.kv_capacity_tokens,
            max_model_len_tokens=facts.max_model_len_tokens,
            hash_algorithm=facts.hash_algorithm.value,
            tokenizer_digest=facts.tokenizer_digest,
            served_models=facts.served_models,
            adapters=facts.adapters,
            adapter_paths=facts.adapter_paths,
        ),
        load=pb.EngineLoad(**msgspec.structs.asdict(load)),
        zone=target.zone,
        node=target.node,
        role=target.role,
        incarnation=target.incarnation,
    )
    if target.data_parallel_rank is not None:
        message.data_parallel_rank = target.data_parallel_rank
    return message


def target_from_proto(message: pb.Target) -> Target:
    """Target of a message; condition codes of a newer peer are left out. Raises WireError without id, pool or url."""
    for field in ("target_id", "worker_id", "pool", "url", "profile"):
        if not getattr(message, field):
            raise WireError(f"target.{field} is empty")
    facts, load = message.facts, message.load
    return Target(
        target_id=message.target_id,
        worker_id=message.worker_id,
        pool=message.pool,
        url=message.url,
        profile=message.profile,
        ordinal=message.ordinal,
        weight_tokens_s=message.weight_tokens_s,
        data_parallel_rank=message.data_parallel_rank if message.HasField("data_parallel_rank") else None,
        health=_HEALTH_FROM_PB.get(message.health, Health.SUSPECT),
        cordoned=message.cordoned,
        draining=message.draining,
        conditions=tuple(_CONDITIONS[code] for code in message.conditions if code in _CONDITIONS),
        facts=EngineFacts(
            version=facts.version,
            block_size_tokens=facts.block_size_tokens,
            kv_capacity_tokens=facts.kv_capacity_tokens,
            max_model_len_tokens=facts.max_model_len_tokens,
            hash_algorithm=_algorithm(facts.hash_algorithm),
            tokenizer_digest=facts.tokenizer_digest,
            served_models=tuple(facts.served_models),
            adapters=tuple(facts.adapters),
            adapter_paths=tuple(facts.adapter_paths),
        ),
        load=EngineLoad(
            observed_s=load.observed_s,
            running=load.running,
            waiting=load.waiting,
            kv_usage=load.kv_usage,
            prefix_queries_tokens=load.prefix_queries_tokens,
            prefix_hits_tokens=load.prefix_hits_tokens,
            prompt_tokens=load.prompt_tokens,
            generation_tokens=load.generation_tokens,
            preemptions=load.preemptions,
        ),
        zone=message.zone,
        node=message.node,
        role=message.role,
        incarnation=message.incarnation,
    )


def pool_to_proto(pool: Pool) -> pb.Pool:
    """Pool as a message."""
    return pb.Pool(
        name=pool.name,
        models=pool.models,
        upstream_model=pool.upstream_model,
        adapters=pool.adapters,
        reference_profile=pool.reference_profile,
        chunk_bytes=pool.chunk_bytes,
        bytes_per_token=pool.bytes_per_token,
        max_model_len_tokens=pool.max_model_len_tokens,
        block_size_tokens=pool.block_size_tokens,
        hash_algorithm=pool.hash_algorithm.value,
        tokenizer_digest=pool.tokenizer_digest,
        kv_events=pool.kv_events,
        max_inflight_per_target=pool.max_inflight_per_target,
        slo=pb.Slo(**msgspec.structs.asdict(pool.slo)),
        tokenizer=pool.tokenizer,
        hash_seed=pool.hash_seed,
    )


def pool_from_proto(message: pb.Pool) -> Pool:
    """Pool of a message. Raises WireError without name or models."""
    if not message.name:
        raise WireError("pool.name is empty")
    if not message.models:
        raise WireError(f"pool {message.name}: no model name")
    default = Pool(name=message.name, models=tuple(message.models))
    return Pool(
        name=message.name,
        models=tuple(message.models),
        upstream_model=message.upstream_model,
        adapters=tuple(message.adapters),
        reference_profile=message.reference_profile,
        chunk_bytes=message.chunk_bytes or default.chunk_bytes,
        bytes_per_token=message.bytes_per_token or default.bytes_per_token,
        max_model_len_tokens=message.max_model_len_tokens,
        block_size_tokens=message.block_size_tokens,
        hash_algorithm=_algorithm(message.hash_algorithm),
        tokenizer_digest=message.tokenizer_digest,
        kv_events=message.kv_events,
        max_inflight_per_target=message.max_inflight_per_target or default.max_inflight_per_target,
        slo=Slo(ttft_s=message.slo.ttft_s, tpot_s=message.slo.tpot_s, percentile=message.slo.percentile)
        if message.HasField("slo")
        else default.slo,
        tokenizer=message.tokenizer,
        hash_seed=message.hash_seed,
    )


def policy_to_proto(policy: RoutingPolicy) -> pb.RoutingPolicy:
    """Routing policy as a message."""
    return pb.RoutingPolicy(**msgspec.structs.asdict(policy))


def policy_from_proto(message: pb.RoutingPolicy) -> RoutingPolicy:
    """Routing policy of a message, as it stands: a value of 0 means 0."""
    if not message.name:
        raise WireError("policy.name is empty")
    return RoutingPolicy(
        name=message.name,
        alpha=message.alpha,
        margin_s=message.margin_s,
        key_share=message.key_share,
        key_half_life_s=message.key_half_life_s,
        key_min_count=message.key_min_count,
        shed_ttft_s=message.shed_ttft_s,
        retry_budget_ratio=message.retry_budget_ratio,
    )


def snapshot_to_proto(snapshot: FleetSnapshot) -> pb.FleetSnapshot:
    """Snapshot as a message."""
    return pb.FleetSnapshot(
        epoch=snapshot.epoch,
        version=snapshot.version,
        pools=[pool_to_proto(pool) for pool in snapshot.pools],
        profiles=[profile_to_proto(profile) for profile in snapshot.profiles],
        targets=[target_to_proto(target) for target in snapshot.targets],
        policy=policy_to_proto(snapshot.policy),
    )


def snapshot_from_proto(message: pb.FleetSnapshot) -> FleetSnapshot:
    """Snapshot of a message. Raises WireError naming the first field that is wrong."""
    return FleetSnapshot(
        epoch=message.epoch,
        version=message.version,
        pools=tuple(pool_from_proto(pool) for pool in message.pools),
        profiles=tuple(profile_from_proto(profile) for profile in message.profiles),
        targets=tuple(sorted((target_from_proto(t) for t in message.targets), key=lambda t: t.target_id)),
        policy=policy_from_proto(message.policy),
    )


def diff(old: FleetSnapshot, new: FleetSnapshot) -> pb.FleetDelta:
    """What leads from ``old`` to ``new``, two snapshots of one epoch."""
    old_pools = {pool.name: pool for pool in old.pools}
    old_profiles = {profile.name: profile for profile in old.profiles}
    old_targets = {target.target_id: target for target in old.targets}
    new_targets = {target.target_id for target in new.targets}
    new_pools = {pool.name for pool in new.pools}
    delta = pb.FleetDelta(
        epoch=new.epoch,
        base_version=old.version,
        version=new.version,
        upserted_pools=[pool_to_proto(p) for p in new.pools if old_pools.get(p.name) != p],
        removed_pools=sorted(set(old_pools) - new_pools),
        upserted_profiles=[profile_to_proto(p) for p in new.profiles if old_profiles.get(p.name) != p],
        upserted_targets=[
            target_to_proto(t) for t in new.targets if (before := old_targets.get(t.target_id)) is not t and before != t
        ],
        removed_targets=sorted(set(old_targets) - new_targets),
    )
    if old.policy != new.policy:
        delta.policy.CopyFrom(policy_to_proto(new.policy))
    return delta


def apply_delta(snapshot: FleetSnapshot, delta: pb.FleetDelta) -> FleetSnapshot:
    """The snapshot after ``delta``. Raises WireError when the delta does not start at this snapshot."""
    if (snapshot.epoch, snapshot.version) != (delta.epoch, delta.base_version):
        raise WireError(
            f"delta starts at {delta.epoch}/{delta.base_version}, snapshot is at {snapshot.epoch}/{snapshot.version}"
        )
    pools = {pool.name: pool for pool in snapshot.pools}
    pools.update((pool.name, pool_from_proto(pool)) for pool in delta.upserted_pools)
    profiles = {profile.name: profile for profile in snapshot.profiles}
    profiles.update((profile.name, profile_from_proto(profile)) for profile in delta.upserted_profiles)
    targets = {target.target_id: target for target in snapshot.targets}
    targets.update((target.target_id, target_from_proto(target)) for target in delta.upserted_targets)
    removed_pools, removed_targets = set(delta.removed_pools), set(delta.removed_targets)
    return FleetSnapshot(
        epoch=delta.epoch,
        version=delta.version,
        pools=tuple(pool for name, pool in pools.items() if name not in removed_pools),
        profiles=tuple(profiles.values()),
        targets=tuple(targets[target_id] for target_id in sorted(targets) if target_id not in removed_targets),
        policy=policy_from_proto(delta.policy) if delta.HasField("policy") else snapshot.policy,
    )


def _algorithm(text: str) -> HashAlgorithm:
    try:
        return HashAlgorithm(text)
    except ValueError:
        return HashAlgorithm.UNKNOWN
