"""The scale-out endpoints: generate by ids, abort, render and derender. Without their flag they all answer 403."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emulator.server import chat, completions, derender, derender_checks, generate, render
from emulator.server.anthropic import parse_messages
from emulator.server.errors import ApiError
from emulator.server.generate import GenerateGeneration
from emulator.server.generation import dumps
from emulator.server.http import Exchange
from emulator.server.responses import parse_responses
from emulator.server.settings import EngineSettings
from emulator.server.validation import Body, read_body

if TYPE_CHECKING:
    from emulator.server.app import EngineApp

Handler = Callable[[Exchange], None]


class ScaleOutRoutes:
    """What ``--enable-scale-out`` serves on one port."""

    def __init__(self, app: "EngineApp") -> None:
        self._app = app

    def routes(self) -> dict[str, dict[str, Handler]]:
        """Handlers by path and method."""
        handlers: dict[str, Handler] = {
            "/inference/v1/generate": self._generate,
            "/inference/v1/abort_requests": self._abort_requests,
            "/v1/chat/completions/render": self._render_chat,
            "/v1/completions/render": self._render_completions,
            "/v1/messages/render": self._render_messages,
            "/v1/responses/render": self._render_responses,
            "/v1/chat/completions/derender": self._derender_chat,
            "/v1/completions/derender": self._derender_completions,
        }
        if not self._app.settings.scale_out:
            return {path: {"POST": _disabled} for path in handlers}
        return {path: {"POST": handler} for path, handler in handlers.items()}

    def _generate(self, exchange: Exchange) -> None:
        app = self._app
        if app.answered_by_fault(exchange):
            return
        body = read_body(exchange)
        generate.validate(body)
        app.check_model(body)
        app.check_engine(body["sampling_params"].get("n"))
        call = generate.parse(body, app.settings, app.priority(exchange, body))
        response_id = f"generate-tokens-{app.request_id(exchange, body)}"
        mode = body.get("output_mode", "tokens")
        app.admit(exchange, body, GenerateGeneration, call, response_id, output_mode=mode)

    def _abort_requests(self, exchange: Exchange) -> None:
        try:
            body = json.loads(exchange.body)
        except ValueError as error:
            raise ApiError(f"JSON decode error: {error}", type_="Bad Request") from None
        wanted = body.get("request_ids") if isinstance(body, dict) else None
        if not isinstance(wanted, list):
            raise ApiError("Missing 'request_ids' in request body", type_="Bad Request")
        self._app.abort_named(wanted)
        exchange.respond(200, content_type=None)

    def _render_chat(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        chat.validate(body)
        self._app.check_model(body)
        self._render_converted(exchange, body, body, "chatcmpl-")

    def _render_messages(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        converted = parse_messages(body)
        self._app.check_model(body)
        self._render_converted(exchange, body, converted, "chatcmpl-")

    def _render_responses(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        converted = parse_responses(body)
        self._app.check_model(body)
        self._render_converted(exchange, body, converted, "resp_", extra_args={})

    def _render_converted(self, exchange: Exchange, body: Body, converted: Body, prefix: str, **sampling: Any) -> None:
        app = self._app
        call = chat.parse(converted, app.settings, app.priority(exchange, body))
        request_id = prefix + app.request_id(exchange, body)
        answer = render.rendered(call, converted, 0, request_id)
        answer["sampling_params"] |= sampling
        exchange.respond(200, dumps(answer))

    def _render_completions(self, exchange: Exchange) -> None:
        app = self._app
        body = read_body(exchange)
        completions.validate(body)
        app.check_model(body)
        call = completions.parse(body, app.settings, app.priority(exchange, body))
        request_id = "cmpl-" + app.request_id(exchange, body)
        several = len(call.prompts) > 1
        answer = [
            render.rendered(call, body, place, f"{request_id}-{place}" if several else request_id)
            for place in range(len(call.prompts))
        ]
        exchange.respond(200, dumps(answer))

    def _derender_chat(self, exchange: Exchange) -> None:
        names = ("generate_response", "body.DerenderChatRequest", "DerenderChatStreamRequest")
        self._derender(exchange, names, derender.chat)

    def _derender_completions(self, exchange: Exchange) -> None:
        # The whole answer's checks make vLLM forget its name for it.
        names = ("generate_responses", "body", "DerenderCompletionStreamRequest")
        self._derender(exchange, names, derender.completions)

    def _derender(
        self, exchange: Exchange, names: tuple[str, str, str], answer: Callable[[Body, EngineSettings], Any]
    ) -> None:
        body = read_body(exchange)
        derender_checks.validate(body, *names)
        self._app.check_model(body)
        exchange.respond(200, dumps(answer(body, self._app.settings)))


def _disabled(exchange: Exchange) -> None:
    message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
    raise ApiError(message, status=403, type_="PermissionDeniedError")
