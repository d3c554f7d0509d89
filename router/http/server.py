"""What the connections of one listener share: handler, limits, remembered heads, deadlines."""

import time
from collections.abc import Callable

from router.http.connection import ClientConnection
from router.http.exchange import Handler
from router.http.known_heads import request_heads
from router.http.limits import BufferBudget, HttpLimits


class HttpServer:
    """What the connections of one listener share."""

    def __init__(
        self, handler: Handler, limits: HttpLimits, budget: BufferBudget, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.budget = budget
        self.clock = clock
        self.heads = request_heads(limits.header_count)
        self.connections: set[ClientConnection] = set()
        self.draining = False

    def __call__(self) -> "ClientConnection":
        """Protocol factory."""
        return ClientConnection(self)

    def sweep(self, now_s: float) -> None:
        """End the waits that have run out; call a few times a second."""
        late = [connection for connection in self.connections if connection.deadline_s <= now_s]
        for connection in late:
            connection.expired()

    def drain(self) -> None:
        """Close idle connections, and every other one after its present answer."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_when_idle()
