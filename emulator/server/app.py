"""The HTTP surface of one engine: its routes, and what each answers."""

import logging
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

from emulator import tokens
from emulator.server import chat, completions
from emulator.server.anthropic import MessagesGeneration, parse_messages
from emulator.server.chat import ChatGeneration
from emulator.server.completions import CompletionGeneration
from emulator.server.dev import DevRoutes
from emulator.server.elastic import SCALING, ElasticScaling, ElasticSettings
from emulator.server.engine import RealTimeEngine
from emulator.server.errors import SHUT_DOWN_MESSAGE, ApiError, engine_dead, error_body, validation_error
from emulator.server.generate import GenerateGeneration
from emulator.server.generation import DONE_EVENT, Call, Generation, dumps, new_id
from emulator.server.group import EngineGroup, Lane
from emulator.server.http import Exchange, HttpConnection
from emulator.server.lora import Adapters
from emulator.server.page import PortMetrics
from emulator.server.responses import ResponsesGeneration, parse_responses
from emulator.server.scale_out import ScaleOutRoutes
from emulator.server.settings import EngineSettings
from emulator.server.validation import Body, convert_fields, finding, read_body

log = logging.getLogger(__name__)

VERSION = "0.32.0"
Handler = Callable[[Exchange], None]


class EngineApp:
    """Answers the requests of one port; the ``Listener`` of its connections.

    ``make_rank`` builds one more engine, for elastic EP; ``ranks_left`` is told of engines that are no longer served.
    """

    def __init__(
        self,
        group: EngineGroup,
        settings: EngineSettings,
        metrics: PortMetrics,
        *,
        elastic: ElasticSettings | None = None,
        make_rank: Callable[[int], RealTimeEngine] | None = None,
    ) -> None:
        self.group = group
        self.settings = settings
        self.metrics = metrics
        self.connections: set[HttpConnection] = set()
        self.black_hole = False
        self.closing = False
        self.draining = False
        self.on_connection_closed: Callable[[], None] = lambda: None
        self.ranks_left: Callable[[list[RealTimeEngine]], None] = lambda ranks: None
        self.event_sources: Callable[[], dict[str, Any]] = dict
        """What ``/kv_event_sources`` shows: the publisher's configuration of each rank."""
        self.active = 0
        self.requests_seen = 0
        self.adapters = Adapters(settings.model, dict(settings.lora_modules))
        self.elastic = ElasticScaling(self, elastic or ElasticSettings(), make_rank or _no_more)
        self._generations: set[Generation] = set()
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": lambda exchange: exchange.respond(200, dumps({"version": VERSION}))},
            "/load": {"GET": lambda exchange: exchange.respond(200, dumps({"server_load": self.active}))},
            "/metrics": {"GET": self._metrics},
            "/kv_event_sources": {"GET": lambda exchange: exchange.respond(200, dumps(self.event_sources()))},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/messages": {"POST": self._messages},
            "/v1/messages/count_tokens": {"POST": self._count_tokens},
            "/v1/responses": {"POST": self._responses},
            **ScaleOutRoutes(self).routes(),
            **self.elastic.routes(),
        }
        if settings.enable_lora:
            self._routes |= self.adapters.routes()
        if settings.dev_mode:
            self._routes |= DevRoutes(self).routes()

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, now or later. No exception leaves this."""
        self.requests_seen += 1
        if self.elastic.committing:
            exchange.respond(503, SCALING, vary=False)
            return
        try:
            self._dispatch(exchange)
        except ApiError as error:
            exchange.respond(error.status, error.body(), vary=not error.unforeseen)
        except Exception:
            log.exception("request failed", extra={"path": exchange.path})
            exchange.respond(500, error_body("Internal server error", "InternalServerError", None, 500))

    def connection_closed(self) -> None:
        """A connection has gone."""
        self.on_connection_closed()

    def _dispatch(self, exchange: Exchange) -> None:
        path = exchange.path
        template = "/v1/responses/{response_id}" if path.startswith("/v1/responses/") else path
        route = self._routes.get(path)
        self._measure(exchange, template if route is not None or template != path else "none")
        if exchange.preflight():
            return
        if route is None:
            if template != path and exchange.method == "GET":
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

    def _measure(self, exchange: Exchange, handler: str) -> None:
        figures = self.metrics.http
        began_s, request_bytes = figures.clock(), len(exchange.body)

        def ended(exchange: Exchange) -> None:
            sizes = (request_bytes, exchange.response_bytes)
            figures.observe(handler, exchange.method, exchange.status or 500, began_s, sizes)

        exchange.on_end = ended

    def _health(self, exchange: Exchange) -> None:
        exchange.respond(503 if self.group.dead else 200, content_type=None)

    def _metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, self.metrics.render(), b"text/plain; version=1.0.0; charset=utf-8")

    def _models(self, exchange: Exchange) -> None:
        settings = self.settings
        cards = [model_card(settings.model, settings.model, None, settings.max_model_len)]
        cards += [model_card(adapter.name, adapter.path, settings.model, None) for adapter in self.adapters.every()]
        exchange.respond(200, dumps({"object": "list", "data": cards}))

    def _tokenize(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        self.check_model(body)
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
        self.check_model(body)
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            kind = "missing" if ids is None else "list_type"
            raise validation_error([finding(kind, "body.tokens", body if ids is None else ids)])
        if ids:
            completions.check_vocabulary(ids)
        exchange.respond(200, dumps({"prompt": tokens.decode(ids)}))

    def _completions(self, exchange: Exchange) -> None:
        if self.answered_by_fault(exchange):
            return
        body = read_body(exchange)
        completions.validate(body)
        self.check_model(body)
        self.check_engine(body.get("n"))
        call = completions.parse(body, self.settings, self.priority(exchange, body))
        echo_only = call.echo and body.get("max_tokens") == 0
        response_id = f"cmpl-{self.request_id(exchange, body)}"
        self.admit(exchange, body, CompletionGeneration, call, response_id, echo_only=echo_only)

    def _chat(self, exchange: Exchange) -> None:
        if self.answered_by_fault(exchange):
            return
        body = read_body(exchange)
        chat.validate(body)
        self.check_model(body)
        self.check_engine(body.get("n"))
        call = chat.parse(body, self.settings, self.priority(exchange, body))
        response_id = f"chatcmpl-{self.request_id(exchange, body)}"
        self.admit(exchange, body, ChatGeneration, call, response_id)

    def _messages(self, exchange: Exchange) -> None:
        if self.answered_by_fault(exchange):
            return
        body = read_body(exchange)
        converted = parse_messages(body)
        if not self._knows(body.get("model")):
            error = self._unknown_model(body["model"])
            anthropic = {"type": "error", "error": {"type": error.type, "message": error.message}}
            exchange.respond(error.status, dumps(anthropic))
            return
        self.check_engine()
        call = chat.parse(converted, self.settings, self.priority(exchange, body))
        self.admit(exchange, body, MessagesGeneration, call, f"chatcmpl-{self.request_id(exchange, body)}")

    def _count_tokens(self, exchange: Exchange) -> None:
        body = read_body(exchange)
        ids = chat.prompt_ids(parse_messages({"max_tokens": 1, **body}), self.settings.model)
        context = {"original_input_tokens": len(ids)}
        exchange.respond(200, dumps({"input_tokens": len(ids), "context_management": context}))

    def _responses(self, exchange: Exchange) -> None:
        if self.answered_by_fault(exchange):
            return
        body = read_body(exchange)
        converted = parse_responses(body)
        self.check_model(body)
        self.check_engine()
        call = chat.parse(converted, self.settings, self.priority(exchange, body))
        self.admit(exchange, body, ResponsesGeneration, call, f"resp_{self.request_id(exchange, body)}")

    def _missing_response(self, exchange: Exchange) -> None:
        response_id = exchange.path.removeprefix("/v1/responses/")
        message = f"Response with id '{response_id}' not found."
        exchange.respond(404, error_body(message, "invalid_request_error", "response_id", 404))

    def abort_named(self, wanted: Collection[str]) -> int:
        """End the requests with these ids, as vLLM calls them; returns how many sequences that were."""
        aborted = 0
        for generation in list(self._generations):
            for choice in generation.choices:
                names = (generation.response_id, f"{generation.response_id}-{choice.prompt_index}")
                by_prompt = isinstance(generation, CompletionGeneration)
                if names[by_prompt] in wanted:
                    aborted += generation.engine.abort(choice.engine_id)
        return aborted

    def abort_every(self) -> int:
        """End all requests; returns how many sequences that were."""
        choices = [(generation, choice) for generation in self._generations for choice in generation.choices]
        return sum(generation.engine.abort(choice.engine_id) for generation, choice in choices)

    def admit(
        self, exchange: Exchange, body: Body, kind: type[Generation], call: Call, response_id: str, **options: Any
    ) -> None:
        """Run a call as ``kind``, or refuse it: the last step of every generation endpoint. Raises ApiError."""
        lane = self._lane(exchange, body)
        if self.draining:
            late = kind in (CompletionGeneration, GenerateGeneration)  # they fail once their stream has begun
            self._refuse_while_draining(exchange, stream=call.stream and late)
            return
        self._run(kind(exchange, lane, call, response_id=response_id, model=self._served_name(body), **options))

    def _run(self, generation: Generation) -> None:
        self.active += 1
        self._generations.add(generation)

        def ended() -> None:
            self.active -= 1
            self._generations.discard(generation)

        generation.on_end = ended
        generation.start()

    def _refuse_while_draining(self, exchange: Exchange, stream: bool) -> None:
        if stream:
            self.group.ranks[0].metrics.finished["abort"] += 1  # the engine core turns the request away
            exchange.start_stream()
            exchange.end_stream(exchange.frame(DONE_EVENT))
        else:
            exchange.respond(500, error_body(SHUT_DOWN_MESSAGE, "InternalServerError", None, 500), vary=False)

    def answered_by_fault(self, exchange: Exchange) -> bool:
        """Whether a planted fault has answered the request."""
        status = self.group.ranks[0].faults.take_status()
        if status:
            exchange.respond(status, error_body("injected fault", "InternalServerError", None, status))
        return bool(status)

    def _knows(self, model: Any) -> bool:
        return not model or model == self.settings.model or self.adapters.get(model) is not None

    def _served_name(self, body: Body) -> str:
        adapter = self.adapters.get(body.get("model"))
        return self.settings.model if adapter is None else adapter.name

    def check_engine(self, n: int | None = None) -> None:
        """Raises ApiError where the engine is dead or takes no call of ``n`` sequences."""
        if self.group.dead:
            raise engine_dead()
        self.group.check_admission(n or 1)

    def _lane(self, exchange: Exchange, body: Body) -> Lane:
        return Lane(self.group, self._rank(exchange), self.adapters.get(body.get("model")))

    def check_model(self, body: Body) -> None:
        """Raises ApiError for a model that is not served."""
        findings = convert_fields(body, {"model": "str"})
        if findings:
            raise validation_error(findings)
        if not self._knows(body.get("model")):
            raise self._unknown_model(body["model"])

    def _unknown_model(self, model: str) -> ApiError:
        message = f"The model `{model}` does not exist. Valid aliases: {self.settings.model}."
        return ApiError(message, status=404, type_="NotFoundError", param="model")

    def _rank(self, exchange: Exchange) -> int | None:
        rank = exchange.header(b"x-data-parallel-rank")
        if rank is None:
            return None
        try:
            number = int(rank)
        except ValueError:
            return None
        size = len(self.group.ranks)
        if not 0 <= number < size:
            raise ApiError(f"data_parallel_rank {number} is out of range [0, {size}).")
        return number

    def priority(self, exchange: Exchange, body: Body) -> int:
        """The priority of a request: of its header, else of its body."""
        header = exchange.header(b"x-vllm-priority")
        if header is not None:
            try:
                return int(header)
            except ValueError:
                pass
        return body.get("priority") or 0

    def request_id(self, exchange: Exchange, body: Body) -> str:
        """The id of a request: of its header, else of its body, else a new one."""
        return exchange.header(b"x-request-id") or str(body.get("request_id") or new_id())


def model_card(name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    """An entry of ``/v1/models``."""
    created = int(time.time())
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
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }


def _no_more(index: int) -> RealTimeEngine:
    raise ValueError(f"there is no rank {index}")
