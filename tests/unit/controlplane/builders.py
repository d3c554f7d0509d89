"""Short ways to make events of the fleet for tests."""

from typing import Any

from controlplane.fleet.events import (
    ConfigChanged,
    Event,
    ProbeResult,
    RouterFailures,
    SourceChanged,
)
from controlplane.fleet.reducer import reduce
from controlplane.fleet.state import FleetState
from controlplane.fleet.values import FleetRules, ProbeOutcome, RankSample, Source, WorkerSpec
from twofold.model.fleet import EngineFacts, HashAlgorithm, Pool
from twofold.profiles import get

PROFILE = "h100-8b-tp1"
FACTS = EngineFacts(
    version="0.32.0",
    block_size_tokens=16,
    kv_capacity_tokens=100_000,
    max_model_len_tokens=8192,
    hash_algorithm=HashAlgorithm.SHA256,
    tokenizer_digest="aa",
    served_models=("m",),
)


def config(version: int = 1, *pools: str, at_s: float = 0.0) -> ConfigChanged:
    """Pools that serve model "m" (the first) and "m<n>"."""
    names = pools or ("pool",)
    made = tuple(Pool(name=name, models=("m" if i == 0 else f"m{i}",)) for i, name in enumerate(names))
    return ConfigChanged(at_s=at_s, version=version, pools=made, profiles=(get(PROFILE),))


def spec(worker_id: str, **changes: Any) -> WorkerSpec:
    """A worker of pool "pool"."""
    fields = {"worker_id": worker_id, "url": f"http://{worker_id}:1", "pool": "pool", "profile": PROFILE, **changes}
    return WorkerSpec(**fields)


def source(*workers: WorkerSpec, version: int = 1, of: Source = Source.FILE, at_s: float = 0.0) -> SourceChanged:
    """All workers of a source."""
    return SourceChanged(at_s=at_s, source=of, version=version, workers=workers)


def probe(worker_id: str, sequence: int, at_s: float, ok: bool = True, **changes: Any) -> ProbeResult:
    """A probe of a worker, good or failed."""
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "url": f"http://{worker_id}:1",
        "sequence": sequence,
        "at_s": at_s,
        "outcome": ProbeOutcome.OK if ok else ProbeOutcome.FAILED,
        "facts": FACTS if ok else None,
        "ranks": (RankSample(rank=0),) if ok else (),
        "message": "" if ok else "cannot connect",
        **changes,
    }
    return ProbeResult(**fields)


def failures(replica: str, sequence: int, at_s: float, counts: dict[str, int], stream: int = 1) -> RouterFailures:
    """Failures that a replica sees."""
    return RouterFailures(
        at_s=at_s, replica_id=replica, stream=stream, sequence=sequence, failures=tuple(counts.items())
    )


def run(*events: Event, rules: FleetRules | None = None) -> FleetState:
    """The state after events, one batch each."""
    state = FleetState(rules=rules or FleetRules())
    for event in events:
        state = reduce(state, [event])
    return state


def healthy(*names: str, rules: FleetRules | None = None) -> FleetState:
    """A state with these workers healthy at time 1, probe sequence 1."""
    return run(config(), source(*(spec(name) for name in names)), *(probe(name, 1, 1.0) for name in names), rules=rules)
