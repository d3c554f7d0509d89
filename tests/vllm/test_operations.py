"""The scenarios of `tests/contract` that configure, signal and kill engines, on real ones, one after the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parents[1] / "contract"


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("scenario", ["test_dev", "test_dp", "test_lifecycle", "test_metrics"])
def test_scenarios_hold_on_real_engines(vllm_venv: Path, scenario: str) -> None:
    env = {**os.environ, "TWOFOLD_VLLM_OPERATIONS": "1", "TWOFOLD_VLLM_VENV": str(vllm_venv)}
    command = [sys.executable, "-m", "pytest", str(CONTRACT / f"{scenario}.py"), "-m", "vllm", "-q"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=CONTRACT.parents[1], timeout=2300)
    sys.stdout.write(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
