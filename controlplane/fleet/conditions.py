"""What the engines of a pool must agree on, and the conditions of those that do not."""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

from msgspec.structs import replace

from controlplane.fleet.values import WorkerRecord
from twofold.model.fleet import EngineFacts, HashAlgorithm, Health, Pool
from twofold.model.reasons import TargetCondition

MAX_ADAPTERS = 4096

V = TypeVar("V", bound=Hashable)


def agree(declared: Pool, present: Pool | None, records: Iterable[WorkerRecord]) -> Pool:
    """The pool with the values its engines agree on: the declared value, else the most frequent one, ties going to the
    present value so that a pool does not swing."""
    facts = [record.facts for record in records if record.health is not Health.GONE]
    adapters = {*declared.adapters, *(name for fact in facts for name in fact.adapters)}
    present = present or declared
    return replace(
        declared,
        block_size_tokens=declared.block_size_tokens
        or _most(present.block_size_tokens, (fact.block_size_tokens for fact in facts), 0),
        hash_algorithm=declared.hash_algorithm
        or _most(present.hash_algorithm, (fact.hash_algorithm for fact in facts), HashAlgorithm.UNKNOWN),
        tokenizer_digest=declared.tokenizer_digest
        or _most(present.tokenizer_digest, (fact.tokenizer_digest for fact in facts), ""),
        max_model_len_tokens=declared.max_model_len_tokens
        or _most(present.max_model_len_tokens, (fact.max_model_len_tokens for fact in facts), 0),
        adapters=tuple(sorted(adapters)[:MAX_ADAPTERS]),
    )


def serves(pool: Pool, facts: EngineFacts) -> bool:
    """Whether the engine serves the pool's model; True while it has not said."""
    return not facts.served_models or (pool.upstream_model or pool.models[0]) in facts.served_models


def conditions(record: WorkerRecord, pool: Pool | None) -> tuple[TargetCondition, ...]:
    """Conditions of the whole worker, in the order of the enumeration."""
    found: list[TargetCondition] = []
    if pool is not None:
        facts = record.facts
        pairs: tuple[tuple[TargetCondition, Hashable, Hashable], ...] = (
            (TargetCondition.BLOCK_SIZE_MISMATCH, facts.block_size_tokens, pool.block_size_tokens),
            (TargetCondition.HASH_ALGORITHM_MISMATCH, facts.hash_algorithm.value, pool.hash_algorithm.value),
            (TargetCondition.TOKENIZER_MISMATCH, facts.tokenizer_digest, pool.tokenizer_digest),
            (TargetCondition.MODEL_LENGTH_MISMATCH, facts.max_model_len_tokens, pool.max_model_len_tokens),
        )
        found += [condition for condition, own, agreed in pairs if own and agreed and own != agreed]
        if not serves(pool, facts):
            found.append(TargetCondition.MODEL_MISSING)
    if record.failed_probes > 0 and record.health is not Health.STARTING:
        found.append(TargetCondition.PROBE_FAILING)
    if record.reconfiguring_since_s is not None:
        found.append(TargetCondition.RECONFIGURING)
    if record.unreachable_by_routers:
        found.append(TargetCondition.UNREACHABLE_BY_ROUTERS)
    if record.counters_reset_s is not None:
        found.append(TargetCondition.COUNTERS_RESET)
    return tuple(found)


def _most(present: V, values: Iterable[V], unknown: V) -> V:
    counts = Counter(value for value in values if value != unknown)
    if not counts:
        return present
    best = max(counts.values())
    if counts.get(present, 0) == best:
        return present
    return min((value for value, count in counts.items() if count == best), key=repr)
