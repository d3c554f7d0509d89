"""The endpoints of vLLM's development mode: pause, sleep, abort, caches, facts about the server."""

import asyncio
import json
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emulator.server.engine import PauseMode
from emulator.server.errors import ApiError, engine_dead, error_body
from emulator.server.generation import dumps
from emulator.server.http import Exchange
from emulator.server.query import Query

if TYPE_CHECKING:
    from emulator.server.app import EngineApp

_MODES = tuple(mode.value for mode in PauseMode)
_MEMORY = frozenset({"weights", "kv_cache"})
PAUSE_SETTLES_S = 0.02
"""vLLM answers a pause this much later, so that the last outputs are out before."""


class DevRoutes:
    """Pausing and sleeping of one port's engines, and what else development mode serves."""

    def __init__(self, app: "EngineApp") -> None:
        self._app = app
        self._asleep: set[str] = set()

    def routes(self) -> dict[str, dict[str, Callable[[Exchange], None]]]:
        """Handlers by path and method."""
        return {
            "/pause": {"POST": self._pause},
            "/resume": {"POST": self._resume},
            "/is_paused": {"GET": self._is_paused},
            "/sleep": {"POST": self._sleep},
            "/wake_up": {"POST": self._wake_up},
            "/is_sleeping": {"GET": self._is_sleeping},
            "/release_kv_cache_memory": {"POST": self._release_kv_cache_memory},
            "/abort_requests": {"POST": self._abort_requests},
            "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
            "/reset_mm_cache": {"POST": _done},
            "/reset_encoder_cache": {"POST": _done},
            "/server_info": {"GET": self._server_info},
            "/get_world_size": {"GET": self._world_size},
        }

    def _pause(self, exchange: Exchange) -> None:
        query = Query(exchange)
        mode = PauseMode(query.choice("mode", "abort", _MODES))
        clear_cache = query.boolean("clear_cache", True)
        self._check_alive()

        def paused() -> None:
            loop = asyncio.get_running_loop()
            loop.call_later(PAUSE_SETTLES_S, lambda: exchange.respond(200, b'{"status":"paused"}'))

        self._app.group.pause(mode, clear_cache=clear_cache, done=paused)

    def _resume(self, exchange: Exchange) -> None:
        self._check_alive()
        self._app.group.resume()
        exchange.respond(200, b'{"status":"resumed"}')

    def _is_paused(self, exchange: Exchange) -> None:
        self._check_alive()
        exchange.respond(200, dumps({"is_paused": self._app.group.paused}))

    def _sleep(self, exchange: Exchange) -> None:
        query = Query(exchange)
        level = query.integer("level", 1, 0, 2)
        mode = PauseMode(query.choice("mode", "abort", _MODES))
        self._check_alive()
        ended = self._app.metrics.sleep_operations.begin("sleep")

        def asleep() -> None:
            ended()
            if level >= 1:
                self._asleep |= _MEMORY
            for rank in self._app.group.ranks:
                rank.metrics.sleep_level = level
            exchange.respond(200, dumps({"status": "sleeping", "level": level}))

        self._app.group.pause(mode, clear_cache=level >= 1, done=asleep)

    def _wake_up(self, exchange: Exchange) -> None:
        tags = Query(exchange).every("tags") or None
        self._check_alive()
        ended = self._app.metrics.sleep_operations.begin("wake")
        memory = None if tags is None else [tag for tag in tags if tag != "scheduling"]
        if memory is None:
            self._asleep.clear()
        elif self._asleep.issuperset(memory):
            self._asleep.difference_update(memory)
        if not self._asleep:
            self._app.group.resume()
            for rank in self._app.group.ranks:
                rank.metrics.sleep_level = None
        ended()
        exchange.respond(200, dumps({"status": "sleeping" if self._asleep else "awake", "tags": tags}))

    def _is_sleeping(self, exchange: Exchange) -> None:
        self._check_alive()
        exchange.respond(200, dumps({"is_sleeping": self._app.group.paused or bool(self._asleep)}))

    def _release_kv_cache_memory(self, exchange: Exchange) -> None:
        self._check_alive()
        group = self._app.group
        self._app.metrics.sleep_operations.begin("release_kv_cache_memory")()
        if not group.paused or group.unfinished:
            self._fail(exchange, "release_kv_cache_memory() requires a completed pause first")
        elif self._asleep:
            self._fail(exchange, "release_kv_cache_memory() requires all executor memory to be resident")
        else:
            for rank in group.ranks:
                rank.model.reset_prefix_cache(preempt=True)
                rank.metrics.sleep_level = 0
            self._asleep = {"kv_cache"}
            exchange.respond(200, b'{"status":"kv_cache_released"}')

    def _abort_requests(self, exchange: Exchange) -> None:
        try:
            body = json.loads(exchange.body)
        except ValueError:
            raise ApiError("Invalid JSON format", type_="Bad Request") from None
        if not isinstance(body, dict):
            raise ApiError("Request body must be a JSON object", type_="Bad Request")
        wanted = body.get("request_ids")
        if wanted and not isinstance(wanted, list | dict | str):
            message = f"Failed to abort requests: object of type '{type(wanted).__name__}' has no len()"
            exchange.respond(500, dumps({"error": message}))
            return
        aborted = self._app.abort_named(wanted) if wanted else self._app.abort_every()
        exchange.respond(200, dumps({"status": "aborted", "aborted": len(wanted) if wanted else aborted}))

    def _reset_prefix_cache(self, exchange: Exchange) -> None:
        query = Query(exchange)
        preempt = query.boolean("reset_running_requests", False)
        query.boolean("reset_external", False)
        self._check_alive()
        done = [rank.model.reset_prefix_cache(preempt=preempt) for rank in self._app.group.ranks]
        exchange.respond(200, dumps({"success": done[0]}))

    def _server_info(self, exchange: Exchange) -> None:
        shape = Query(exchange).choice("config_format", "text", ("text", "json"))
        config = self._config()
        text = ", ".join(f"{name}={value!r}" for name, value in config.items())
        info = {
            "vllm_config": text if shape == "text" else config,
            "vllm_env": {"VLLM_SERVER_DEV_MODE": True},
            "system_env": {"os": platform.platform(), "python_version": platform.python_version()},
        }
        exchange.respond(200, dumps(info))

    def _config(self) -> dict[str, Any]:
        settings, profile = self._app.settings, self._app.group.ranks[0].model.profile
        return {
            "model": settings.model,
            "max_seq_len": settings.max_model_len,
            "tensor_parallel_size": profile.tensor_parallel,
            "pipeline_parallel_size": profile.pipeline_parallel,
            "data_parallel_size": len(self._app.group.ranks),
            "served_model_name": settings.model,
            "enable_chunked_prefill": True,
            "profile": profile.name,
        }

    def _world_size(self, exchange: Exchange) -> None:
        include_dp = Query(exchange).boolean("include_dp", True)
        profile = self._app.group.ranks[0].model.profile
        size = profile.tensor_parallel * profile.pipeline_parallel
        exchange.respond(200, dumps({"world_size": size * (len(self._app.group.ranks) if include_dp else 1)}))

    def _check_alive(self) -> None:
        if self._app.group.dead:
            raise engine_dead()

    def _fail(self, exchange: Exchange, message: str) -> None:
        exchange.respond(500, error_body(message, "InternalServerError", None, 500), vary=False)


def _done(exchange: Exchange) -> None:
    exchange.respond(200, content_type=None)
