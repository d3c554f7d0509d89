"""The HTTP surface of one engine: its routes, and what each answers."""

import json
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from emulator import tokens
from emulator.server import chat, completions
from emulator.server.anthropic import MessagesGeneration, parse_messages
from emulator.server.chat import ChatGeneration
from emulator.server.completions import CompletionGeneration
from emulator.server.engine import RealTimeEngine
from emulator.server.errors import SHUT_DOWN_MESSAGE, ApiError, engine_dead, error_body, validation_error
from emulator.server.generation import DONE_EVENT, Call, Generation, dumps, new_id
from emulator.server.http import Exchange, HttpConnection
from emulator.server.responses import ResponsesGeneration, parse_responses
from emulator.server.settings import EngineSettings
from emulator.server.validation import Body, convert_fields, finding, read_body

log = logging.getLogger(__name__)

VERSION = "0.32.0"
Handler = Callable[[Exchange], None]


class EngineApp:
    """Answers the requests of one engine; the ``Listener`` of its connections."""

    def __init__(self, engine: RealTimeEngine, settings: EngineSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.connections: set[HttpConnection] = set()
        self.black_hole = False
        self.closing = False
        self.draining = False
        self.on_connection_closed: Callable[[], None] = lambda: None
        self.active = 0
        self.requests_seen = 0
        self._started_s = int(time.time())
        self._generations: set[Generation] = set()
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": lambda exchange: exchange.respond(200, dumps({"version": VERSION}))},
            "/load": {"GET": lambda exchange: exchange.respond(200, dumps({"server_load": self.active}))},
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/messages": {"POST": self._messages},
            "/v1/messages/count_tokens": {"POST": self._count_tokens},
            "/v1/responses": {"POST": self._responses},
            "/is_scaling_elastic_ep": {"POST": self._is_scaling},
        }
        if settings.dev_mode:
            self._routes["/reset_prefix_cache"] = {"POST": self._reset_prefix_cache}
        if settings.scale_out:
            self._routes["/inference/v1/abort_requests"] = {"POST": self._abort_requests}

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, now or later. No exception leaves this."""
        self.requests_seen += 1
        try:
            self._dispatch(exchange)
        except ApiError as error:
            exchange.respond(error.status, error.body())
        except Exception:
            log.exception("request failed", extra={"path": exchange.path})
            exchange.respond(500, error_body("Internal server error", "InternalServerError", None, 500))

    def connection_closed(self) -> None:
        """A connection has gone."""
        self.on_connection_closed()

    def _dispatch(self, exchange: Exchange) -> None:
        route = self._routes.get(exchange.path)
        if route is None:
            if exchange.path.startswith("/v1/responses/") and exchange.method == "GET":
                self._missing_response(exchange)
                return
            exchange.respond(404, b'{"detail":"Not Found"}')
            return
        handler = route.get(exchange.method)
        if handler is None:
            allow = ", ".join(sorted(route)).encode()
            exchange.respond(405, b'{"detail":"Method Not Allowed"}', allow=allow)
            return
        handler(exchange)

    def _health(self, exchange: Exchange) -> None:
        exchange.respond(503 if self.engine.dead else 200, content_type=None)

    def _metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, self.engine.metrics.render(), b"text/plain; version=1.0.0; charset=utf-8")

    def _models(self, exchange: Exchange) -> None:
        settings, created = self.settings, int(time.time())
        permission = {
            "id": f"modelperm-{secrets.token_hex(8)}",
            "object": "model_permission",
            "created": created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        card = {
            "id": settings.model,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": settings.model,
            "parent": None,
            "max_model_len": settings.max_model_len,
            "permission": [permission],
        }
        exchange.respond(200, dumps({"object": "list", "data": [card]}))

    def _tokenize(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        self._check_model(body)
        if "messages" in body:
            if not isinstance(body["messages"], list):
                raise validation_error([finding("list_type", "body.messages", body["messages"])])
            ids = chat.prompt_ids(body, self.settings.model)
        else:
            if not isinstance(body.get("prompt"), str):
                kind = "missing" if body.get("prompt") is None else "string_type"
                raise validation_error([finding(kind, "body.prompt", body if kind == "missing" else body["prompt"])])
            ids = tokens.encode(body["prompt"])
        pieces = [tokens.decode([token]) for token in ids] if body.get("return_token_strs") else None
        answer = {
            "count": len(ids),
            "max_model_len": self.settings.max_model_len,
            "tokens": ids,
            "token_strs": pieces,
        }
        exchange.respond(200, dumps(answer))

    def _detokenize(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        self._check_model(body)
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            kind = "missing" if ids is None else "list_type"
            raise validation_error([finding(kind, "body.tokens", body if ids is None else ids)])
        if ids:
            completions.check_vocabulary(ids)
        exchange.respond(200, dumps({"prompt": tokens.decode(ids)}))

    def _completions(self, exchange: Exchange) -> None:
        if self._answered_by_fault(exchange):
            return
        body = read_body(exchange)
        completions.validate(body)
        self._check_model(body)
        call = completions.parse(body, self.settings, self._priority(exchange, body))
        self._check_rank(exchange)
        if self.draining:
            self._refuse_while_draining(exchange, call.stream)
            return
        echo_only = call.echo and body.get("max_tokens") == 0
        response_id = f"cmpl-{self._request_id(exchange, body)}"
        self._run(
            CompletionGeneration(
                exchange, self.engine, call, response_id=response_id, model=self.settings.model, echo_only=echo_only
            )
        )

    def _chat(self, exchange: Exchange) -> None:
        if self._answered_by_fault(exchange):
            return
        body = read_body(exchange)
        chat.validate(body)
        self._check_model(body)
        call = chat.parse(body, self.settings, self._priority(exchange, body))
        response_id = f"chatcmpl-{self._request_id(exchange, body)}"
        self._admit(exchange, ChatGeneration, call, response_id)

    def _messages(self, exchange: Exchange) -> None:
        if self._answered_by_fault(exchange):
            return
        body = read_body(exchange)
        converted = parse_messages(body)
        if not self._knows(body.get("model")):
            error = self._unknown_model(body["model"])
            anthropic = {"type": "error", "error": {"type": error.type, "message": error.message}}
            exchange.respond(error.status, dumps(anthropic))
            return
        call = chat.parse(converted, self.settings, self._priority(exchange, body))
        self._admit(exchange, MessagesGeneration, call, f"chatcmpl-{self._request_id(exchange, body)}")

    def _count_tokens(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        ids = chat.prompt_ids(parse_messages({"max_tokens": 1, **body}), self.settings.model)
        context = {"original_input_tokens": len(ids)}
        exchange.respond(200, dumps({"input_tokens": len(ids), "context_management": context}))

    def _responses(self, exchange: Exchange) -> None:
        if self._answered_by_fault(exchange):
            return
        body = read_body(exchange)
        converted = parse_responses(body)
        self._check_model(body)
        call = chat.parse(converted, self.settings, self._priority(exchange, body))
        self._admit(exchange, ResponsesGeneration, call, f"resp_{self._request_id(exchange, body)}")

    def _missing_response(self, exchange: Exchange) -> None:
        response_id = exchange.path.removeprefix("/v1/responses/")
        message = f"Response with id '{response_id}' not found."
        exchange.respond(404, error_body(message, "invalid_request_error", "response_id", 404))

    def _is_scaling(self, exchange: Exchange) -> None:
        exchange.respond(200, b'{"is_scaling_elastic_ep":false}')

    def _reset_prefix_cache(self, exchange: Exchange) -> None:
        done = self.engine.model.reset_prefix_cache()
        exchange.respond(200, dumps({"success": done}))

    def _abort_requests(self, exchange: Exchange) -> None:
        try:
            body = json.loads(exchange.body)
        except ValueError as error:
            raise ApiError(f"JSON decode error: {error}", type_="Bad Request") from None
        wanted = body.get("request_ids") if isinstance(body, dict) else None
        if not isinstance(wanted, list):
            raise ApiError("Missing 'request_ids' in request body", type_="Bad Request")
        for generation in list(self._generations):
            for choice in generation.choices:
                names = (generation.response_id, f"{generation.response_id}-{choice.prompt_index}")
                by_prompt = isinstance(generation, CompletionGeneration)
                if names[by_prompt] in wanted:
                    self.engine.abort(choice.engine_id)
        exchange.respond(200, content_type=None)

    def _admit(self, exchange: Exchange, kind: type[Generation], call: Call, response_id: str) -> None:
        self._check_rank(exchange)
        if self.draining:
            self._refuse_while_draining(exchange, stream=False)
            return
        self._run(kind(exchange, self.engine, call, response_id=response_id, model=self.settings.model))

    def _run(self, generation: Generation) -> None:
        if self.engine.dead:
            raise engine_dead()
        self.active += 1
        self._generations.add(generation)

        def ended() -> None:
            self.active -= 1
            self._generations.discard(generation)

        generation.on_end = ended
        generation.start()

    def _refuse_while_draining(self, exchange: Exchange, stream: bool) -> None:
        if stream:
            exchange.start_stream()
            exchange.end_stream(exchange.frame(DONE_EVENT))
        else:
            exchange.respond(500, error_body(SHUT_DOWN_MESSAGE, "InternalServerError", None, 500), vary=False)

    def _answered_by_fault(self, exchange: Exchange) -> bool:
        status = self.engine.faults.take_status()
        if status:
            exchange.respond(status, error_body("injected fault", "InternalServerError", None, status))
        return bool(status)

    def _knows(self, model: Any) -> bool:
        return model is None or model == self.settings.model

    def _check_model(self, body: Body) -> None:
        findings = convert_fields(body, {"model": "str"})
        if findings:
            raise validation_error(findings)
        if not self._knows(body.get("model")):
            raise self._unknown_model(body["model"])

    def _unknown_model(self, model: str) -> ApiError:
        message = f"The model `{model}` does not exist. Valid aliases: {self.settings.model}."
        return ApiError(message, status=404, type_="NotFoundError", param="model")

    def _check_rank(self, exchange: Exchange) -> None:
        rank = exchange.header(b"x-data-parallel-rank")
        if rank is None:
            return
        try:
            number = int(rank)
        except ValueError:
            return
        if number != 0:
            raise ApiError(f"data_parallel_rank {number} is out of range [0, 1).")

    def _priority(self, exchange: Exchange, body: Body) -> int:
        header = exchange.header(b"x-vllm-priority")
        if header is not None:
            try:
                return int(header)
            except ValueError:
                pass
        return body.get("priority") or 0

    def _request_id(self, exchange: Exchange, body: Body) -> str:
        return exchange.header(b"x-request-id") or str(body.get("request_id") or new_id())
