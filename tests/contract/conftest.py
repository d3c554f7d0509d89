"""Engines under test: always an emulated one; a real vLLM too where ``TWOFOLD_VLLM_URL`` names one.

The real engine must serve a model called ``TWOFOLD_VLLM_MODEL`` (default "tiny") with a model length of 2048 tokens, as
the engine of the recordings did, started with ``--enable-prompt-tokens-details``.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from .registry import Tally, counts, different, tally_into


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine is and what it serves."""

    kind: str
    url: str
    model: str
    block_tokens: int
    max_model_len: int = 2048


class Emulator:
    """An emulator process of our own."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self._ready = directory / f"ready-{time.monotonic_ns()}.json"
        self.log_path = directory / "emulator.log"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "emulator", "--profile", "cpu-tiny", "--model", "tiny", "--port", "0"),
                *("--admin-port", "0", "--enable-fault-injection", "--log-file", str(self.log_path)),
                *("--ready-file", str(self._ready), *flags),
            ],
            start_new_session=True,
        )
        ports = self._wait()
        self.urls = [f"http://127.0.0.1:{port}" for port in ports["ports"]]
        self.url = self.urls[0]
        self.admin = f"http://127.0.0.1:{ports['admin_port']}"

    def _wait(self) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the emulator exited with {self.process.returncode}")
            if self._ready.exists():
                return dict(json.loads(self._ready.read_text()))
            time.sleep(0.02)
        self.kill()
        raise RuntimeError("the emulator did not become ready")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


def kv_events_flags() -> list[str]:
    """KV events as the engine of the recordings published them, on ports that were free a moment ago."""
    with socket.socket() as live, socket.socket() as replay:
        for probe in (live, replay):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (live, replay)]
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{ports[0]}"}
    return ["--kv-events-config", json.dumps({**config, "replay_endpoint": f"tcp://127.0.0.1:{ports[1]}"})]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    running = Emulator(tmp_path_factory.mktemp("emulator"), "--enable-scale-out", *kv_events_flags())
    yield running
    running.kill()


def _kinds() -> list[Any]:
    kinds = [pytest.param("emulator", id="emulator")]
    if os.environ.get("TWOFOLD_VLLM_URL"):
        kinds.append(pytest.param("vllm", id="vllm", marks=pytest.mark.vllm))
    return kinds


@pytest.fixture(scope="session", params=_kinds())
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine under test."""
    if request.param == "vllm":
        url = os.environ["TWOFOLD_VLLM_URL"].rstrip("/")
        model = os.environ.get("TWOFOLD_VLLM_MODEL", "tiny")
        block = int(os.environ.get("TWOFOLD_VLLM_BLOCK_TOKENS", "128"))
        return Engine(kind="vllm", url=url, model=model, block_tokens=block)
    running: Emulator = request.getfixturevalue("emulator")
    return Engine(kind="emulator", url=running.url, model="tiny", block_tokens=128)


@pytest.fixture(scope="session")
def engine_url(engine: Engine) -> str:
    """The URL of each engine under test."""
    return engine.url


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Notes whether a recorded exchange was repeated equally; see ``registry``."""
    return tally_into(request.node.user_properties)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add the findings of all processes up: properties travel with the reports of pytest-xdist too."""
    reports = [report for group in ("passed", "failed", "xfailed") for report in terminalreporter.stats.get(group, [])]
    properties = [item for report in reports for item in getattr(report, "user_properties", ())]
    found = counts(properties)
    if found:
        for line in different(properties):
            terminalreporter.write_line(f"different: {line}")
        terminalreporter.write_line(f"RESULT {json.dumps(found)}")
