"""``twofold up`` as a child process of a test run."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml


class Up:
    """Runs ``twofold up`` for a fleet mapping; ``urls`` are the router replicas. Ends with ``stop``."""

    def __init__(self, fleet: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / "fleet.yaml"
        self.path.write_text(yaml.safe_dump(fleet))
        routers = fleet["routers"]
        self.urls = [f"http://127.0.0.1:{routers['port'] + i}" for i in range(routers["replicas"])]
        self.admin_urls = [f"http://127.0.0.1:{routers['admin_port'] + i}" for i in range(routers["replicas"])]
        with (folder / "up.out").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "twofold", "up", str(self.path), "--plain", "--run-dir", str(folder / "run")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, targets: int, timeout_s: float = 60) -> None:
        """Wait until every replica knows ``targets`` targets that take work. Raises TimeoutError with the output."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                break
            if all(self.state(url).get("usable_targets", 0) >= targets for url in self.admin_urls):
                return
            time.sleep(0.1)
        raise TimeoutError(f"the fleet is not ready: {(self.folder / 'up.out').read_text()}")

    def state(self, admin_url: str) -> dict[str, Any]:
        """A replica's ``/debug/state``; empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"{admin_url}/debug/state", timeout=5) as reply:
                state: dict[str, Any] = json.loads(reply.read())
                return state
        except (urllib.error.URLError, OSError):
            return {}

    def stop(self) -> int:
        """SIGTERM and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
