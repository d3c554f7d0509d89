"""Workers, models, pools and routers as tables and documents."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from routerctl.printers.machine import document, enum_word
from routerctl.printers.text import Column, Table, age, duration, listed, moment, number, share
from twofold.v1 import admin_pb2, fleet_pb2

_HEALTH = fleet_pb2.DESCRIPTOR.enum_types_by_name["Health"]


def takes_work(target: fleet_pb2.Target) -> bool:
    """Whether routers may send new requests to the target."""
    return target.health == fleet_pb2.HEALTH_HEALTHY and not target.cordoned and not target.draining


def status(target: fleet_pb2.Target) -> str:
    """Health and what an administrator did, in one word or several: "healthy", "healthy,cordoned"."""
    words = [enum_word(_HEALTH, target.health)]
    if target.draining:
        words.append("draining")
    elif target.cordoned:
        words.append("cordoned")
    return ",".join(words)


def workers(targets: Iterable[fleet_pb2.Target], now_s: float) -> Table:
    """One row per target."""
    columns = (
        Column("WORKER"),
        Column("POOL"),
        Column("PROFILE"),
        Column("STATUS"),
        Column("RUNNING", number=True),
        Column("WAITING", number=True),
        Column("KV", number=True),
        Column("SEEN", number=True),
        Column("CONDITIONS"),
        Column("URL", wide=True),
        Column("RANK", number=True, wide=True),
        Column("WEIGHT TOK/S", number=True, wide=True),
        Column("PREFIX HITS", number=True, wide=True),
        Column("PREEMPTIONS", number=True, wide=True),
        Column("ZONE", wide=True),
        Column("NODE", wide=True),
        Column("ROLE", wide=True),
        Column("VERSION", wide=True),
        Column("INCARNATION", number=True, wide=True),
    )
    return Table(columns=columns, rows=tuple(_worker(target, now_s) for target in targets), empty="no workers")


def _worker(target: fleet_pb2.Target, now_s: float) -> tuple[str, ...]:
    load = target.load
    seen = load.observed_s > 0
    queries = load.prefix_queries_tokens
    return (
        target.target_id,
        target.pool,
        target.profile,
        status(target),
        number(load.running) if seen else "",
        number(load.waiting) if seen else "",
        share(load.kv_usage) if seen else "",
        age(load.observed_s, now_s),
        listed(target.conditions),
        target.url,
        str(target.data_parallel_rank) if target.HasField("data_parallel_rank") else "",
        number(target.weight_tokens_s),
        share(load.prefix_hits_tokens / queries) if queries else "",
        number(load.preemptions) if seen else "",
        target.zone,
        target.node,
        target.role,
        target.facts.version,
        str(target.incarnation),
    )


def model_documents(snapshot: fleet_pb2.FleetSnapshot) -> list[dict[str, Any]]:
    """Every name a client may ask for: served names, aliases and adapters."""
    counts = _counts(snapshot)
    found = []
    for pool in snapshot.pools:
        total, ready = counts.get(pool.name, (0, 0))
        named = [(name, "alias" if index else "served") for index, name in enumerate(pool.models)]
        named += [(name, "adapter") for name in pool.adapters]
        for name, kind in named:
            found.append(
                {
                    "name": name,
                    "kind": kind,
                    "pool": pool.name,
                    "base_model": pool.models[0] if pool.models else "",
                    "max_model_len_tokens": pool.max_model_len_tokens,
                    "targets": total,
                    "ready_targets": ready,
                }
            )
    return sorted(found, key=lambda model: str(model["name"]))


def models(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row per document of ``model_documents``."""
    columns = (
        Column("MODEL"),
        Column("KIND"),
        Column("POOL"),
        Column("READY", number=True),
        Column("WORKERS", number=True),
        Column("CONTEXT", number=True),
        Column("BASE MODEL", wide=True),
    )
    rows = (
        (
            str(model["name"]),
            str(model["kind"]),
            str(model["pool"]),
            number(model["ready_targets"]),
            number(model["targets"]),
            number(model["max_model_len_tokens"]) if model["max_model_len_tokens"] else "",
            str(model["base_model"]),
        )
        for model in found
    )
    return Table(columns=columns, rows=tuple(rows), empty="no models")


def pool_documents(snapshot: fleet_pb2.FleetSnapshot, pools: Iterable[fleet_pb2.Pool]) -> list[dict[str, Any]]:
    """Pools with the number of their targets."""
    counts = _counts(snapshot)
    found = []
    for pool in pools:
        total, ready = counts.get(pool.name, (0, 0))
        found.append(document(pool) | {"targets": total, "ready_targets": ready})
    return found


def pools(snapshot: fleet_pb2.FleetSnapshot, shown: Iterable[fleet_pb2.Pool]) -> Table:
    """One row per pool."""
    counts = _counts(snapshot)
    columns = (
        Column("POOL"),
        Column("MODELS"),
        Column("READY", number=True),
        Column("WORKERS", number=True),
        Column("CONTEXT", number=True),
        Column("SLO"),
        Column("ADAPTERS", wide=True),
        Column("REFERENCE", wide=True),
        Column("CHUNK B", number=True, wide=True),
        Column("B/TOKEN", number=True, wide=True),
        Column("BLOCK", number=True, wide=True),
        Column("HASH", wide=True),
        Column("KV EVENTS", wide=True),
        Column("MAX INFLIGHT", number=True, wide=True),
    )
    rows = []
    for pool in shown:
        total, ready = counts.get(pool.name, (0, 0))
        slo = f"ttft {duration(pool.slo.ttft_s)}, tpot {duration(pool.slo.tpot_s)} at {share(pool.slo.percentile)}"
        rows.append(
            (
                pool.name,
                listed(pool.models),
                number(ready),
                number(total),
                number(pool.max_model_len_tokens) if pool.max_model_len_tokens else "",
                slo if pool.HasField("slo") else "",
                listed(pool.adapters),
                pool.reference_profile,
                str(pool.chunk_bytes),
                f"{pool.bytes_per_token:.2f}",
                str(pool.block_size_tokens) if pool.block_size_tokens else "",
                pool.hash_algorithm,
                "yes" if pool.kv_events else "no",
                number(pool.max_inflight_per_target),
            )
        )
    return Table(columns=columns, rows=tuple(rows), empty="no pools")


def router_document(router: admin_pb2.RouterInfo) -> dict[str, Any]:
    """A router replica with the fields of its greeting beside what the control plane knows of it."""
    found = document(router)
    del found["hello"]
    return document(router.hello) | found


def routers(found: Iterable[admin_pb2.RouterInfo], now_s: float) -> Table:
    """One row per router replica."""
    columns = (
        Column("ROUTER"),
        Column("STATUS"),
        Column("SEEN", number=True),
        Column("SNAPSHOT"),
        Column("INFLIGHT", number=True),
        Column("RELAYS", number=True),
        Column("URL"),
        Column("UP", number=True),
        Column("ADMIN", wide=True),
        Column("STARTED", wide=True),
        Column("VERSION", wide=True),
    )
    rows = (
        (
            router.hello.replica_id,
            "connected" if router.connected else "lost",
            duration(router.last_seen_s),
            f"{router.snapshot_epoch}/{router.snapshot_version}",
            number(router.inflight),
            str(router.hello.relays),
            router.hello.serving_url,
            age(router.hello.started_s, now_s),
            router.hello.admin_address,
            moment(router.hello.started_s),
            router.hello.version,
        )
        for router in found
    )
    return Table(columns=columns, rows=tuple(rows), empty="no routers")


def _counts(snapshot: fleet_pb2.FleetSnapshot) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for target in snapshot.targets:
        total, ready = counts.get(target.pool, (0, 0))
        counts[target.pool] = (total + 1, ready + takes_work(target))
    return counts
