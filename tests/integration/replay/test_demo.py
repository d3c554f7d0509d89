"""``twofold demo`` as a process, with a real fleet and little traffic."""

import asyncio
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from twofold.cli.demo import DemoSettings, make_plan
from twofold.cli.demo_fleet import engine_admin_urls, engine_urls
from twofold.replay.workload import WorkloadError

TRAFFIC = (
    "sessions=6,rate=6,turns=2,max_turns=2,steps=2,max_steps=2,think_s=0.1,system_tokens=300,output_tokens=8,"
    "call_tokens=6"
)


async def demo(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "twofold", "demo", "--plain", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 110)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def result(out: str) -> dict[str, Any]:
    last = out.splitlines()[-1]
    assert last.startswith("RESULT ")
    value: dict[str, Any] = json.loads(last[7:])
    return value


async def test_two_policies_side_by_side(tmp_path: Path) -> None:
    code, out, err = await demo(
        *("--generate", TRAFFIC, "--policy", "twofold", "--policy", "round_robin", "--run-dir", str(tmp_path / "run")),
    )
    assert code == 0, (out, err)
    line = result(out)
    assert list(line["policies"]) == ["twofold", "round_robin"]
    assert (line["errors"], line["chain_violations"]) == (0, 0)
    assert line["tokens_delivered"] == line["tokens_verified"] > 0
    for figures in line["policies"].values():
        assert figures["ttft_p50_s"] > 0
        assert 0 <= figures["hit_ratio"] <= figures["hit_ratio_ideal"]
    assert "curl -N http://127.0.0.1:8000/v1/chat/completions" in out
    assert "TTFT p90 in seconds" in out


async def test_a_trace_with_a_planted_fault_and_the_agreement_of_relays(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl.gz"
    rows = [
        {"timestamp": 60 * i, "input_length": 1100, "output_length": 40, "hash_ids": [i % 5, 100 + i % 5, 200 + i]}
        for i in range(60)
    ]
    trace.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    code, out, err = await demo(
        *("--workload", "mooncake", "--trace", str(trace), "--policy", "twofold", "--speed", "1"),
        *("--run-dir", str(tmp_path / "run")),
    )
    assert code == 0, (out, err)
    line = result(out)
    assert (line["errors"], line["chain_violations"]) == (0, 0)
    assert line["planted_faults"] == line["caught"] == 1
    assert line["requests"] == 59, "the request with the planted fault is set apart"
    assert line["tokens_delivered"] == line["tokens_verified"]
    assert line["homes"]["agreed"]
    assert line["homes"]["relays"] == 4
    assert line["homes"]["keys_shared"] >= 1


async def test_what_cannot_be_done_is_one_line() -> None:
    for arguments, message in (
        (("--policy", "best"), "unknown policy 'best'"),
        (("--workload", "mooncake"), "needs a file"),
        (("--engine", "vllm"), "--vllm-python"),
        (("--generate", "x=1"), "unknown parameter 'x'"),
    ):
        code, _, err = await demo(*arguments)
        assert code == 2, err
        assert message in err
        assert err.count("\n") == 1


def test_plans_fit_their_fleets() -> None:
    plan = make_plan(DemoSettings())
    assert len({group.profile for pool in plan.file.pools for group in pool.workers}) == 2
    assert len(engine_urls(plan.file)) == 8
    assert plan.file.routers.replicas == 2
    assert plan.policies == ("twofold", "least_requests", "round_robin")
    mooncake = make_plan(DemoSettings(workload="mooncake", trace="x"))
    assert (len(engine_urls(mooncake.file)), mooncake.file.routers.relays) == (16, 2)
    assert len(engine_admin_urls(mooncake.file)) == 16
    assert (mooncake.limit, mooncake.check_homes, mooncake.plant_fault) == (2000, True, True)
    with pytest.raises(WorkloadError, match="emulated engines"):
        make_plan(DemoSettings(workload="mooncake", trace="x", engine="vllm"))
