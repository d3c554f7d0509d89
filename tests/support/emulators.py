"""Emulator processes of a test."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_S = 30.0


class Emulator:
    """``python -m emulator`` on free ports with an admin port; a context manager. ``start`` again after ``kill``."""

    def __init__(self, folder: Path, *args: str, env: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._args = args
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self.urls: list[str] = []
        self.admin_url = ""
        self._starts = 0

    def __enter__(self) -> "Emulator":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, *more: str) -> None:
        """Start and wait for the listeners. ``more``: arguments of this start alone."""
        self._starts += 1
        ready = self._folder / f"ready-{self._starts}.json"
        base = [sys.executable, "-m", "emulator", "--port", "0", "--admin-port", "0", "--ready-file", str(ready)]
        command = [*base, "--log-file", str(self._folder / "emulator.log"), *self._args, *more]
        self._process = subprocess.Popen(command, env=dict(self._env) if self._env is not None else None)
        deadline_s = time.monotonic() + START_S
        while not ready.exists():
            assert self._process.poll() is None, "the emulator ended while it started"
            assert time.monotonic() < deadline_s, "the emulator did not start"
            time.sleep(0.02)
        ports = json.loads(ready.read_text())
        self.urls = [f"http://127.0.0.1:{port}" for port in ports["ports"]]
        self.admin_url = f"http://127.0.0.1:{ports['admin_port']}"

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def get(self, path: str) -> Any:
        """JSON of a GET on the admin port."""
        with urllib.request.urlopen(self.admin_url + path, timeout=10) as reply:
            return json.loads(reply.read())

    def truth(self, engine: int = 0, rank: int = 0) -> dict[int, int]:
        """What the prefix cache of an engine holds: copies by block hash."""
        held = self.get("/kv")[engine][rank]["copies"]
        return {int(block_hash): copies for block_hash, copies in held.items()}

    def next_sequence(self, engine: int = 0, rank: int = 0) -> int:
        """Sequence number of the engine's next batch of KV events."""
        found: int = self.get("/kv")[engine][rank]["next_sequence"]
        return found


def post(url: str, body: Any, timeout_s: float = 60.0) -> Any:
    """JSON answer to a POST of JSON. Raises urllib.error.HTTPError."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        return json.loads(reply.read())


def kv_events(**fields: Any) -> tuple[str, str]:
    """The flag that makes an engine publish its KV events on free ports."""
    config = {
        "enable_kv_cache_events": True,
        "endpoint": "tcp://*:0",
        "replay_endpoint": "tcp://127.0.0.1:0",
        **fields,
    }
    return "--kv-events-config", json.dumps(config)
