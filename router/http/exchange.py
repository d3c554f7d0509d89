"""What the HTTP server and whoever answers requests say to each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from router.http.errors import REASON_HEADER, ErrorStyle, error_body
from router.http.head import HttpError, RequestHead
from twofold.model.reasons import RejectReason

if TYPE_CHECKING:
    from router.http.connection import ClientConnection

Header = tuple[bytes, bytes]
_JSON: Header = (b"content-type", b"application/json")


class Request(msgspec.Struct, frozen=True):
    """A complete request. ``arrival_s`` is the monotonic time at which its head was read."""

    head: RequestHead
    body: bytes
    arrival_s: float


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole response made by the router itself."""

    status: int
    body: bytes
    headers: Sequence[Header] = ()


class ClientExchange(Protocol):
    """What answers one request; told what happens on the client's side."""

    def client_gone(self) -> None:
        """The client is no longer there."""

    def client_paused(self) -> None:
        """The client reads slower than it is written to: write no more than what is under way."""

    def client_resumed(self) -> None:
        """Write on."""


class Handler(Protocol):
    """What the server does with requests."""

    def precheck(self, head: RequestHead) -> Reply | None:
        """An answer that needs no body (unknown path, wrong method); None to read the body."""

    def handle(self, connection: "ClientConnection", request: Request) -> ClientExchange | None:
        """Answer ``request`` on ``connection``, now (None) or over time (the exchange)."""

    def rejected(self, error: HttpError, head: RequestHead | None) -> Reply:
        """The answer to a request that never became one."""

    def limit_hit(self, limit: str) -> None:
        """A bound was reached that ends in no answer of its own; to be counted."""


def reject_reply(
    style: ErrorStyle,
    status: int,
    reason: RejectReason,
    message: str,
    *,
    param: str | None = None,
    headers: Sequence[Header] = (),
) -> Reply:
    """An error made by the router, with its reason header."""
    return Reply(
        status=status,
        body=error_body(style, status, message, param),
        headers=(_JSON, (REASON_HEADER, reason.value.encode()), *headers),
    )
