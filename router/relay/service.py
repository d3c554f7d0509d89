"""What the relay answers: the path table, the endpoints of its own, and the way of a routed request to its exchange."""

import logging
import os
from collections.abc import Callable, Mapping

import msgspec

from router.http.connection import ClientConnection
from router.http.errors import ErrorStyle
from router.http.exchange import ClientExchange, Header, Reply, Request, reject_reply
from router.http.head import HttpError, RequestHead
from router.relay.context import RelayContext
from router.relay.exchange import Exchange
from router.relay.splice import replace_model
from router.routing.features import PATHS, parse_request, to_features
from router.routing.types import BadRequest, Endpoint, ParsedRequest, RequestFeatures, Resolved
from router.shm.control import ExplainedDecision
from router.tokens.exact import Preparation
from twofold.model.reasons import RejectReason

log = logging.getLogger(__name__)

_JSON: Header = (b"content-type", b"application/json")
NO_POOL = ""
"""Pool label of requests that never got as far as a pool."""
_MODELS = b"/v1/models"


class RelayService:
    """Handler of a relay's HTTP server.

    ``version`` is what ``/version`` says; ``sequence_offset`` keeps relays from moving in step under round robin.
    """

    def __init__(self, context: RelayContext, *, version: str, sequence_offset: int = 0) -> None:
        self._context = context
        self._version = version
        self._sequence = sequence_offset
        self._id_prefix = os.urandom(8).hex().encode()
        self._ids = 0
        self.draining = False
        self._local: dict[bytes, Callable[[RequestHead], Reply]] = {
            _MODELS: self._models,
            b"/health": self._health,
            b"/ready": self._ready,
            b"/version": self._show_version,
            b"/ping": self._health,
        }

    # -- Handler

    def precheck(self, head: RequestHead) -> Reply | None:
        """See Handler."""
        path = head.path
        context = self._context
        if path in PATHS and head.method == b"POST" and len(context.exchanges) < context.settings.max_requests:
            return None
        local = path in self._local or path.startswith(_MODELS + b"/")
        if not local and path not in PATHS:
            return self._reject(head, 404, RejectReason.NOT_FOUND, "no such path")
        methods = b"GET, HEAD, OPTIONS" if local else b"POST, OPTIONS"
        if head.method == b"OPTIONS":
            return Reply(status=204, body=b"", headers=((b"allow", methods),))
        if head.method not in ((b"GET", b"HEAD") if local else (b"POST",)):
            return self._reject(
                head, 405, RejectReason.METHOD_NOT_ALLOWED, "method not allowed", headers=((b"allow", methods),)
            )
        if not local and len(self._context.exchanges) >= self._context.settings.max_requests:
            self.limit_hit("requests")
            return self._reject(
                head,
                429,
                RejectReason.SATURATED,
                "the router has too many requests in progress",
                headers=((b"retry-after", b"1"),),
            )
        return None

    def handle(self, connection: ClientConnection, request: Request) -> ClientExchange | None:
        """See Handler."""
        try:
            return self._handle(connection, request)
        except Exception:
            log.exception("request failed inside the router")
            connection.reply(self._reject(request.head, 500, RejectReason.INTERNAL, "internal error of the router"))
            return None

    def rejected(self, error: HttpError, head: RequestHead | None) -> Reply:
        """See Handler."""
        if error.limit:
            self.limit_hit(error.limit)
        headers = ((b"retry-after", b"1"),) if error.status in (429, 503) else ()
        return self._reject(head, error.status, error.reason, error.message, headers=headers)

    def limit_hit(self, limit: str) -> None:
        """See Handler."""
        self._context.metrics.limit_hit(limit)

    # -- routed requests

    def _handle(self, connection: ClientConnection, request: Request) -> ClientExchange | None:
        head = request.head
        endpoint = PATHS.get(head.path)
        if endpoint is None:
            connection.reply(self._answer_locally(head))
            return None
        context = self._context
        started_s = context.clock()
        request_id = head.request_id or self._new_id()
        try:
            features, resolved, parsed = self._features(
                endpoint, head.fields, request.body, request_id, request.arrival_s
            )
        except BadRequest as error:
            headers: tuple[Header, ...] = ((b"x-request-id", request_id),)
            if error.status == 503:
                headers += ((b"retry-after", b"1"),)
            connection.reply(
                self._reject(head, error.status, error.reason, error.message, param=error.param, headers=headers)
            )
            return None
        prepared = context.exact.prepare(features, parsed, resolved, request.body) if context.exact else features
        later = prepared if isinstance(prepared, Preparation) else None
        exchange = Exchange(
            context,
            connection,
            head=head,
            body=_upstream_body(request.body, parsed, resolved),
            endpoint=endpoint,
            style=style_of(head),
            request_id=request_id,
            features=features if isinstance(prepared, Preparation) else prepared,
        )
        try:
            if later is None:
                exchange.start(started_s)
            else:
                exchange.start_after(later)
        except Exception:
            exchange.abandon()
            raise
        return exchange

    def explain(self, path: str, headers: Mapping[str, str], body: bytes) -> ExplainedDecision:
        """The decision on a request that is not sent. Raises BadRequest."""
        endpoint = PATHS.get(path.partition("?")[0].encode("utf-8", "replace"))
        if endpoint is None:
            raise BadRequest(f"{path[:128]!r} is not a routed path", param="path")
        fields = {
            name.lower().encode("utf-8", "replace"): value.encode("utf-8", "replace") for name, value in headers.items()
        }
        context = self._context
        now_s = context.clock()
        features, resolved, parsed = self._features(endpoint, fields, body, b"explain", now_s)
        features = context.exact.prepare_now(features, parsed, resolved, body)
        return ExplainedDecision.of(
            context.fleet.live.decide(features, now_s),
            at_s=context.wall_clock(),
            snapshot_epoch=context.fleet.epoch,
            snapshot_version=context.fleet.version,
        )

    def _features(
        self,
        endpoint: Endpoint,
        headers: Mapping[bytes, bytes],
        body: bytes,
        request_id: bytes,
        arrival_s: float,
    ) -> tuple[RequestFeatures, Resolved, ParsedRequest]:
        """Facts of a request and where its model lives. Raises BadRequest."""
        parsed = parse_request(endpoint, headers, body)
        fleet = self._context.fleet
        if not fleet.installed:
            raise BadRequest("the router has no view of the fleet yet", status=503, reason=RejectReason.NO_ENDPOINTS)
        resolved = fleet.live.resolve(parsed.model)
        if resolved is None:
            if not parsed.model:
                raise BadRequest("model is required", param="model")
            raise BadRequest(
                f"The model `{parsed.model[:128]}` does not exist.",
                status=404,
                param="model",
                reason=RejectReason.MODEL_NOT_FOUND,
            )
        self._sequence += 1
        features = to_features(
            parsed,
            resolved,
            request_id=request_id.decode("ascii"),
            sequence=self._sequence,
            arrival_s=arrival_s,
        )
        return features, resolved, parsed

    def _new_id(self) -> bytes:
        self._ids += 1
        return b"%b%08x" % (self._id_prefix, self._ids)

    def _reject(
        self,
        head: RequestHead | None,
        status: int,
        reason: RejectReason,
        message: str,
        *,
        param: str | None = None,
        headers: tuple[Header, ...] = (),
    ) -> Reply:
        """An error of the router's own for a request that has no exchange; counted here."""
        self._context.metrics.reject(reason.value, status)
        self._context.metrics.request(NO_POOL, status)
        return reject_reply(style_of(head), status, reason, message, param=param, headers=headers)

    # -- own endpoints

    def _answer_locally(self, head: RequestHead) -> Reply:
        endpoint = self._local.get(head.path, self._model)
        return endpoint(head)

    def _health(self, head: RequestHead) -> Reply:
        return Reply(status=200, body=b'{"status":"ok"}', headers=(_JSON,))

    def _ready(self, head: RequestHead) -> Reply:
        if self.draining:
            return self._not_ready("draining")
        if not self._context.fleet.installed:
            return self._not_ready("no snapshot of the fleet")
        if not self._context.fleet.ready:
            return self._not_ready("no worker takes requests")
        return Reply(status=200, body=b'{"status":"ready"}', headers=(_JSON,))

    def _not_ready(self, why: str) -> Reply:
        reason = RejectReason.SHUTTING_DOWN if self.draining else RejectReason.NO_ENDPOINTS
        return reject_reply(ErrorStyle.OPENAI, 503, reason, f"not ready: {why}", headers=((b"retry-after", b"1"),))

    def _show_version(self, head: RequestHead) -> Reply:
        return Reply(status=200, body=msgspec.json.encode({"version": self._version}), headers=(_JSON,))

    def _models(self, head: RequestHead) -> Reply:
        body = msgspec.json.encode({"object": "list", "data": list(self._model_cards().values())})
        return Reply(status=200, body=body, headers=(_JSON,))

    def _model(self, head: RequestHead) -> Reply:
        name = head.path[len(_MODELS) + 1 :].decode("ascii", "replace").replace("%2F", "/").replace("%2f", "/")
        card = self._model_cards().get(name)
        if card is None:
            return self._reject(head, 404, RejectReason.MODEL_NOT_FOUND, f"The model `{name[:128]}` does not exist.")
        return Reply(status=200, body=msgspec.json.encode(card), headers=(_JSON,))

    def _model_cards(self) -> dict[str, dict[str, object]]:
        """OpenAI's model object for every name that clients may use."""
        cards: dict[str, dict[str, object]] = {}
        for pool in self._context.fleet.pools:
            root = pool.models[0] if pool.models else pool.name
            for name in (*pool.models, *pool.adapters):
                card: dict[str, object] = {
                    "id": name,
                    "object": "model",
                    "created": 0,
                    "owned_by": "twofold",
                    "root": root,
                    "parent": root if name in pool.adapters else None,
                }
                if pool.max_model_len_tokens:
                    card["max_model_len"] = pool.max_model_len_tokens
                cards.setdefault(name, card)
        return cards


def style_of(head: RequestHead | None) -> ErrorStyle:
    """The error shape that the client of this path expects."""
    if head is not None and head.path.startswith(b"/v1/messages"):
        return ErrorStyle.ANTHROPIC
    return ErrorStyle.OPENAI


def _upstream_body(body: bytes, parsed: ParsedRequest, resolved: Resolved) -> bytes:
    """The client's own bytes, unless it used a name that its engines do not know."""
    pool = resolved.pool
    served = pool.upstream_model or (pool.models[0] if pool.models else "")
    if resolved.adapter or not parsed.model or not served or parsed.model == served:
        return body
    return replace_model(body, served)
