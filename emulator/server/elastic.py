"""Elastic expert parallelism: ``POST /scale_elastic_ep``, in the steps of vLLM's ``core_client.py``.

Prepare: serving goes on while new ranks load, or survivors regroup. Growing then starts all counters anew. From here
on every path answers 503, ``/health`` and ``/metrics`` too. With draining on, wait until no request is left. Commit:
survivors freeze, ranks that leave end their requests with "abort"; then all goes on. A commit that fails leaves the
503 for good: vLLM 0.32 does not take the flag back. Without elastic EP a change of size is a 500.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from emulator.server.engine import PauseMode, RealTimeEngine
from emulator.server.errors import ApiError, error_body
from emulator.server.generation import dumps
from emulator.server.http import Exchange
from emulator.server.validation import read_body

if TYPE_CHECKING:
    from emulator.server.app import EngineApp

log = logging.getLogger(__name__)

SCALING = b'{"error":"The model is currently scaling. Please try again later."}'
DRAIN_POLL_S = 1.0
SCALING_STEPS = ("prepare", "commit")


class ElasticSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a change of size goes. Times in seconds of the wall clock.

    ``experts`` and ``redundant_experts``: logical and redundant ones at the first size; 0 experts: no lower limit.
    """

    enabled: bool = False
    max_size: int = 1
    prepare_s: float = 0.0
    commit_s: float = 0.0
    drain: bool = False
    experts: int = 0
    redundant_experts: int = 0


class ScaleFailed(Exception):
    """A step went wrong inside; the client sees 500 "Scale failed"."""


class ElasticScaling:
    """Changes of the number of ranks behind one port. ``make_rank`` builds one more, with the index it will have."""

    def __init__(self, app: "EngineApp", settings: ElasticSettings, make_rank: Callable[[int], RealTimeEngine]) -> None:
        self.committing = False
        """While true, every path of the port answers 503."""
        self.fail_next = ""
        """Fault: "prepare" or "commit" makes that step of the next change fail."""
        self._app = app
        self._settings = settings
        self._make_rank = make_rank
        self._redundant = settings.redundant_experts
        self._prepared: tuple[int, int] | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def routes(self) -> dict[str, dict[str, Callable[[Exchange], None]]]:
        """Handlers by path and method."""
        return {
            "/scale_elastic_ep": {"POST": self._handle},
            "/is_scaling_elastic_ep": {"POST": lambda exchange: exchange.respond(200, self._flag())},
        }

    def _flag(self) -> bytes:
        return bytes(dumps({"is_scaling_elastic_ep": self.committing}))

    def _handle(self, exchange: Exchange) -> None:
        size, timeout = _parse(exchange)
        task = asyncio.get_running_loop().create_task(self._answer(exchange, size, timeout))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, exchange: Exchange, size: int, timeout: int) -> None:
        try:
            async with self._lock:
                await self._scale(size, timeout)
        except TimeoutError:
            message = f"Scale failed due to request drain timeout after {timeout} seconds"
            exchange.respond(408, error_body(message, "Request Timeout", None, 408))
        except ValueError as error:
            exchange.respond(400, error_body(str(error), "Bad Request", None, 400))
        except (ScaleFailed, OSError) as error:  # OSError: a new rank's port for KV events is taken
            log.warning("scaling failed", extra={"reason": str(error)})
            exchange.respond(500, error_body("Scale failed", "Internal Server Error", None, 500))
        else:
            exchange.respond(200, dumps({"message": f"Scaled to {size} data parallel engines"}))

    async def _scale(self, size: int, timeout: int) -> None:
        group = self._app.group
        old = len(group.ranks)
        if size == old:
            return
        await self._prepare(size)
        if size > old:
            for engine in self._app.metrics.engines:
                engine.reset()
        self.committing = True
        if self._settings.drain:
            await self._drain(timeout)
        await self._commit(size)
        self.committing = False
        log.info("scaled", extra={"ranks": size})

    async def _prepare(self, size: int) -> None:
        settings, old = self._settings, len(self._app.group.ranks)
        if self._prepared is not None:
            if self._prepared[0] == size:
                return
            raise ScaleFailed("Elastic EP scaling is already prepared")
        if not settings.enabled:
            raise ScaleFailed("elastic EP is not enabled")
        if size > settings.max_size:
            raise ValueError(
                f"Cannot scale to data_parallel_size {size}; --elastic-ep-max-dp-size is {settings.max_size}."
            )
        physical = settings.experts + self._redundant
        redundant = physical * size // old - settings.experts
        if redundant < 0:
            lowest = -(-settings.experts * old // physical)
            raise ValueError(f"Cannot scale to data_parallel_size {size}, minimum is {lowest}")
        await asyncio.sleep(settings.prepare_s)
        self._fail_if("prepare")
        self._prepared = (size, redundant)

    async def _drain(self, timeout: int) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout
        while self._app.group.unfinished:
            if loop.time() >= deadline_s:
                self.committing = False
                raise TimeoutError
            await asyncio.sleep(min(DRAIN_POLL_S, deadline_s - loop.time()))

    async def _commit(self, size: int) -> None:
        group = self._app.group
        leaving = group.ranks[size:]
        del group.ranks[size:]
        self._app.ranks_left(leaving)
        idle = asyncio.Event()
        waiting = len(group.ranks) + len(leaving)

        def one_idle() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                idle.set()

        for rank in list(group.ranks):
            rank.pause(PauseMode.KEEP, clear_cache=False, done=one_idle)
        for rank in leaving:
            rank.pause(PauseMode.ABORT, clear_cache=False, done=one_idle)
        await idle.wait()
        await asyncio.sleep(self._settings.commit_s)
        self._fail_if("commit")
        for rank in leaving:
            rank.stop()
        for index in range(len(group.ranks), size):
            group.ranks.append(self._make_rank(index))
        if self._prepared is not None:
            self._redundant = self._prepared[1]
        self._prepared = None
        group.resume()

    def _fail_if(self, step: str) -> None:
        if self.fail_next == step:
            self.fail_next = ""
            raise ScaleFailed(f"fault: {step}")


def _parse(exchange: Exchange) -> tuple[int, int]:
    """(new size, drain timeout). Raises ApiError."""
    body = _body(exchange)
    size, timeout = body.get("new_data_parallel_size"), body.get("drain_timeout", 120)
    if size is None:
        raise ApiError("new_data_parallel_size is required", type_="Bad Request")
    for name, value in (("new_data_parallel_size", size), ("drain_timeout", timeout)):
        if not isinstance(value, int) or value <= 0:
            raise ApiError(f"{name} must be a positive integer", type_="Bad Request")
    return size, timeout


def _body(exchange: Exchange) -> dict[str, Any]:
    try:
        body = json.loads(exchange.body)
    except ValueError:
        raise ApiError("Invalid JSON format", type_="Bad Request") from None
    return body if isinstance(body, dict) else read_body(exchange)
