"""The soak in miniature: the command runs a fleet, proves every token and sees what a router does not give back."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMAND = ROOT / "benchmarks" / "soak.py"
STREAMS = 50
TIMEOUT_S = 100.0

pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason="benchmarks are not part of the wheel")


async def test_a_short_soak_proves_every_token(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(COMMAND), "--streams", str(STREAMS), "--minutes", "0.05", "--itl-s", "0.05"),
        *("--ramp-s", "0.5", "--warmup-s", "1", "--fill-requests", "300", "--run-dir", str(tmp_path)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    last = out.decode().splitlines()[-1]
    assert last.startswith("RESULT "), err.decode()
    result: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    assert result["errors"] == 0, err.decode()
    assert result["chain_violations"] == 0
    assert result["tokens_verified"] == result["tokens_delivered"] > 0
    assert result["requests"] >= 300 + STREAMS
    assert result["disconnects"] >= STREAMS
    assert result["streams_under_way_min"] > 0
    assert set(result["rss_mb"]) == {"agent", "controlplane", "launcher", "relay-0", "relay-1"}
    assert result["open_fds_flat"], result["open_fds"]
    assert result["inflight_after_drain"] == 0
    assert result["processes_lost"] == []
