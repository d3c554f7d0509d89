"""The health machine of one worker: starting -> healthy -> suspect -> gone -> re-admitted, as functions on its record.

A worker is suspected on two failed probes in a row, on one failed probe that a router confirms, or when two routers
fail to use it whatever the probes say; it returns only after several good probes, more of them each time it flaps.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from controlplane.fleet.events import ProbeResult
from controlplane.fleet.values import (
    FleetRules,
    ProbeOutcome,
    RankRecord,
    RankSample,
    RouterReport,
    WorkerRecord,
)
from twofold.model.fleet import EngineLoad, Health

ROUTERS_TO_SUSPECT = 2


def failing_replicas(reports: Mapping[str, RouterReport]) -> int:
    """Number of replicas that fail to use a worker, beyond what was forgiven at its last admission."""
    return len({key.partition(" ")[0] for key, report in reports.items() if report.failures > report.forgiven})


def after_probe(
    record: WorkerRecord,
    probe: ProbeResult,
    reports: Mapping[str, RouterReport],
    rules: FleetRules,
    *,
    model_missing: bool,
) -> WorkerRecord:
    """The record after a probe. ``reports`` are the routers' about this worker."""
    record = replace(record, probe_sequence=probe.sequence, message=probe.message)
    if record.counters_reset_s is not None and probe.at_s - record.counters_reset_s > rules.counters_reset_shown_s:
        record = replace(record, counters_reset_s=None)
    if probe.outcome is ProbeOutcome.RECONFIGURING:
        return _reconfiguring(record, probe, rules)
    record = replace(record, reconfiguring_since_s=None)
    if probe.outcome is ProbeOutcome.FAILED:
        return _failed(record, probe.at_s, failing_replicas(reports), rules)
    record = _observe(record, probe, rules)
    if model_missing:
        record = replace(record, failed_probes=0, good_probes=0, last_ok_s=probe.at_s)
        return enter(record, Health.SUSPECT, probe.at_s) if record.health is not Health.STARTING else record
    return _good(record, probe.at_s, rules)


def after_reports(
    record: WorkerRecord, reports: Mapping[str, RouterReport], at_s: float, *, grew: bool
) -> WorkerRecord:
    """The record after routers reported. ``grew``: some replica saw more failures than before."""
    failing = failing_replicas(reports)
    if not failing:
        return replace(record, by_routers=False, unreachable_by_routers=False)
    if record.health is Health.HEALTHY and (
        failing >= ROUTERS_TO_SUSPECT or (failing == 1 and record.failed_probes > 0)
    ):
        return replace(enter(record, Health.SUSPECT, at_s), by_routers=True)
    if record.health is Health.SUSPECT and grew:
        return replace(record, good_probes=0)
    return record


def enter(record: WorkerRecord, health: Health, at_s: float) -> WorkerRecord:
    """Change of health, with the counters that start anew with it."""
    if record.health is health:
        return record
    flaps, flapped_s = record.flaps, record.flapped_s
    if health is Health.SUSPECT and record.health is Health.HEALTHY:
        flaps, flapped_s = flaps + 1, at_s
    return replace(record, health=health, since_s=at_s, good_probes=0, flaps=flaps, flapped_s=flapped_s)


def probes_to_readmit(record: WorkerRecord, rules: FleetRules) -> int:
    """Good probes in a row that the worker needs to take work again."""
    base = rules.readmit_probes + (record.health is Health.GONE)
    return min(rules.readmit_probes_max, base << min(max(record.flaps - 1, 0), 8))


def _good(record: WorkerRecord, at_s: float, rules: FleetRules) -> WorkerRecord:
    flaps = record.flaps
    if record.health is Health.HEALTHY and flaps and at_s - record.flapped_s > rules.flap_memory_s:
        flaps = 0
    record = replace(
        record,
        good_probes=record.good_probes + 1,
        failed_probes=0,
        last_ok_s=at_s,
        flaps=flaps,
        unreachable_by_routers=record.by_routers and record.health is Health.SUSPECT,
    )
    if record.health in (Health.STARTING, Health.RECONFIGURING):
        return enter(record, Health.HEALTHY, at_s)
    if record.health in (Health.SUSPECT, Health.GONE) and record.good_probes >= probes_to_readmit(record, rules):
        return replace(enter(record, Health.HEALTHY, at_s), by_routers=False, unreachable_by_routers=False)
    return record


def _failed(record: WorkerRecord, at_s: float, failing: int, rules: FleetRules) -> WorkerRecord:
    record = replace(record, failed_probes=record.failed_probes + 1, good_probes=0, unreachable_by_routers=False)
    if record.health is Health.STARTING:
        return enter(record, Health.GONE, at_s) if at_s - record.since_s >= rules.start_bound_s else record
    if record.health is Health.SUSPECT:
        return enter(record, Health.GONE, at_s) if at_s - record.since_s >= rules.gone_after_s else record
    if record.health in (Health.HEALTHY, Health.RECONFIGURING) and (
        record.failed_probes >= rules.suspect_after_probes or failing
    ):
        return replace(enter(record, Health.SUSPECT, at_s), by_routers=failing > 0)
    return record


def _reconfiguring(record: WorkerRecord, probe: ProbeResult, rules: FleetRules) -> WorkerRecord:
    since_s = probe.at_s if record.reconfiguring_since_s is None else record.reconfiguring_since_s
    record = replace(record, reconfiguring_since_s=since_s, good_probes=0)
    if probe.at_s - since_s <= rules.reconfiguring_bound_s:
        return enter(replace(record, failed_probes=0), Health.RECONFIGURING, probe.at_s)
    # A commit that failed leaves the engine answering 503 for good.
    if record.health is Health.RECONFIGURING:
        return enter(replace(record, failed_probes=record.failed_probes + 1), Health.SUSPECT, probe.at_s)
    return _failed(record, probe.at_s, 0, rules)


def _observe(record: WorkerRecord, probe: ProbeResult, rules: FleetRules) -> WorkerRecord:
    ranks = list(record.ranks)
    was_reset = False
    for sample in probe.ranks:
        if 0 <= sample.rank < len(ranks):
            before = ranks[sample.rank]
            was_reset |= 0 <= sample.progress < before.progress
            ranks[sample.rank] = _observe_rank(before, sample, probe, rules)
    incarnation = max(record.incarnation, record.spec.incarnation, probe.engine_started)
    restarted = bool(record.engine_started and probe.engine_started > record.engine_started)
    if (was_reset or restarted) and record.last_ok_s is not None:
        incarnation = max(incarnation, record.incarnation + 1)
        record = replace(record, counters_reset_s=probe.at_s)
    return replace(
        record,
        ranks=tuple(ranks),
        incarnation=incarnation,
        engine_started=probe.engine_started or record.engine_started,
        facts=probe.facts if probe.facts is not None else record.facts,
    )


def _observe_rank(before: RankRecord, sample: RankSample, probe: ProbeResult, rules: FleetRules) -> RankRecord:
    # Gauges stay at their last value when no step runs, for example after the client of the last request hung up: work
    # counts as present only when the routers have it too. Without routers nobody waits, so nothing is stalled.
    busy = sample.router_unanswered > 0 or (sample.router_inflight > 0 and sample.running + sample.waiting > 0)
    moved = sample.progress != before.progress or not busy
    moved_s = probe.at_s if moved else before.moved_s
    return RankRecord(
        load=EngineLoad(
            observed_s=probe.observed_s,
            running=sample.running,
            waiting=sample.waiting,
            kv_usage=sample.kv_usage,
            prefix_queries_tokens=sample.prefix_queries_tokens,
            prefix_hits_tokens=sample.prefix_hits_tokens,
            prompt_tokens=sample.prompt_tokens,
            generation_tokens=sample.generation_tokens,
            preemptions=sample.preemptions,
        ),
        progress=sample.progress,
        moved_s=moved_s,
        stalled=not moved and probe.at_s - moved_s > rules.stall_after_s,
    )
