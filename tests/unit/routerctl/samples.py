"""Messages of a small fleet."""

from collections.abc import Sequence
from typing import Any

from twofold.v1 import admin_pb2, fleet_pb2, router_pb2

NOW_S = 1_700_000_000.0


def target(target_id: str, **fields: Any) -> fleet_pb2.Target:
    """A healthy target with plausible fields."""
    defaults: dict[str, Any] = {
        "worker_id": target_id.partition("/")[0],
        "pool": "llama-8b",
        "url": f"http://10.0.0.7:8000/{target_id}",
        "profile": "a100-80gb-8b-tp1",
        "weight_tokens_s": 21500.0,
        "health": fleet_pb2.HEALTH_HEALTHY,
        "facts": fleet_pb2.EngineFacts(version="0.11.0", served_models=["llama-3.1-8b"], kv_capacity_tokens=123456),
        "load": fleet_pb2.EngineLoad(
            observed_s=NOW_S, running=7, waiting=2, kv_usage=0.375, prefix_queries_tokens=200, prefix_hits_tokens=50
        ),
        "incarnation": 3,
    }
    return fleet_pb2.Target(target_id=target_id, **(defaults | fields))


def fleet() -> fleet_pb2.FleetSnapshot:
    """Two pools, four targets, one of them a cordoned one and two ranks of one worker."""
    return fleet_pb2.FleetSnapshot(
        epoch=2**63 + 11,
        version=42,
        pools=[
            fleet_pb2.Pool(
                name="llama-8b",
                models=["llama-3.1-8b", "default"],
                adapters=["sql-lora"],
                reference_profile="a100-80gb-8b-tp1",
                chunk_bytes=1024,
                bytes_per_token=4.25,
                max_model_len_tokens=131072,
                max_inflight_per_target=1024,
                slo=fleet_pb2.Slo(ttft_s=2.0, tpot_s=0.1, percentile=0.9),
            ),
            fleet_pb2.Pool(name="empty", models=["ghost"]),
        ],
        targets=[
            target("w0"),
            target("w1", cordoned=True, conditions=["probe-failing", "from-the-future"]),
            target("w2/0", data_parallel_rank=0),
            target("w2/1", data_parallel_rank=1, health=fleet_pb2.HEALTH_SUSPECT, draining=True),
        ],
    )


def decision(**fields: Any) -> router_pb2.Decision:
    """A decision for a home, with one cheaper-to-wait but dearer target and one ineligible one."""
    defaults: dict[str, Any] = {
        "request_id": "req-1",
        "replica_id": "router-0",
        "relay": 1,
        "at_s": NOW_S,
        "pool": "llama-8b",
        "policy": "twofold",
        "target_id": "w2/0",
        "reason": "home",
        "ring_key": "00f1e2d3c4b5a697",
        "key_depth": 3,
        "ring_version": "9c21",
        "prompt_tokens": 1200,
        "predicted_ttft_s": 0.31,
        "observed_ttft_s": 0.29,
        "snapshot_epoch": 5,
        "snapshot_version": 42,
        "examined": examined(),
    }
    return router_pb2.Decision(**(defaults | fields))


def examined() -> Sequence[router_pb2.ExaminedTarget]:
    return [
        router_pb2.ExaminedTarget(
            target_id="w0",
            role="home-a1",
            cached_tokens=0,
            uncached_tokens=1200,
            own_s=0.5,
            own_reference_s=0.5,
            wait_s=0.0,
            price_s=0.5,
        ),
        router_pb2.ExaminedTarget(target_id="w1", role="home-a2", ineligible="cordoned"),
        router_pb2.ExaminedTarget(
            target_id="w2/0",
            role="home-b1",
            cached_tokens=1024,
            uncached_tokens=176,
            own_s=0.0875,
            own_reference_s=0.0625,
            wait_s=0.25,
            price_s=0.1187,
            chosen=True,
        ),
        router_pb2.ExaminedTarget(
            target_id="w9",
            role="escape",
            uncached_tokens=1200,
            own_s=0.5,
            own_reference_s=0.5,
            price_s=1.0,
        ),
    ]


def routers() -> admin_pb2.ListRoutersResponse:
    """One connected replica and one that was lost."""
    return admin_pb2.ListRoutersResponse(
        routers=[
            admin_pb2.RouterInfo(
                hello=router_pb2.RouterHello(
                    replica_id="router-0",
                    version="0.1.0",
                    admin_address="127.0.0.1:8100",
                    serving_url="http://127.0.0.1:8000",
                    relays=2,
                    started_s=NOW_S,
                ),
                connected=True,
                last_seen_s=0.02,
                snapshot_epoch=5,
                snapshot_version=42,
                inflight=1234,
            ),
            admin_pb2.RouterInfo(hello=router_pb2.RouterHello(replica_id="router-1"), last_seen_s=300),
        ]
    )


def described() -> admin_pb2.DescribeWorkerResponse:
    """A worker of two ranks with profile, events and loads."""
    return admin_pb2.DescribeWorkerResponse(
        targets=[target("w2/0", data_parallel_rank=0, zone="eu-1"), target("w2/1", data_parallel_rank=1)],
        profile=fleet_pb2.EngineProfile(
            name="a100-80gb-8b-tp1",
            gpu="A100-80GB",
            model_class="8b",
            law=fleet_pb2.StepLaw(base_s=0.006, decode_per_seq_s=2e-5, prefill_per_token_s=4.5e-5),
            kv_capacity_tokens=400_000,
            tensor_parallel=1,
            max_num_batched_tokens=2048,
            max_num_seqs=256,
            source="measured",
        ),
        events=[admin_pb2.FleetEvent(at_s=NOW_S, target_id="w2/1", reason="probe-failing", message="refused")],
        loads=[
            admin_pb2.RouterLoad(
                replica_id="router-0",
                target_id="w2/0",
                inflight=9,
                decodes=6,
                queued_prefill_tokens=8000,
                queued_prefill_s=0.4,
            )
        ],
    )


def top() -> admin_pb2.TopResponse:
    """Two routers that share the load of w1, which is the busiest, and of w0."""
    load = admin_pb2.RouterLoad
    return admin_pb2.TopResponse(
        routers=[
            admin_pb2.RouterTopEntry(
                replica_id="router-0",
                top=router_pb2.RouterTop(
                    inflight=12,
                    requests_per_s=3.5,
                    output_tokens_per_s=1500.0,
                    ttft_p50_s=0.25,
                    ttft_p99_s=1.75,
                    hit_ratio=0.5,
                    error_ratio=0.125,
                ),
            ),
            admin_pb2.RouterTopEntry(replica_id="router-1"),
        ],
        targets=[target("w0"), target("w1"), target("w2")],
        loads=[
            load(replica_id="router-0", target_id="w0", inflight=2, decodes=2),
            load(replica_id="router-0", target_id="w1", inflight=4, queued_prefill_s=0.5, queued_prefill_tokens=1000),
            load(replica_id="router-1", target_id="w1", inflight=3, queued_prefill_s=1.0, queued_prefill_tokens=2000),
        ],
    )
