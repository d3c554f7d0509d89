"""Engines that a test may signal, kill and configure: emulated ones, and real vLLM ones where they are asked for.

Real ones take half a minute and 3 GB each, so they are started only with ``TWOFOLD_VLLM_OPERATIONS=1`` and a venv in
``TWOFOLD_VLLM_VENV`` (see ``tests/vllm``), one at a time.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from support.fleets import free_port_base

from .client import exchange
from .conftest import Emulator

EMULATED, REAL = "emulator", "vllm"
START_S = 550.0
"""Bound of a real start: half a minute on an idle machine, ten times that beside other work."""


class Flavour(msgspec.Struct, frozen=True, kw_only=True):
    """The same engine configuration in the words of the emulator and of vLLM."""

    name: str
    emulator: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    kv_events: dict[str, Any] | None = None
    """Fields of ``--kv-events-config`` beside the ports, where events are published."""

    def kv_events_args(self) -> tuple[str, ...]:
        """The flag, on free ports: one and the next for each rank."""
        if self.kv_events is None:
            return ()
        port, replay_port = free_port_base(2), free_port_base(4) + 2
        config = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{port}",
            "replay_endpoint": f"tcp://127.0.0.1:{replay_port}",
            **self.kv_events,
        }
        return ("--kv-events-config", json.dumps(config))


_LORA = ("--enable-lora",)
_PRIORITY = ("--scheduling-policy", "priority")
PLAIN = Flavour(name="plain")
DRAINING = Flavour(name="draining", emulator=("--shutdown-timeout", "30"), vllm=("--shutdown-timeout", "30"))
HURRIED = Flavour(
    name="hurried", emulator=("--shutdown-timeout", "2", "--time-scale", "0.3"), vllm=("--shutdown-timeout", "2")
)
DEVELOPMENT = Flavour(
    name="development",
    emulator=("--enable-dev-mode", *_LORA, *_PRIORITY),
    vllm=(*_LORA, *_PRIORITY),
    environment={"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    kv_events={"buffer_steps": 50, "topic": "kv@tiny"},
)
DEVELOPMENT_WITHOUT_SCALE_OUT = msgspec.structs.replace(
    DEVELOPMENT,
    name="closed",
    emulator=(*DEVELOPMENT.emulator, "--no-enable-scale-out"),
    vllm=(*DEVELOPMENT.vllm, "--no-enable-scale-out"),
)
RANKS = Flavour(
    name="ranks",
    emulator=("--data-parallel-size", "2"),
    vllm=("--data-parallel-size", "2"),
    kv_events={"buffer_steps": 10000, "topic": ""},
)
SMALL = Flavour(
    name="small",
    emulator=("--kv-capacity-tokens", str(20 * 128), "--max-model-len", "2048", "--time-scale", "0.5", *_PRIORITY),
    vllm=("--num-gpu-blocks-override", "20", *_PRIORITY),
)
LIMITED = Flavour(
    name="limited",
    emulator=("--max-num-queued-reqs", "2", "--time-scale", "0.2"),
    vllm=("--max-num-queued-reqs", "2"),
)


class Subject:
    """A running engine of one flavour. ``port`` things are those of its API server."""

    kind: str
    url: str
    model = "tiny"
    block_tokens = 128

    def signal_server(self, number: int) -> None:
        """Send a signal to the API server alone."""
        raise NotImplementedError

    def signal_core(self, number: int, rank: int = 0) -> None:
        """Send SIGKILL, SIGSTOP or SIGCONT to the engine core of a rank."""
        raise NotImplementedError

    def server_gone(self, timeout_s: float) -> bool:
        """Whether the API server ends within ``timeout_s``."""
        raise NotImplementedError

    @property
    def server_lives(self) -> bool:
        """Whether the API server's process is there."""
        raise NotImplementedError

    def close(self) -> None:
        """End everything."""
        raise NotImplementedError


class EmulatedSubject(Subject):
    """An emulator; what happens to an engine core is a fault of its admin port."""

    kind = EMULATED

    def __init__(self, flavour: Flavour, folder: Path) -> None:
        self._emulator = Emulator(folder, "--enable-scale-out", *flavour.emulator, *flavour.kv_events_args())
        self.url = self._emulator.url

    def signal_server(self, number: int) -> None:
        self._emulator.process.send_signal(number)

    def signal_core(self, number: int, rank: int = 0) -> None:
        if number == signal.SIGCONT:
            answer = exchange(self._emulator.admin, "DELETE", "/faults")
        else:
            fault: dict[str, Any] = {"kind": "hang"}
            if number == signal.SIGKILL:
                fault = {"kind": "die_after_tokens", "mode": "engine_core"}
            answer = exchange(self._emulator.admin, "POST", "/faults", {**fault, "rank": rank})
        assert answer.status == 200, answer.body

    def server_gone(self, timeout_s: float) -> bool:
        try:
            self._emulator.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def server_lives(self) -> bool:
        return self._emulator.process.poll() is None

    def close(self) -> None:
        self._emulator.kill()


class RealSubject(Subject):
    """A real vLLM engine of the tiny model."""

    kind = REAL

    def __init__(self, flavour: Flavour, folder: Path) -> None:
        from tests.vllm.vllm_engine import VllmEngine

        venv = Path(os.environ["TWOFOLD_VLLM_VENV"])
        self._engine = VllmEngine(
            venv=venv, folder=folder, args=(*flavour.vllm, *flavour.kv_events_args()), env=flavour.environment
        )
        self._engine.start()
        self._engine.wait_ready(START_S)
        self.url = self._engine.url

    def signal_server(self, number: int) -> None:
        self._engine.signal(number)

    def signal_core(self, number: int, rank: int = 0) -> None:
        cores = [process for process in self._engine.processes() if "EngineCor" in process.name()]
        named = [process for process in cores if process.name().endswith(f"DP{rank}")]
        chosen = named or sorted(cores, key=psutil.Process.create_time)[rank : rank + 1]
        chosen[0].send_signal(number)

    def server_gone(self, timeout_s: float) -> bool:
        try:
            self._engine.wait_exit(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def server_lives(self) -> bool:
        return self._engine.running

    def close(self) -> None:
        self._engine.stop()


Open = Callable[[Flavour], Subject]


def kinds() -> list[Any]:
    """Parameters of tests that run on every kind of engine."""
    found = [pytest.param(EMULATED, id=EMULATED)]
    if os.environ.get("TWOFOLD_VLLM_OPERATIONS"):
        found.append(pytest.param(REAL, id=REAL, marks=[pytest.mark.vllm, pytest.mark.timeout(START_S + 300)]))
    return found


@contextmanager
def opened(kind: str, flavour: Flavour, folder: Path) -> Iterator[Subject]:
    """An engine of this kind and flavour, ended at the end."""
    subject: Subject = RealSubject(flavour, folder) if kind == REAL else EmulatedSubject(flavour, folder)
    try:
        yield subject
    finally:
        subject.close()


def make_adapter(folder: Path, kind: str) -> Path:
    """The folder of a LoRA adapter for the tiny model. A real engine needs its weights too, random ones here."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if kind == REAL:
        python = Path(os.environ["TWOFOLD_VLLM_VENV"]) / "bin" / "python"
        subprocess.run([str(python), "-c", _ADAPTER, str(folder)], check=True, timeout=120)
    return folder


_ADAPTER = """
import sys, torch
from safetensors.torch import save_file
tensors = {}
for layer in range(2):
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    tensors[f"{name}.lora_A.weight"] = torch.randn(4, 128)
    tensors[f"{name}.lora_B.weight"] = torch.randn(128, 4)
save_file(tensors, sys.argv[1] + "/adapter_model.safetensors")
"""
