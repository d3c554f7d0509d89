"""A real vLLM engine as a process group of this test run.

vLLM's API server starts EngineCore and worker processes. If only the API server dies they go on as orphans and keep
their memory and ports, so an engine is always started in a session of its own and ended as a group; a guard process
ends the group even when the test run itself is killed.

An engine of the tiny model takes about 3 GB of memory (1 GB of it KV cache) and half a minute to start.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
from prometheus_client.parser import text_string_to_metric_families

TINY_MODEL = Path(__file__).parents[1] / "assets" / "tiny-model"
SERVED_MODEL = "tiny"
MAX_MODEL_LEN_TOKENS = 2048
BLOCK_TOKENS = 128
"""vLLM's block size on CPU: cached prefixes are counted in multiples of it."""

ENGINE_ARGS: tuple[str, ...] = (
    *("--model", str(TINY_MODEL), "--served-model-name", SERVED_MODEL),
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN_TOKENS), "--enforce-eager"),
    *("--enable-prefix-caching", "--enable-prompt-tokens-details", "--enable-server-load-tracking"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    "--enable-scale-out",
)

ENGINE_ENV: dict[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Two engines and their clients share a few cores: no OpenMP thread may spin while it waits ...
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    # ... nor the progress thread of UCX, where the NIXL connector is in use.
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "lo",
    # Else the first request for logprobs compiles a kernel: seconds, and it needs a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
    # The proxy of the surroundings, if there is one, has no business with loopback.
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}

_START_TRIES = 3


class EngineFailed(RuntimeError):
    """The engine ended, or was not ready in time; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kv_events_args(port: int, replay_port: int, *, topic: str = "", buffer_steps: int = 10_000) -> list[str]:
    """Arguments that make an engine publish its KV events on `port` and replay them on `replay_port`."""
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://127.0.0.1:{replay_port}",
        "buffer_steps": buffer_steps,
        "topic": topic,
    }
    return ["--kv-events-config", json.dumps(config)]


def get(url: str, *, timeout_s: float = 10) -> str:
    """The body of a GET.

    Raises `OSError` (`urllib.error.URLError`) for refused connections, timeouts and error statuses.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout_s) as response:
        return str(response.read().decode())


@dataclass(kw_only=True)
class VllmEngine:
    """One engine: `start()`, `wait_ready()`, then `url`; `stop()` is safe at any moment and more than once.

    `venv` is the folder that scripts/install_vllm.sh printed, `folder` takes the log and vLLM's own caches, `args` and
    `env` come after `ENGINE_ARGS` and `ENGINE_ENV`. `port` is chosen anew on a start after a stop unless given.
    """

    venv: Path
    folder: Path
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    model: str = SERVED_MODEL
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _guard: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _sockets: Path = field(default=Path(), init=False, repr=False)
    _port_in_use: int = field(default=0, init=False, repr=False)
    _tries: int = field(default=0, init=False, repr=False)

    @property
    def url(self) -> str:
        """Base URL without a slash at the end; valid once started."""
        return f"http://127.0.0.1:{self._port_in_use}"

    @property
    def log_path(self) -> Path:
        return self.folder / "engine.log"

    @property
    def pid(self) -> int:
        """Process id of the API server, which is also the id of the engine's process group."""
        if self._process is None:
            raise EngineFailed("the engine is not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the API server process lives; says nothing about readiness."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the processes and returns at once."""
        if self._process is not None:
            raise EngineFailed("the engine is started already")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._port_in_use = self.port or free_port()
        self._tries += 1
        self._sockets = Path(tempfile.mkdtemp(prefix="vllm-"))
        python = self.venv / "bin" / "python"
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM_"))},
            **ENGINE_ENV,
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
            "VLLM_CONFIG_ROOT": str(self.folder / "config"),
            # The path of a Unix socket holds 107 bytes: too few for pytest's folders below a long TMPDIR.
            "VLLM_RPC_BASE_PATH": str(self._sockets),
            **self.env,
        }
        address = ["--host", "127.0.0.1", "--port", str(self._port_in_use)]
        module = ["-m", "vllm.entrypoints.openai.api_server"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(python), *module, *address, *ENGINE_ARGS, *self.args],
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # The guard reads a pipe that closes when this process dies, however it dies.
        self._guard = subprocess.Popen(
            [sys.executable, __file__, str(self._process.pid), str(self._sockets)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_ready(self, timeout_s: float = 300) -> None:
        """Waits until `/health` answers 200.

        A start that lost its chosen port to another process is repeated on a new port.

        Raises:
            EngineFailed: the engine ended or the time is over; it is stopped then.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if not self.running:
                tail = self.log_tail()
                self.stop()
                if "address already in use" in tail.lower() and not self.port and self._tries < _START_TRIES:
                    self.start()
                    continue
                raise EngineFailed(f"vLLM ended while it started:\n{tail}")
            try:
                get(f"{self.url}/health", timeout_s=5)
                return
            except OSError:
                time.sleep(0.25)
        tail = self.log_tail()
        self.stop()
        raise EngineFailed(f"vLLM was not ready after {timeout_s:.0f} s:\n{tail}")

    def signal(self, number: int) -> None:
        """Sends a signal to the API server alone, as Kubernetes or a crash of that process would."""
        os.kill(self.pid, number)

    def signal_core(self, number: int) -> None:
        """Sends a signal to the EngineCore processes: SIGSTOP makes a hung engine whose `/health` stays 200."""
        cores = [child for child in self.processes() if "EngineCor" in child.name()]
        if not cores:
            raise EngineFailed("no EngineCore process found")
        for core in cores:
            core.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """All live processes of the group, orphans included."""
        return [] if self._process is None else _group(self._process.pid)

    def wait_exit(self, timeout_s: float = 60) -> int:
        """Waits for the API server to end by itself and returns its exit status (negative: the signal)."""
        if self._process is None:
            raise EngineFailed("the engine is not started")
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """Kills the whole group and waits until none of its processes is left."""
        process, guard = self._process, self._guard
        if process is None or guard is None:
            return
        _kill_group(process.pid, self._sockets)
        process.wait(30)
        if left := _group(process.pid):
            raise EngineFailed(f"processes survived SIGKILL: {left}")
        guard.kill()
        guard.wait(30)
        _close(guard.stdin)
        self._process = self._guard = None

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log of all starts so far."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples called `name` in `/metrics` that carry these labels.

        Raises:
            KeyError: no such sample.
        """
        found = [
            sample.value
            for family in text_string_to_metric_families(get(f"{self.url}/metrics"))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not found:
            raise KeyError(name)
        return sum(found)


def start_all(engines: Sequence[VllmEngine], timeout_s: float = 300) -> None:
    """Starts engines side by side and waits for all; if one fails, all are stopped and its error is raised."""
    failures: list[EngineFailed] = []

    def wait(engine: VllmEngine) -> None:
        try:
            engine.wait_ready(timeout_s)
        except EngineFailed as failure:
            failures.append(failure)

    try:
        for engine in engines:
            engine.start()
        waiters = [threading.Thread(target=wait, args=(engine,), daemon=True) for engine in engines]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join()
    except BaseException:
        stop_all(engines)
        raise
    if failures:
        stop_all(engines)
        raise failures[0]


def stop_all(engines: Sequence[VllmEngine]) -> None:
    for engine in engines:
        engine.stop()


def _group(pgid: int) -> list[psutil.Process]:
    """Live (not zombie) processes of a process group: an orphan's zombie is its new parent's business."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _kill_group(pgid: int, sockets: Path) -> None:
    """Kills a group so that no shared memory and no socket file of it is left behind."""
    for member in _group(pgid):
        if not _tracks_resources(member):
            _kill(member)
    # With everybody else gone, Python's resource trackers remove the shared memory that was left, and end.
    if not _wait_gone(pgid, 5):
        for member in _group(pgid):
            _kill(member)
        _wait_gone(pgid, 30)
    shutil.rmtree(sockets, ignore_errors=True)


def _tracks_resources(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


def _wait_gone(pgid: int, timeout_s: float) -> bool:
    """Whether no live process of the group is left before the time is over."""
    deadline_s = time.monotonic() + timeout_s
    while left := _group(pgid):
        if time.monotonic() > deadline_s:
            return False
        psutil.wait_procs(left, timeout=0.2)
    return True


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        stream.close()


if __name__ == "__main__":  # the guard: pgid and socket folder as arguments, its maker's end as end of file
    sys.stdin.read()
    _kill_group(int(sys.argv[1]), Path(sys.argv[2]))
