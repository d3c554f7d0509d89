"""The link to the control plane on its own: rotation, silence, gaps, TLS."""

import asyncio
import datetime
import ipaddress
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from router.agent import link as link_module
from router.agent.link import ControlPlaneLink, Credentials
from twofold import wire
from twofold.model.fleet import FleetSnapshot
from twofold.v1 import fleet_pb2, fleet_pb2_grpc

from .fakes import FakeControlPlane, fleet, target, until


class Watcher:
    """A link that collects what it is given."""

    def __init__(self, *addresses: str, credentials: Credentials | None = None, **timeouts: float) -> None:
        self.snapshots: list[FleetSnapshot] = []
        self.beside = 0
        self.link = ControlPlaneLink(
            "r0",
            addresses,
            credentials or Credentials(),
            connect_timeout_s=timeouts.get("connect_timeout_s", 5.0),
            silence_timeout_s=timeouts.get("silence_timeout_s", 15.0),
            on_snapshot=self.snapshots.append,
            beside=self._beside,
            rng=random.Random(1),
        )

    async def _beside(self, channel: grpc.aio.Channel) -> None:
        self.beside += 1
        await asyncio.Event().wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Watcher"]:
        task = asyncio.create_task(self.link.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def last(self) -> FleetSnapshot | None:
        return self.snapshots[-1] if self.snapshots else None


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def test_a_dead_address_is_passed_over(control_plane: FakeControlPlane) -> None:
    await control_plane.set(fleet(target("t-0")))
    dead = f"127.0.0.1:{unused_port()}"
    async with Watcher(dead, control_plane.address, connect_timeout_s=60.0).running() as watcher:
        await until(lambda: watcher.last, "a snapshot from the second address")
        assert watcher.link.address == control_plane.address
        assert watcher.link.connected


async def test_an_address_that_takes_connections_and_says_nothing_is_given_up(control_plane: FakeControlPlane) -> None:
    await control_plane.set(fleet(target("t-0")))
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the kernel accepts, nobody ever reads
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        async with Watcher(address, control_plane.address, connect_timeout_s=0.5).running() as watcher:
            await until(lambda: watcher.last, "a snapshot from the second address")


async def test_a_silent_watch_is_opened_again_where_it_was(control_plane: FakeControlPlane) -> None:
    await control_plane.set(fleet(target("t-0"), epoch=4, version=7))
    async with Watcher(control_plane.address, silence_timeout_s=0.3).running() as watcher:
        await until(lambda: len(control_plane.watches) >= 3, "the watch is opened again")
        assert control_plane.watches[:2] == [(0, 0), (4, 7)]
        assert watcher.link.reconnects >= 2


class Scripted(fleet_pb2_grpc.FleetServiceServicer):
    """Answers each watch with the next list of messages."""

    def __init__(self, *answers: list[fleet_pb2.WatchResponse]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[int, int]] = []

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[fleet_pb2.WatchResponse]:
        self.asked.append((request.epoch, request.version))
        for message in self.answers.pop(0) if self.answers else []:
            yield message
        if not self.answers:
            await asyncio.Event().wait()


@asynccontextmanager
async def serving(scripted: Scripted) -> AsyncIterator[str]:
    server = grpc.aio.server()
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def full(snapshot: FleetSnapshot) -> fleet_pb2.WatchResponse:
    return fleet_pb2.WatchResponse(snapshot=wire.snapshot_to_proto(snapshot))


@pytest.mark.parametrize(
    "broken",
    [
        fleet_pb2.WatchResponse(delta=fleet_pb2.FleetDelta(epoch=1, base_version=5, version=6)),
        fleet_pb2.WatchResponse(delta=fleet_pb2.FleetDelta(epoch=2, base_version=1, version=2)),
        fleet_pb2.WatchResponse(
            delta=fleet_pb2.FleetDelta(epoch=1, base_version=1, version=2, upserted_targets=[fleet_pb2.Target()])
        ),
        fleet_pb2.WatchResponse(snapshot=fleet_pb2.FleetSnapshot(epoch=1, version=2, pools=[fleet_pb2.Pool()])),
    ],
    ids=["gap", "other-epoch", "bad-target", "bad-pool"],
)
async def test_a_message_that_makes_no_sense_leads_to_a_full_snapshot(broken: fleet_pb2.WatchResponse) -> None:
    first, second = fleet(target("t-0")), fleet(target("t-0"), target("t-1"), version=9)
    scripted = Scripted([full(first), broken], [full(second)])
    async with serving(scripted) as address, Watcher(address).running() as watcher:
        await until(lambda: watcher.last == second, "the repaired snapshot")
        assert watcher.snapshots == [first, second], "a broken message was taken"
        assert scripted.asked == [(0, 0), (0, 0)]


async def test_a_delta_before_any_snapshot_and_empty_messages_do_no_harm() -> None:
    delta = fleet_pb2.WatchResponse(delta=fleet_pb2.FleetDelta(epoch=1, base_version=1, version=2))
    good = fleet(target("t-0"))
    scripted = Scripted([delta], [fleet_pb2.WatchResponse(), full(good), fleet_pb2.WatchResponse()])
    async with serving(scripted) as address, Watcher(address).running() as watcher:
        await until(lambda: watcher.last == good, "the snapshot")


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "twofold test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


async def test_mutual_tls(tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path)
    scripted = Scripted([full(fleet(target("t-0")))])
    server = grpc.aio.server()
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(scripted, server)
    tls = grpc.ssl_server_credentials(
        [(key_file.read_bytes(), cert_file.read_bytes())], cert_file.read_bytes(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", tls)
    await server.start()
    address = f"127.0.0.1:{port}"
    files = {"ca_file": str(cert_file), "cert_file": str(cert_file), "key_file": str(key_file)}
    try:
        for refused in (Credentials(), Credentials(ca_file=str(cert_file))):
            async with Watcher(address, credentials=refused).running() as watcher:
                await until(lambda watcher=watcher: watcher.link.reconnects > 1, "refused")
                assert not watcher.snapshots
        async with Watcher(address, credentials=Credentials("token", **files)).running() as watcher:
            await until(lambda: watcher.last, "a snapshot over TLS")
    finally:
        await server.stop(0)


def test_certificate_and_key_go_together(tmp_path: Path) -> None:
    cert_file, _ = certificate(tmp_path)
    with pytest.raises(ValueError, match="go together"):
        Credentials(cert_file=str(cert_file))
    with pytest.raises(OSError):
        Credentials(ca_file=str(tmp_path / "nothing"))


async def test_a_cancellation_that_nobody_asked_for_ends_neither_the_watch_nor_what_runs_beside(
    control_plane: FakeControlPlane,
) -> None:
    await control_plane.set(fleet(target("t-0")))
    watcher = Watcher(control_plane.address)
    taken = 0

    def take(snapshot: FleetSnapshot) -> None:
        nonlocal taken
        taken += 1
        if taken == 1:
            raise asyncio.CancelledError  # as gRPC does for a call that was cancelled below

    async def beside(channel: grpc.aio.Channel) -> None:
        watcher.beside += 1
        if watcher.beside <= 3:
            raise asyncio.CancelledError
        await asyncio.Event().wait()

    watcher.link._on_snapshot = take
    watcher.link._beside = beside
    async with watcher.running():
        await until(lambda: taken == 1 and watcher.link.reconnects == 1, "the watch ends and begins anew")
        await until(lambda: watcher.link.connected and watcher.beside == 4, "both run again")


async def test_what_runs_beside_cannot_hold_the_link_by_not_ending(
    control_plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "END_TIMEOUT_S", 0.1)
    await control_plane.set(fleet(target("t-0")))
    watcher = Watcher(control_plane.address)
    release = asyncio.Event()
    begun = 0

    async def beside(channel: grpc.aio.Channel) -> None:
        nonlocal begun
        begun += 1
        while begun == 1 and not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue  # as a call does that swallows its cancellation

    def take(snapshot: FleetSnapshot) -> None:
        watcher.snapshots.append(snapshot)
        if len(watcher.snapshots) == 1:
            raise wire.WireError("to be read again")

    watcher.link._beside = beside
    watcher.link._on_snapshot = take
    async with watcher.running():
        await until(lambda: len(watcher.snapshots) >= 2, "the watch begins anew")
        release.set()
