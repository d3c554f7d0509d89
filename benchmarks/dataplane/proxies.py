"""The proxies that are measured: how each is installed, started in production settings, stopped, and what it costs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from dataplane.wire import MODEL

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
_PROFILE = "h100-8b-tp1"


class ProxyError(Exception):
    """A proxy that cannot be installed or started; the message is one line."""


class Proxy:
    """A running proxy: where it listens, and the process trees that are it.

    ``beside``: processes it needs that serve all its replicas together, counted apart.
    """

    def __init__(self, name: str, port: int, processes: list[subprocess.Popen[bytes]], beside: int = 0) -> None:
        self.name = name
        self.port = port
        self._processes = processes
        self._beside = processes[:beside]
        self._own = processes[beside:]

    def alive(self) -> bool:
        """Whether every process that was started still runs."""
        return all(process.poll() is None for process in self._processes)

    def cpu_s(self) -> dict[int, float]:
        """CPU seconds, user and system, by pid, of the whole tree."""
        return _cpu_s(self._own)

    def beside_cpu_s(self) -> dict[int, float]:
        """The same of what runs beside it."""
        return _cpu_s(self._beside)

    def rss_mb(self) -> dict[str, float]:
        """Resident memory (MB) by process of the tree."""
        found: dict[str, float] = {}
        for process in _tree(self._own):
            try:
                role = _role(process)
                while role in found:
                    role += "'"
                found[role] = round(process.memory_info().rss / 1e6, 1)
            except psutil.Error:
                continue
        return found

    def roles(self) -> dict[int, str]:
        """What each process of the tree is, by pid."""
        return {process.pid: _role(process) for process in _tree(self._own)}

    def stop(self) -> None:
        """End all processes, in reverse order of their start."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    for member in _tree([process]):
                        member.kill()
                    process.wait()


def spent_s(before: dict[int, float], after: dict[int, float]) -> float:
    """CPU seconds between two readings of a tree."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def _cpu_s(processes: list[subprocess.Popen[bytes]]) -> dict[int, float]:
    spent: dict[int, float] = {}
    for process in _tree(processes):
        try:
            # The CPU clock of another process, clock_getcpuclockid(3): utime + stime of all its threads.
            spent[process.pid] = time.clock_gettime(~process.pid << 3 | 2)
        except OSError:
            continue
    return spent


def _tree(processes: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    members: list[psutil.Process] = []
    for process in processes:
        try:
            root = psutil.Process(process.pid)
            members += [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return members


def _role(process: psutil.Process) -> str:
    words = process.cmdline()
    module = words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name if words else process.name()
    return {"router": "launcher", "router.relay": "relay", "router.agent": "agent"}.get(module, module.split(":")[0])


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(name: str, workers: list[int], folder: Path) -> Proxy:
    """Start the proxy ``name`` (``PRODUCT`` or ``PRODUCT:POLICY``) in front of ``workers``. Raises ProxyError."""
    product, _, policy = name.partition(":")
    folder = folder / name.replace(":", "-")
    folder.mkdir(parents=True)
    urls = [f"http://127.0.0.1:{port}" for port in workers]
    if product == "twofold":
        return _twofold(name, urls, folder)
    if product == "nginx":
        return _nginx(name, urls, folder)
    if product in ("vllm-router", "sglang-router"):
        return _rust_router(name, product, policy, urls, folder)
    raise ProxyError(f"unknown peer {product!r}")


def _install(product: str) -> str:
    script = subprocess.run(
        [ROOT / "scripts" / "install_peer.sh", product], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
    )
    if script.returncode:
        raise ProxyError(f"{product} cannot be installed (status {script.returncode}); see above")
    return script.stdout.decode().strip().splitlines()[-1]


def _run(arguments: list[str], folder: Path, log: str = "log") -> subprocess.Popen[bytes]:
    with (folder / log).open("wb") as output:
        return subprocess.Popen(
            arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=os.environ
        )


def _await_ready(proxy: Proxy, folder: Path, ready: Callable[[], bool]) -> Proxy:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and proxy.alive():
        try:
            if ready():
                return proxy
        except (urllib.error.URLError, OSError, ValueError):
            pass
        time.sleep(0.1)
    proxy.stop()
    tail = b" ".join((folder / "log").read_bytes().split()[-30:]).decode("utf-8", "replace")
    raise ProxyError(f"{proxy.name} does not start: {tail}")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=2) as reply:
        data: bytes = reply.read()
        return data


def _twofold(name: str, urls: list[str], folder: Path) -> Proxy:
    """A replica with one relay under a control plane that probes the workers, everything at its defaults."""
    rpc, port, admin = (free_port() for _ in range(3))
    fleet = {
        "name": "bench",
        "control_plane": {"listen": f"127.0.0.1:{rpc}", "metrics": f"127.0.0.1:{free_port()}"},
        "routers": {"replicas": 1, "relays": 1, "port": port, "admin_port": admin},
        "pools": [{"name": "pool", "models": [MODEL], "workers": [{"profile": _PROFILE, "urls": urls}]}],
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet))
    control = _run(
        [
            sys.executable,
            "-m",
            "controlplane",
            "--fleet",
            str(path),
            "--run-dir",
            str(folder / "run"),
            "--memory-store",
        ],
        folder,
        "control-plane.log",
    )
    replica = _run(
        [
            *(sys.executable, "-m", "router", "--control-plane", f"127.0.0.1:{rpc}"),
            *("--port", str(port), "--admin-port", str(admin), "--run-dir", str(folder / "run")),
        ],
        folder,
    )
    proxy = Proxy(name, port, [control, replica], beside=1)

    def ready() -> bool:
        return bool(json.loads(_get(f"http://127.0.0.1:{admin}/debug/state")).get("usable_targets", 0) >= len(urls))

    return _await_ready(proxy, folder, ready)


_NGINX = """\
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 1000000;
    client_max_body_size 32m;
    client_body_buffer_size 256k;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream workers {{
        {servers}
        keepalive 1024;
        keepalive_requests 1000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://workers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def _nginx(name: str, urls: list[str], folder: Path) -> Proxy:
    """One worker process; buffering of answers off, as streams need it."""
    program = _install("nginx")
    port = free_port()
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    path = folder / "nginx.conf"
    path.write_text(_NGINX.format(folder=folder, servers=servers, port=port))
    proxy = Proxy(name, port, [_run([program, "-c", str(path), "-e", str(folder / "error.log")], folder)])
    return _await_ready(proxy, folder, lambda: bool(_get(f"http://127.0.0.1:{port}/health") is not None))


def _rust_router(name: str, product: str, policy: str, urls: list[str], folder: Path) -> Proxy:
    """vllm-router or sglang-router at its defaults, with the quietest log level short of none."""
    program = _install(product)
    port = free_port()
    arguments = [
        *(program, *(["launch"] if product == "sglang-router" else [])),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
        *("--log-level", "warn" if product == "sglang-router" else "warning"),
        *("--worker-urls", *urls),
        *(("--policy", policy) if policy else ()),
    ]
    proxy = Proxy(name, port, [_run(arguments, folder)])

    def ready() -> bool:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "ready?"}]}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=2) as reply:
            return bool(reply.status == 200)

    return _await_ready(proxy, folder, ready)
