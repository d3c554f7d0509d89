"""Everything known about one worker, as text."""

from collections.abc import Iterable

from routerctl.printers.fleet import status
from routerctl.printers.text import (
    NOTHING,
    Column,
    Table,
    age,
    duration,
    listed,
    moment,
    number,
    pairs,
    printable,
    render,
    share,
)
from twofold.v1 import admin_pb2, fleet_pb2

_INDENT = "  "


def describe(worker_id: str, answer: admin_pb2.DescribeWorkerResponse, now_s: float) -> str:
    """Targets, profile, load by router and history of the worker."""
    parts = [pairs([("Worker", worker_id), ("Targets", listed(target.target_id for target in answer.targets))])]
    parts += [_target(target, now_s) for target in answer.targets]
    if answer.HasField("profile"):
        parts.append(_profile(answer.profile))
    parts.append("\nLoad by router:\n" + render(loads(answer.loads), indent=_INDENT))
    parts.append("\nEvents, latest first:\n" + render(_events(answer.events, now_s), indent=_INDENT))
    return "".join(parts)


def loads(found: Iterable[admin_pb2.RouterLoad]) -> Table:
    """What each router has running on each target."""
    columns = (
        Column("ROUTER"),
        Column("TARGET"),
        Column("INFLIGHT", number=True),
        Column("DECODES", number=True),
        Column("QUEUED TOKENS", number=True),
        Column("QUEUED", number=True),
    )
    rows = (
        (
            load.replica_id,
            load.target_id,
            number(load.inflight),
            number(load.decodes),
            number(load.queued_prefill_tokens),
            duration(load.queued_prefill_s),
        )
        for load in found
    )
    return Table(columns=columns, rows=tuple(rows), empty="none reported")


def _target(target: fleet_pb2.Target, now_s: float) -> str:
    facts, load = target.facts, target.load
    queries = load.prefix_queries_tokens
    rank = str(target.data_parallel_rank) if target.HasField("data_parallel_rank") else NOTHING
    place = [("Zone", target.zone), ("Node", target.node), ("Role", target.role)]
    return f"\nTarget {printable(target.target_id)}:\n" + pairs(
        [
            ("Status", status(target)),
            ("Conditions", listed(target.conditions)),
            ("Pool", target.pool),
            ("URL", target.url),
            ("Data-parallel rank", rank),
            ("Weight", f"{number(target.weight_tokens_s)} tokens/s"),
            ("Incarnation", str(target.incarnation)),
            *((label, value) for label, value in place if value),
            ("Engine version", facts.version),
            ("Models", listed(facts.served_models)),
            ("Adapters", listed(facts.adapters)),
            ("Max model length", _tokens(facts.max_model_len_tokens)),
            ("KV capacity", _tokens(facts.kv_capacity_tokens)),
            ("Block size", _tokens(facts.block_size_tokens)),
            ("Hash algorithm", facts.hash_algorithm),
            ("Tokenizer", facts.tokenizer_digest),
            ("Metrics seen", _ago(load.observed_s, now_s)),
            ("Running, waiting", f"{number(load.running)}, {number(load.waiting)}"),
            ("KV usage", share(load.kv_usage)),
            ("Prefix hits", share(load.prefix_hits_tokens / queries) if queries else NOTHING),
            ("Tokens in, out", f"{number(load.prompt_tokens)}, {number(load.generation_tokens)}"),
            ("Preemptions", number(load.preemptions)),
        ],
        indent=_INDENT,
    )


def _profile(profile: fleet_pb2.EngineProfile) -> str:
    law = profile.law
    sizes = f"tensor {profile.tensor_parallel}, pipeline {profile.pipeline_parallel}, data {profile.data_parallel}"
    return f"\nProfile {printable(profile.name)}:\n" + pairs(
        [
            ("GPU", profile.gpu),
            ("Model class", profile.model_class),
            ("Parallel sizes", sizes + (", expert" if profile.expert_parallel else "")),
            ("KV capacity", _tokens(profile.kv_capacity_tokens)),
            ("Step budget", f"{_tokens(profile.max_num_batched_tokens)}, {number(profile.max_num_seqs)} sequences"),
            ("Max model length", _tokens(profile.max_model_len_tokens)),
            ("Step", f"{_tiny(law.base_s)} + {_tiny(law.decode_per_seq_s)} per decode"),
            ("Decode context", f"{_tiny(law.decode_per_kv_token_s)} per KV token"),
            ("Prefill", f"{_tiny(law.prefill_per_token_s)} per token"),
            ("Prefill attention", f"{_tiny(law.prefill_per_token_context_s)} per token and token before it"),
            ("Price", f"{profile.usd_per_hour:.2f} USD/h" if profile.HasField("usd_per_hour") else NOTHING),
            ("Source", profile.source),
        ],
        indent=_INDENT,
    )


def _events(events: Iterable[admin_pb2.FleetEvent], now_s: float) -> Table:
    columns = (Column("AGO", number=True), Column("AT"), Column("TARGET"), Column("REASON"), Column("MESSAGE"))
    rows = ((age(e.at_s, now_s), moment(e.at_s), e.target_id, e.reason, e.message) for e in events)
    return Table(columns=columns, rows=tuple(rows), empty="none")


def _tokens(count: int) -> str:
    return f"{number(count)} tokens" if count else NOTHING


def _tiny(value_s: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(value_s) * scale >= 1:
            return f"{value_s * scale:.4g} {unit}"
    return f"{value_s * 1e9:.4g} ns"


def _ago(at_s: float, now_s: float) -> str:
    return f"{age(at_s, now_s)} ago" if at_s > 0 else "never"
