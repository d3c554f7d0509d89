"""The engines of these tests themselves: nothing of one survives its end, and a failed start says why."""

from __future__ import annotations

import json
import signal
import socket
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from .vllm_engine import (
    MAX_MODEL_LEN_TOKENS,
    EngineFailed,
    VllmEngine,
    free_port,
    get,
    kv_events_args,
    start_all,
)

MakeEngine = Callable[..., VllmEngine]


def _shared_memory(processes: Sequence[psutil.Process]) -> set[Path]:
    """Python's shared memory segments that these processes have mapped."""
    return {
        Path(mapping.path)
        for process in processes
        for mapping in process.memory_maps()
        if mapping.path.startswith("/dev/shm/psm_")
    }


def test_both_engines_serve_the_model(engines: Sequence[VllmEngine]) -> None:
    assert len({engine.url for engine in engines}) == 2
    for engine in engines:
        card = json.loads(get(f"{engine.url}/v1/models"))["data"][0]
        assert (card["id"], card["max_model_len"]) == (engine.model, MAX_MODEL_LEN_TOKENS)
        assert engine.metric("vllm:num_requests_running", model_name=engine.model) >= 0
        with pytest.raises(KeyError):
            engine.metric("vllm:no_such_metric")


def test_nothing_survives_a_killed_api_server(make_engine: MakeEngine) -> None:
    """A killed API server leaves its engine core and worker running; `stop` ends them and starts are possible again."""
    port, replay_port = free_port(), free_port()
    engine = make_engine(*kv_events_args(port, replay_port))
    engine.start()
    engine.wait_ready()
    sources = get(f"{engine.url}/kv_event_sources")
    assert str(port) in sources

    api_server = engine.pid
    segments = _shared_memory(engine.processes())
    assert segments
    engine.signal(signal.SIGKILL)
    assert engine.wait_exit() == -signal.SIGKILL
    with pytest.raises(urllib.error.URLError):
        get(f"{engine.url}/health")
    orphans = engine.processes()
    assert api_server not in [process.pid for process in orphans]
    assert any("EngineCor" in process.name() for process in orphans)

    engine.stop()
    assert not [process for process in orphans if _alive(process)]
    assert not [segment for segment in segments if segment.exists()]
    for freed in (port, replay_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", freed))
    engine.stop()


def test_failed_start_says_why(make_engine: MakeEngine) -> None:
    broken = make_engine("--max-model-len", "no-number")
    with pytest.raises(EngineFailed, match=r"ended while it started[\s\S]*no-number"):
        start_all([broken])
    assert not broken.running
    assert not broken.processes()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
