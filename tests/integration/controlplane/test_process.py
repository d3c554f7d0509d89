"""``python -m controlplane`` as a process, with emulated engines."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from support.fleets import free_port_base

from controlplane.providers.processes import port_is_free, start_ticks
from twofold import wire
from twofold.model.fleet import FleetSnapshot
from twofold.v1 import admin_pb2, admin_pb2_grpc

from .conftest import until


class Process:
    """One control plane process after the other on the same run directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = free_port_base(16)
        self.file = directory / "fleet.yaml"
        self.write(2)
        self.process: asyncio.subprocess.Process | None = None
        self.started: list[asyncio.subprocess.Process] = []

    def write(self, replicas: int) -> None:
        """Write a fleet file with so many emulated engines."""
        group = {"profile": "h100-8b-tp1", "replicas": replicas, "port_base": self.base + 4}
        mapping = {
            "control_plane": {"listen": f"127.0.0.1:{self.base}", "metrics": f"127.0.0.1:{self.base + 1}"},
            "pools": [{"name": "p", "models": ["m"], "workers": [group]}],
        }
        self.file.write_text(yaml.safe_dump(mapping))

    async def start(self, *flags: str, **env: str) -> asyncio.subprocess.Process:
        """Start; the output goes to pipes."""
        argv = [
            sys.executable,
            "-m",
            "controlplane",
            "--fleet",
            str(self.file),
            "--run-dir",
            str(self.directory / "run"),
        ]
        argv += ["--log-file", str(self.directory / "log"), *flags]
        self.process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, **env}
        )
        self.started.append(self.process)
        return self.process

    async def snapshot(self) -> FleetSnapshot | None:
        """The fleet, when it can be had."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.base}") as channel:
            stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
            try:
                return wire.snapshot_from_proto(await stub.GetFleet(admin_pb2.GetFleetRequest(), timeout=2))
            except grpc.aio.AioRpcError:
                return None

    async def ready(self, count: int) -> FleetSnapshot:
        """Wait until so many targets take work."""

        async def enough() -> FleetSnapshot | None:
            snapshot = await self.snapshot()
            if snapshot is None or len(snapshot.targets) != count:
                return None
            return snapshot if all(target.takes_work for target in snapshot.targets) else None

        found: FleetSnapshot = await until(enough, 40)
        return found

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of a path of the metrics port."""
        url = f"http://127.0.0.1:{self.base + 1}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as reply:
            return reply.status, await reply.text()

    def engines(self) -> dict[str, int]:
        """Pids of the engines by state file."""
        files = (self.directory / "run" / "engines").glob("*.json")
        return {path.stem: int(json.loads(path.read_text())["pid"]) for path in files}

    async def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 20)


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Process]:
    """Not started yet; ended, with its engines, after the test."""
    made = Process(tmp_path)
    yield made
    for process in made.started:
        made.process = process
        await made.stop()
    for pid in made.engines().values():
        if start_ticks(pid) is not None:
            os.killpg(pid, signal.SIGKILL)


async def test_it_runs_engines_and_leaves_nothing_behind(control: Process) -> None:
    await control.start()
    snapshot = await control.ready(2)
    assert {target.facts.version for target in snapshot.targets} == {"0.32.0"}
    status, body = await control.get("/healthz")
    assert (status, json.loads(body)["fleet_file"]) == (200, "ok")
    _, metrics = await control.get("/metrics")
    assert 'twofold_controlplane_targets{health="healthy",pool="p"} 2.0' in metrics
    assert 'twofold_controlplane_workers_ready{pool="p",profile="h100-8b-tp1",zone=""} 2.0' in metrics
    pids = control.engines()
    assert len(pids) == 2
    assert await control.stop() == 0
    assert [start_ticks(pid) for pid in pids.values()] == [None, None]
    assert all(port_is_free("127.0.0.1", control.base + offset) for offset in (0, 1, 4, 5))
    lines = [json.loads(line) for line in (control.directory / "log").read_text().splitlines()]
    assert not [line for line in lines if line["level"] == "error"]


async def test_killed_it_leaves_the_engines_serving_and_the_next_one_adopts_them(control: Process) -> None:
    first = await control.start()
    before = await control.ready(2)
    pids = control.engines()
    first.kill()
    await first.communicate()
    async with aiohttp.ClientSession() as session, session.get(f"{before.targets[0].url}/health") as reply:
        assert reply.status == 200
    await control.start()
    after = await control.ready(2)
    assert control.engines() == pids
    assert after.epoch > before.epoch
    assert [target.incarnation for target in after.targets] == [target.incarnation for target in before.targets]
    assert await control.stop() == 0
    assert [start_ticks(pid) for pid in pids.values()] == [None, None]


async def test_sighup_takes_a_changed_file_over(control: Process) -> None:
    process = await control.start()
    await control.ready(2)
    pids = control.engines()
    control.write(3)
    process.send_signal(signal.SIGHUP)
    await control.ready(3)
    assert pids.items() <= control.engines().items()
    control.file.write_text("pools: {")
    process.send_signal(signal.SIGHUP)

    async def told() -> bool:
        return "fleet.yaml:1" in (await control.get("/healthz"))[1]

    await until(told)
    assert len((await control.ready(3)).targets) == 3


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--listen", "0.0.0.0:0"], "needs a token"),
        (["--listen", "nowhere"], "--listen 'nowhere' is not host:port"),
        (["--fleet", "/nonexistent.yaml"], "cannot read /nonexistent.yaml"),
        (["--token-file", "/nonexistent"], "cannot read the token file /nonexistent"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key belong together"),
        (["--log-level", "loud"], "unknown log level"),
    ],
)
async def test_bad_settings_are_one_line_and_exit_2(control: Process, flags: list[str], text: str) -> None:
    process = await control.start(*flags)
    out, error = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 2
    assert error.decode().startswith("controlplane: error: ")
    assert text in error.decode()
    assert error.count(b"\n") == 1
    assert out == b""


async def test_plaintext_beyond_loopback_is_refused_even_with_a_token(control: Process) -> None:
    process = await control.start("--listen", "0.0.0.0:0", TWOFOLD_TOKEN="t")
    _, error = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, b"needs TLS" in error) == (2, True)


async def test_a_second_one_on_the_same_run_directory_touches_nothing(control: Process) -> None:
    await control.start()
    await control.ready(2)
    pids = control.engines()
    second = await control.start("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    _, error = await asyncio.wait_for(second.communicate(), 20)
    assert second.returncode == 1
    assert b"another control plane runs in" in error
    assert control.engines() == pids


async def test_a_port_in_use_is_one_line_and_exit_1(control: Process) -> None:
    await control.start()
    await control.ready(2)
    second = await control.start("--run-dir", str(control.directory / "other"))
    _, error = await asyncio.wait_for(second.communicate(), 20)
    assert second.returncode == 1
    assert error.decode().startswith("controlplane: error: cannot listen on 127.0.0.1:")


async def test_mutual_tls(control: Process, tmp_path: Path) -> None:
    """With a client authority the server refuses clients without a certificate of it; others need no token."""
    ca, ca_key = _certificate("ca", None, None)
    server, server_key = _certificate("127.0.0.1", ca, ca_key)
    client, client_key = _certificate("client", ca, ca_key)
    files = {"ca": ca, "cert": server, "key": server_key}
    for name, pem in files.items():
        (tmp_path / name).write_bytes(pem)
    paths = {name: str(tmp_path / name) for name in files}
    await control.start("--tls-cert", paths["cert"], "--tls-key", paths["key"], "--tls-client-ca", paths["ca"])
    request = admin_pb2.GetFleetRequest()
    good = grpc.ssl_channel_credentials(ca, client_key, client)
    async with grpc.aio.secure_channel(f"127.0.0.1:{control.base}", good) as channel:
        stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
        await stub.GetFleet(request, timeout=20, wait_for_ready=True)
    async with grpc.aio.secure_channel(f"127.0.0.1:{control.base}", grpc.ssl_channel_credentials(ca)) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetFleet(request, timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def _certificate(name: str, issuer: bytes | None, issuer_key: bytes | None) -> tuple[bytes, bytes]:
    """PEM certificate and key for a name or address, signed by an issuer or by itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer: Any = key if issuer_key is None else serialization.load_pem_private_key(issuer_key, None)
    issued_by = subject if issuer is None else x509.load_pem_x509_certificate(issuer).subject
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issued_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if name[0].isdigit():
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))])
        builder = builder.add_extension(address, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private
