"""The admin port: metrics of the whole replica, readiness, a look inside, explain. For operators, not for clients."""

import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import grpc
import msgspec
from aiohttp import web
from google.protobuf.json_format import MessageToDict

from router.agent.commands import CommandError, Commands
from router.shm.control import MAX_BODY_BYTES
from router.shm.exposition import CONTENT_TYPE
from twofold.runtime import port
from twofold.v1 import router_pb2 as pb

log = logging.getLogger(__name__)

MAX_KEYS = 4096
RingKey = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{1,16}$")]

_HTTP_STATUS = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
}


class ExplainBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /explain: a past request by its id, or a request to decide on now."""

    request_id: str = ""
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = {}
    body: dict[str, Any] | None = None


class HomesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /homes: ring keys as hexadecimal text, as decisions show them."""

    pool: str
    keys: Annotated[list[RingKey], msgspec.Meta(max_length=MAX_KEYS)]


class AdminServer:
    """HTTP server on an inherited or own socket. ``ready`` gives "" or what is missing."""

    def __init__(
        self,
        *,
        metrics: Callable[[], str],
        ready: Callable[[], str],
        state: Callable[[], Mapping[str, Any]],
        commands: Commands,
        profiles: port.ProfilePort,
    ) -> None:
        self._metrics = metrics
        self._ready = ready
        self._state = state
        self._commands = commands
        app = web.Application(client_max_size=2 * MAX_BODY_BYTES, middlewares=[_quiet_errors])
        app.add_routes(
            [
                web.get("/metrics", self._get_metrics),
                web.get("/ready", self._get_ready),
                web.get("/health", self._get_health),
                web.get("/debug/state", self._get_state),
                web.get(port.PATH, profiles.get),
                web.post("/explain", self._post_explain),
                web.post("/homes", self._post_homes),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)

    async def start(self, sock: socket.socket) -> None:
        """Serve on ``sock``, which listens already or is bound."""
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()

    async def stop(self) -> None:
        """Close the port."""
        await self._runner.cleanup()

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics().encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _get_ready(self, _: web.Request) -> web.Response:
        missing = self._ready()
        if missing:
            return web.json_response({"ready": False, "missing": missing}, status=503)
        return web.json_response({"ready": True})

    async def _get_health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _get_state(self, _: web.Request) -> web.Response:
        return web.json_response(self._state())

    async def _post_explain(self, request: web.Request) -> web.Response:
        try:
            asked = msgspec.json.decode(await request.read(), type=ExplainBody)
        except msgspec.MsgspecError as error:
            return _error(400, str(error))
        if bool(asked.request_id) == (asked.body is not None):
            return _error(400, "give either request_id or body")
        if asked.request_id:
            command = pb.ExplainCommand(request_id=asked.request_id)
        else:
            hypothetical = pb.HypotheticalRequest(path=asked.path, headers=asked.headers)
            hypothetical.body = msgspec.json.encode(asked.body)
            command = pb.ExplainCommand(request=hypothetical)
        result = await self._commands.run(pb.RouterCommand(explain=command))
        if result.code:
            code = next(code for code in grpc.StatusCode if code.value[0] == result.code)
            return _error(_HTTP_STATUS.get(code, 500), result.message)
        decisions = [MessageToDict(decision, preserving_proto_field_name=True) for decision in result.decisions]
        return web.json_response({"decisions": decisions})

    async def _post_homes(self, request: web.Request) -> web.Response:
        try:
            asked = msgspec.json.decode(await request.read(), type=HomesBody)
        except msgspec.MsgspecError as error:
            return _error(400, str(error))
        found = await self._commands.homes(asked.pool, [int(key, 16) for key in asked.keys])
        relays = {
            str(relay): {"ring_version": answer.ring_version, "homes": answer.homes} for relay, answer in found.items()
        }
        return web.json_response({"replica_id": self._commands.replica_id, "relays": relays})


@web.middleware
async def _quiet_errors(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        return _error(error.status, error.reason)
    except CommandError as error:
        return _error(_HTTP_STATUS.get(error.code, 500), str(error))
    except Exception:
        log.exception("admin request failed", extra={"path": request.path})
        return _error(500, "the agent failed; see its log")
    return response


def _error(status: int, message: str) -> web.Response:
    return web.Response(
        status=status, body=json.dumps({"error": {"message": message}}).encode(), content_type="application/json"
    )
