"""The shared token: who may change things, and when plaintext is allowed at all."""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from controlplane.rpc.errors import CallError, abort

OPEN_PREFIXES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
READ_ONLY = frozenset(
    {
        "/twofold.v1.AdminService/GetFleet",
        "/twofold.v1.AdminService/ListRouters",
        "/twofold.v1.AdminService/DescribeWorker",
        "/twofold.v1.AdminService/GetPolicy",
        "/twofold.v1.AdminService/Top",
        "/twofold.v1.AutoscalerService/WatchDemand",
        "/twofold.v1.AutoscalerService/GetPlan",
    }
)
"""Calls that change nothing and reveal no more than a listener on loopback may know."""

Handler = Any


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls without ``authorization: Bearer <token>``; ``open_reads`` lets reading calls pass without."""

    def __init__(self, token: str, *, open_reads: bool) -> None:
        self._token = token.encode()
        self._open_reads = open_reads
        self.refused = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The method's own handler, or one that refuses."""
        method = handler_call_details.method
        is_open = method.startswith(OPEN_PREFIXES) or (self._open_reads and method in READ_ONLY)
        if is_open or self._has_token(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        self.refused += 1
        return _REFUSE

    def _has_token(self, metadata: Any) -> bool:
        for key, value in metadata or ():
            if key == "authorization":
                given = value.encode() if isinstance(value, str) else value
                if given[:7].lower() == b"bearer " and hmac.compare_digest(given[7:].strip(), self._token):
                    return True
        return False


async def _refuse(requests: Any, context: Any) -> None:
    await abort(context, CallError(grpc.StatusCode.UNAUTHENTICATED, "a valid token is needed for this call"))


_REFUSE = grpc.stream_stream_rpc_method_handler(_refuse)


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening_fault(host: str, *, token: str, tls: bool, mutual: bool, insecure_plaintext: bool) -> str:
    """Why a server must not listen on ``host`` like this; "" when it may."""
    if is_loopback(host):
        return ""
    if not token and not mutual:
        return f"listening on {host} needs a token (--token-file or TWOFOLD_TOKEN) or --tls-client-ca"
    if not tls and not insecure_plaintext:
        return f"listening on {host} needs TLS (--tls-cert, --tls-key); --insecure-plaintext overrides"
    return ""
