"""Real vLLM engines, and real clients against a service in front of them. Run by `make test-vllm`.

Environment:
    TWOFOLD_VLLM_VENV     folder printed by scripts/install_vllm.sh. Unset: everything here is skipped.
    TWOFOLD_CLIENTS_VENV  folder printed by scripts/install_clients.sh. Unset: the tests of those clients are skipped.

A variable that is set but names no usable venv is an error, never a skip. By hand:

    TWOFOLD_VLLM_VENV=$(scripts/install_vllm.sh) TWOFOLD_CLIENTS_VENV=$(scripts/install_clients.sh) \\
        .venv/bin/python -m pytest tests/vllm

Fixtures: `engines` are two engines that live for the whole session and must be left healthy; `make_engine` builds
engines of a test's own, to be broken at will. Client tests use only `service_url` and `model_name`, so that the
same tests run against whatever those name. Not for pytest-xdist: each worker would start its own pair.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from support.fleets import watched_fleet
from support.up import Up

from .vllm_engine import VllmEngine, free_port, kv_events_args, start_all, stop_all

_HERE = Path(__file__).parent
_TIMEOUT_S = 600
"""Per test, with the start of the session's engines in the first one's set-up."""

MakeEngine = Callable[..., VllmEngine]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.vllm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_TIMEOUT_S))
    # Scenarios that start engines of their own come before the session's pair takes its memory.
    items.sort(key=lambda item: item.path.name != "test_operations.py")


def _venv(variable: str, script: str, program: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: run `make test-vllm`, or set it to what {script} prints")
    venv = Path(value).resolve()
    if not os.access(venv / "bin" / program, os.X_OK):
        pytest.fail(f"{variable}={value} has no bin/{program}: set it to what {script} prints")
    return venv


@pytest.fixture(scope="session")
def vllm_venv() -> Path:
    return _venv("TWOFOLD_VLLM_VENV", "scripts/install_vllm.sh", "python")


@pytest.fixture(scope="session")
def clients_venv() -> Path:
    return _venv("TWOFOLD_CLIENTS_VENV", "scripts/install_clients.sh", "aiperf")


@pytest.fixture(scope="session")
def engines(vllm_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[VllmEngine]]:
    """Two ready engines of the tiny model, shared by the whole session; they publish KV events, as was recorded."""
    pair = [
        VllmEngine(
            venv=vllm_venv,
            folder=tmp_path_factory.mktemp(f"engine{i}-"),
            args=kv_events_args(free_port(), free_port()),
        )
        for i in range(2)
    ]
    start_all(pair)
    yield pair
    stop_all(pair)


@pytest.fixture
def make_engine(vllm_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeEngine]:
    """`make_engine(*args, env=None, port=0)` builds an engine that is not started; all are stopped after the test."""
    made: list[VllmEngine] = []

    def make(*args: str, env: Mapping[str, str] | None = None, port: int = 0) -> VllmEngine:
        folder = tmp_path_factory.mktemp("own-engine")
        made.append(VllmEngine(venv=vllm_venv, folder=folder, args=args, env=env or {}, port=port))
        return made[-1]

    yield make
    stop_all(made)


@pytest.fixture(scope="session")
def fleet(engines: Sequence[VllmEngine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`twofold up` with one router replica in front of the session's engines."""
    up = Up(watched_fleet([engine.url for engine in engines], engines[0].model), tmp_path_factory.mktemp("fleet"))
    try:
        up.wait_ready(len(engines))
        yield up
    finally:
        up.stop()


@pytest.fixture(scope="session")
def service_url(fleet: Up) -> str:
    """Base URL, no slash at the end, of the service that clients talk to: a router."""
    return fleet.urls[0]


@pytest.fixture(scope="session")
def model_name(engines: Sequence[VllmEngine]) -> str:
    """The model that clients ask the service for."""
    return engines[0].model


@pytest.fixture(scope="session")
def served_requests(engines: Sequence[VllmEngine]) -> Callable[[], int]:
    """Counts the requests that the session's real engines finished so far, to show that a client reached them."""
    return lambda: round(sum(engine.metric("vllm:request_success_total") for engine in engines))
