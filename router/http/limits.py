"""Bounds on what a client may make the router hold or wait for."""

import msgspec


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one client-facing HTTP server; sizes in bytes, times in seconds."""

    head_bytes: int = 32_768
    header_count: int = 100
    body_bytes: int = 33_554_432
    connections: int = 20_000
    pipelined_bytes: int = 65_536
    """Bytes of further requests kept while one is being answered; beyond it the connection closes after the answer."""
    buffered_bytes: int = 536_870_912
    """Request bodies and held responses of all connections together."""
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    keep_alive_s: float = 75.0
    linger_s: float = 2.0
    """How long an early answered connection goes on discarding input, so that the client can read the answer."""


class BufferBudget:
    """A bound on bytes held at once by everything that shares the budget."""

    __slots__ = ("held_bytes", "limit_bytes", "refused")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.refused = 0
        """Times that ``take`` said no."""

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes; False (and nothing reserved) when that would pass the limit."""
        if self.held_bytes + size > self.limit_bytes:
            self.refused += 1
            return False
        self.held_bytes += size
        return True

    def give(self, size: int) -> None:
        """Return bytes taken earlier."""
        self.held_bytes -= size
