"""The comparison of policies: result, warnings, plot, agreement of homes."""

import io
from typing import Any

import pytest
from rich.console import Console

from twofold.model.fleet import Slo
from twofold.replay.cache import CacheFigures
from twofold.replay.compare import (
    Outcome,
    comparison_result,
    comparison_warnings,
    print_comparison,
    ttft_plot,
    worst_lateness,
)
from twofold.replay.homes import agreement
from twofold.replay.measures import LogHistogram, Record, summarise
from twofold.replay.report import RunReport, ttft_over_time


def outcome(policy: str = "twofold", ttft_s: float = 0.4, **changes: Any) -> Outcome:
    records = [
        Record(
            request_id=f"{policy}-{i}",
            label="chat",
            due_s=float(i),
            sent_s=i + 0.001,
            first_s=i + ttft_s,
            last_s=i + ttft_s + 1.0,
            end_s=i + ttft_s + 1.0,
            output_tokens=11,
            verified_tokens=11,
        )
        for i in range(40)
    ]
    figures = summarise(records, LogHistogram(), Slo(ttft_s=1.0, tpot_s=0.2))
    report = RunReport(
        workload="w",
        seed=0,
        figures=figures,
        slo=Slo(),
        lateness_ok=True,
        lateness_limit_s=0.05,
        hit_ratio=0.5,
        hit_ratio_source="engines",
        ideal=CacheFigures(prompt_tokens=10, hit_tokens=8),
        ceiling=None,
        kv_capacity_tokens=0,
        steps_skipped=0,
        prompts_cut=0,
        interrupted=False,
    )
    values: dict[str, Any] = {"policy": policy, "report": report, "records": records, "host_cpu": 0.3, "own_cpu": 0.2}
    return Outcome(**(values | changes))


def test_the_result_has_the_documented_keys() -> None:
    result = comparison_result([outcome(), outcome("round_robin", 2.0)])
    assert list(result) == [
        "requests",
        "errors",
        "chain_violations",
        "tokens_delivered",
        "tokens_verified",
        "lateness_ok",
        "policies",
    ]
    assert (result["requests"], result["tokens_verified"], result["lateness_ok"]) == (80, 880, True)
    assert list(result["policies"]) == ["twofold", "round_robin"]
    assert {"ttft_p50_s", "ttft_p99_s", "itl_p50_s", "attainment", "hit_ratio"} <= set(result["policies"]["twofold"])
    assert result["policies"]["twofold"]["attainment"] == 1.0
    assert result["policies"]["round_robin"]["attainment"] == 0.0
    assert result["policies"]["twofold"]["hit_ratio_ideal"] == 0.8


def test_a_busy_host_and_late_engines_are_said() -> None:
    assert comparison_warnings([outcome()]) == []
    (busy,) = comparison_warnings([outcome(host_cpu=0.75)])
    assert "host was busy (75.0%, of it 20.0% the demo)" in busy
    (late,) = comparison_warnings([outcome(engine_lateness_ratio=0.5)])
    assert late.startswith("INVALID: twofold: engine steps were late")


def test_the_table_and_the_plot_name_every_policy() -> None:
    outcomes = [outcome(), outcome("round_robin", 2.0)]
    buffer = io.StringIO()
    print_comparison(Console(file=buffer, width=120), outcomes)
    plot = ttft_plot(outcomes, width=80, colour=False)
    for text in (buffer.getvalue(), plot):
        assert "twofold" in text
        assert "round_robin" in text
    assert "\x1b" not in plot
    assert max(map(len, plot.splitlines())) <= 80
    assert ttft_plot([], width=80, colour=False).strip()


def test_the_worst_engine_counts() -> None:
    stats = [
        {"engines": [{"lateness_ratio": {"p50": 0.0, "p99": 0.1}}, {"lateness_ratio": {"p50": 0.0, "p99": 0.3}}]},
        {"engines": [{"lateness_ratio": {"p50": 0.0, "p99": 0.2}}]},
    ]
    assert worst_lateness(stats) == 0.3
    assert worst_lateness([{}]) is None


def test_a_run_shorter_than_a_slice_still_plots() -> None:
    records = outcome().records[:1]
    assert ttft_over_time(records, 0.5)[1] == [pytest.approx(0.4)]


def decision(key: str, homes: list[str], relay: int, ring: str = "v1") -> dict[str, Any]:
    examined = [
        {"target_id": name, "role": f"home-{role}"} for name, role in zip(homes, ("a1", "a2", "b1", "b2"), strict=True)
    ]
    return {
        "pool": "p",
        "ring_key": key,
        "ring_version": ring,
        "replica_id": f"router-{relay // 2}",
        "relay": relay % 2,
        "examined": [*examined, {"target_id": f"x{relay}", "role": "escape"}],
    }


def test_equal_homes_on_every_relay_agree() -> None:
    homes = ["a", "b", "c", "d"]
    agreed = agreement([decision("k", homes, relay) for relay in range(4)] + [decision("other", homes[::-1], 0)])
    assert (agreed.relays, agreed.keys, agreed.keys_shared, agreed.disagreements) == (4, 2, 1, 0)
    assert agreed.agreed


def test_one_relay_that_sees_other_homes_disagrees() -> None:
    agreed = agreement([decision("k", ["a", "b", "c", "d"], 0), decision("k", ["a", "b", "d", "c"], 1)])
    assert agreed.disagreements == 1
    assert not agreed.agreed


def test_other_rings_may_have_other_homes() -> None:
    agreed = agreement([decision("k", ["a", "b", "c", "d"], 0), decision("k", ["e", "f", "g", "h"], 1, ring="v2")])
    assert agreed.disagreements == 0
    assert not agreed.agreed, "nothing was compared"


def test_decisions_without_homes_prove_nothing() -> None:
    assert agreement([{"examined": [{"target_id": "a", "role": "scan"}], "ring_key": "k"}]).keys == 0
