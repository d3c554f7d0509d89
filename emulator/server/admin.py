"""The admin port: statistics, and faults where they are enabled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from emulator.server.errors import error_body
from emulator.server.exposition import Histogram
from emulator.server.faults import FaultError, FaultRequest
from emulator.server.http import Exchange, HttpConnection

if TYPE_CHECKING:
    from emulator.server.engine import RealTimeEngine
    from emulator.server.host import EngineHost

log = logging.getLogger(__name__)


class AdminApp:
    """``GET /stats`` and ``/kv``; with faults enabled also ``GET|POST|DELETE /faults`` and ``POST /reset``."""

    def __init__(self, hosts: list[EngineHost], *, faults_allowed: bool) -> None:
        self.connections: set[HttpConnection] = set()
        self.black_hole = False
        self.closing = False
        self._hosts = hosts
        self._faults_allowed = faults_allowed
        self._process = psutil.Process()
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_closed(self) -> None:
        """Nothing to do."""

    def handle(self, exchange: Exchange) -> None:
        """Answer a request."""
        route = (exchange.method, exchange.path)
        if route == ("GET", "/stats"):
            exchange.respond(200, msgspec.json.encode(self.stats()))
        elif route == ("GET", "/kv"):
            exchange.respond(200, msgspec.json.encode([cached_blocks(host) for host in self._hosts]))
        elif exchange.path not in ("/faults", "/reset"):
            exchange.respond(404, b'{"detail":"Not Found"}')
        elif not self._faults_allowed:
            _refuse(exchange, 403, "faults are not enabled; start with --enable-fault-injection")
        elif route == ("GET", "/faults"):
            exchange.respond(200, msgspec.json.encode(self._described()))
        elif route == ("POST", "/faults"):
            self._run(exchange, self._add(exchange))
        elif route == ("DELETE", "/faults"):
            self._run(exchange, self._clear())
        elif route == ("POST", "/reset"):
            for host in self._hosts:
                host.reset()
            exchange.respond(200, b"{}")
        else:
            exchange.respond(405, b'{"detail":"Method Not Allowed"}')

    def stats(self) -> dict[str, Any]:
        """Figures of the process and of each engine."""
        memory = self._process.memory_info()
        return {
            "rss_bytes": memory.rss,
            "cpu_s": time.process_time(),
            "engines": [engine_stats(host) for host in self._hosts],
        }

    def _described(self) -> list[dict[str, Any]]:
        return [
            {"engine": host.index, **({"rank": rank} if rank else {}), **engine.faults.describe()}
            for host in self._hosts
            for rank, engine in enumerate(host.group.ranks)
        ]

    async def _add(self, exchange: Exchange) -> None:
        request = msgspec.json.decode(exchange.body, type=FaultRequest)
        if not 0 <= request.engine < len(self._hosts):
            raise FaultError(f"there is no engine {request.engine}")
        await self._hosts[request.engine].apply_fault(request)
        log.warning("fault injected", extra={"kind": request.kind, "engine": request.engine})

    async def _clear(self) -> None:
        for host in self._hosts:
            await host.clear_faults()

    def _run(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(exchange, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (FaultError, msgspec.DecodeError) as error:
            _refuse(exchange, 400, str(error))
        except OSError as error:
            _refuse(exchange, 500, f"cannot listen again: {error.strerror}")
        else:
            exchange.respond(200, msgspec.json.encode(self._described()))


def engine_stats(host: EngineHost) -> dict[str, Any]:
    """Figures of one port: those of its first rank, and with several ranks those of each under "ranks"."""
    ranks = [rank_stats(engine) for engine in host.group.ranks]
    found = {
        "engine": host.index,
        "port": host.port,
        "profile": host.profile.name,
        "dead": host.group.dead,
        "requests": host.app.requests_seen,
        **ranks[0],
    }
    return found if len(ranks) == 1 else {**found, "ranks": ranks}


def rank_stats(engine: RealTimeEngine) -> dict[str, Any]:
    """Figures of one engine. Lateness quantiles are upper bounds of histogram buckets."""
    metrics, load = engine.metrics, engine.metrics.load
    return {
        "running": load.running,
        "waiting": load.waiting,
        "kv_usage": load.kv_usage,
        **msgspec.structs.asdict(engine.model.counters),
        "steps_resynced": engine.steps_resynced,
        "lateness_s": _quantiles(metrics.lateness_s),
        "lateness_ratio": _quantiles(metrics.lateness_ratio),
        "faults": engine.faults.describe(),
    }


def cached_blocks(host: EngineHost) -> list[dict[str, Any]]:
    """What the prefix cache of each rank of one port holds: physical copies by block hash, as its KV events tell."""
    sequences = host.kv_events.next_sequences()
    return [
        {
            "rank": rank,
            "next_sequence": sequences.get(rank, 0),
            "block_size_tokens": engine.model.profile.block_size_tokens,
            "copies": engine.model.pool.cached_copies(),
        }
        for rank, engine in enumerate(host.group.ranks)
    ]


def _quantiles(histogram: Histogram) -> dict[str, float]:
    return {"p50": histogram.quantile(0.5), "p99": histogram.quantile(0.99)}


def _refuse(exchange: Exchange, status: int, message: str) -> None:
    exchange.respond(status, error_body(message, "AdminError", None, status))
