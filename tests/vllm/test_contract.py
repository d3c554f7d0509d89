"""The contract suite that the emulator passes, on a real engine: the same test functions in a run of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from .vllm_engine import BLOCK_TOKENS, VllmEngine

CONTRACT = Path(__file__).parents[1] / "contract"


@pytest.mark.timeout(900)
def test_contract_suite_holds_on_a_real_engine(engines: Sequence[VllmEngine]) -> None:
    env = {
        **os.environ,
        "TWOFOLD_VLLM_URL": engines[1].url,
        "TWOFOLD_VLLM_MODEL": engines[1].model,
        "TWOFOLD_VLLM_BLOCK_TOKENS": str(BLOCK_TOKENS),
    }
    command = [sys.executable, "-m", "pytest", str(CONTRACT), "-m", "vllm", "-q", "--timeout", "120"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=CONTRACT.parents[1], timeout=850)
    sys.stdout.write(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
