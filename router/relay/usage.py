"""How full the bounded things of a relay are, and what they had to let go: read once a second into its counters."""

import socket
import struct

from router.relay.context import RelayContext
from router.shm.counters import CounterSlab
from router.telemetry.runtime import Flow

_TCP_INFO_BYTES = 64
_QUEUE = struct.Struct("=24xII")
"""tcpi_unacked and tcpi_sacked: of a listening socket, connections that wait to be accepted and the most that may."""


class RelayUsage:
    """Figures of one relay. ``listener`` is its listening socket, None where it has none of its own."""

    def __init__(self, slab: CounterSlab, context: RelayContext, listener: socket.socket | None) -> None:
        self._slab = slab
        self._context = context
        self._listener = listener
        gauge, counter = slab.gauge, slab.counter
        self._accept_queue = gauge("twofold_accept_queue", "Connections that wait to be accepted").cell()
        self._buffered = gauge("twofold_buffered_bytes", "Request bodies and held responses in memory").cell()
        self._paused = gauge("twofold_paused_streams", "Responses that wait for a client to read").cell()
        upstream = gauge("twofold_upstream_connections", "Connections to workers without a request", ("state",))
        self._idle, self._connecting = upstream.cell("idle"), upstream.cell("connecting")
        self._retry_tokens = gauge("twofold_retry_tokens", "Retries that may be made at once").cell()
        self._decisions = gauge("twofold_decisions_kept", "Decisions remembered for explain").cell()
        self._popularity = gauge("twofold_popularity_entries", "Prefixes whose popularity is counted").cell()
        bounds = gauge("twofold_bound", "Bounds of all relays together, by name as in limit hits", ("limit",))
        self._backlog = bounds.cell("accept_queue")
        settings = context.settings
        for limit, bound in (
            ("connections", settings.max_connections),
            ("requests", settings.max_requests),
            ("buffered_bytes", settings.max_buffered_bytes),
            ("decisions", settings.decisions_kept),
            ("retry_budget", settings.retry_burst),
        ):
            slab.set(bounds.cell(limit), bound)

        def flow(name: str, text: str) -> Flow:
            return Flow(slab, counter(name, text).cell())

        self._connects = flow("twofold_upstream_connects_total", "Connections to workers opened or tried")
        self._forgotten = flow("twofold_decisions_forgotten_total", "Decisions that made room for later ones")
        self._rescans = flow("twofold_dirty_log_rescans_total", "Times a log of changed slots had moved on too far")
        self._evictions = flow("twofold_prefix_evictions_total", "Entries of prefix tables that made room for others")
        self._generations = flow(
            "twofold_popularity_generations_total", "Times that old popularity counts were dropped"
        )
        hits = counter("twofold_limit_hits_total", "Times that a bound of a relay was reached, by bound", ("limit",))
        self._no_buffer = Flow(slab, hits.cell("buffered_bytes"))
        self._no_connect = Flow(slab, hits.cell("concurrent_connects"))
        self._surplus = Flow(slab, hits.cell("worker_connections"))

    def flush(self) -> None:
        """Bring the figures up to now."""
        context, put = self._context, self._slab.set
        usage = context.fleet.live.usage()
        counts = context.upstream.counts
        waiting, backlog = self._accepting()
        idle, connecting = context.upstream.sizes()
        put(self._accept_queue, waiting)
        put(self._buffered, context.budget.held_bytes)
        put(self._paused, sum(exchange.paused for exchange in context.exchanges))
        put(self._idle, idle)
        put(self._connecting, connecting)
        put(self._retry_tokens, context.retries.tokens)
        put(self._decisions, len(context.decisions))
        put(self._popularity, usage.popularity_entries)
        put(self._backlog, backlog)
        self._connects.to(counts.opened)
        self._forgotten.to(context.decisions.forgotten)
        self._rescans.to(usage.dirty_rescans)
        self._evictions.to(usage.prefix_evictions)
        self._generations.to(usage.popularity_generations)
        self._no_buffer.to(context.budget.refused)
        self._no_connect.to(counts.refused)
        self._surplus.to(counts.surplus)

    def _accepting(self) -> tuple[int, int]:
        """(connections that wait to be accepted, the most that may); zeros where the system does not tell."""
        if self._listener is None:
            return 0, 0
        try:
            info = self._listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            return 0, 0
        if len(info) < _QUEUE.size:
            return 0, 0
        waiting, most = _QUEUE.unpack_from(info)
        return waiting, most
