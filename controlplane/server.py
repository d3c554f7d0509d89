"""The gRPC server: services, health, reflection, token, TLS and limits."""

import logging
import socket
from pathlib import Path
from typing import Any

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controlplane.app import ControlPlane
from controlplane.rpc.auth import TokenInterceptor, is_loopback
from controlplane.rpc.handlers import service_handler
from controlplane.services.admin import AdminService
from controlplane.services.autoscaler import AutoscalerService
from controlplane.services.fleet import FleetService
from controlplane.services.router import RouterService
from twofold.v1 import admin_pb2, autoscaler_pb2, fleet_pb2, router_pb2

log = logging.getLogger(__name__)

MAX_RECEIVE_BYTES = 4 << 20
# A hypothetical request carries up to 4 MiB of body beside its other fields.
MAX_ADMIN_RECEIVE_BYTES = MAX_RECEIVE_BYTES + (64 << 10)
MAX_SEND_BYTES = 64 << 20
MAX_CONCURRENT_CALLS = 4096
STOP_GRACE_S = 1.0

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_ADMIN_RECEIVE_BYTES),
    ("grpc.max_send_message_length", MAX_SEND_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 5),
    ("grpc.max_metadata_size", 16_384),
    ("grpc.so_reuseport", 0),
]


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files; ``client_ca`` makes clients show certificates of that authority."""

    cert: str
    key: str
    client_ca: str = ""


class ListenError(RuntimeError):
    """The server cannot listen; the message is one line."""


class Server:
    """Serves a ControlPlane over gRPC."""

    def __init__(self, control_plane: ControlPlane, *, token: str, tls: TlsFiles | None = None) -> None:
        self._control_plane = control_plane
        self._token = token
        self._tls = tls
        self._server: grpc.aio.Server | None = None
        self._health: Any = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen on host:port; ``port`` 0 picks a free one, see ``self.port``. Raises ListenError."""
        interceptors: list[grpc.aio.ServerInterceptor] = []  # type: ignore[type-arg]
        if self._token:
            interceptors.append(TokenInterceptor(self._token, open_reads=is_loopback(host)))
        server = grpc.aio.server(
            interceptors=interceptors, options=_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS
        )
        services = {
            fleet_pb2.DESCRIPTOR.services_by_name["FleetService"]: FleetService(self._control_plane),
            router_pb2.DESCRIPTOR.services_by_name["RouterService"]: RouterService(self._control_plane),
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"]: AdminService(self._control_plane),
            autoscaler_pb2.DESCRIPTOR.services_by_name["AutoscalerService"]: AutoscalerService(self._control_plane),
        }
        server.add_generic_rpc_handlers(tuple(service_handler(d, servicer) for d, servicer in services.items()))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [descriptor.full_name for descriptor in services]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        _check_port(host, port, address)
        try:
            if self._tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, _credentials(self._tls))
        except (RuntimeError, OSError) as error:
            raise ListenError(f"cannot listen on {address}: {str(error).splitlines()[0][:200]}") from None
        if self.port == 0:
            raise ListenError(f"cannot listen on {address}")
        await server.start()
        self._server = server
        for name in ["", *names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", extra={"address": address, "port": self.port, "tls": self._tls is not None})

    async def stop(self) -> None:
        """Tell clients, end streams, refuse calls."""
        if self._server is not None and self._health is not None:
            await self._health.enter_graceful_shutdown()
            self._control_plane.hub.close()
            await self._server.stop(STOP_GRACE_S)
            self._server = None


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    try:
        key, cert = Path(tls.key).read_bytes(), Path(tls.cert).read_bytes()
        client_ca = Path(tls.client_ca).read_bytes() if tls.client_ca else None
    except OSError as error:
        raise ListenError(f"cannot read {error.filename}: {error.strerror}") from None
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _check_port(host: str, port: int, address: str) -> None:
    """Raises ListenError when the port is taken; gRPC itself would write to stderr past our log before it says so."""
    if port == 0:
        return
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, location in infos:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(location)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror}") from None
