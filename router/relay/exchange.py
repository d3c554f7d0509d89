"""One client request from decision to last byte: the side that stays while attempts at workers come and go."""

import asyncio
import logging

from router.http.chunked import LAST_CHUNK, encode_chunk
from router.http.connection import ClientConnection
from router.http.errors import ErrorStyle, error_event
from router.http.exchange import Header, reject_reply
from router.http.forward import request_to_worker, response_to_client
from router.http.head import RequestHead
from router.relay.attempt import Attempt
from router.relay.bodies import Writer
from router.relay.context import RelayContext
from router.relay.decisions import DecisionEntry
from router.relay.endings import RETRYABLE, Ending, client_error, markers_of
from router.routing.types import Decision, Endpoint, RequestFeatures
from router.tokens.exact import Preparation
from twofold.model.reasons import RejectReason

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
_REJECT_STATUS = {
    RejectReason.SATURATED: 429,
    RejectReason.CONTEXT_TOO_LONG: 400,
    RejectReason.MODEL_NOT_FOUND: 404,
    RejectReason.BAD_REQUEST: 400,
    RejectReason.INTERNAL: 500,
}
_REJECT_TEXT = {
    RejectReason.SATURATED: "all workers of this model are saturated; try again later",
    RejectReason.NO_ENDPOINTS: "no worker of this model is available at the moment",
    RejectReason.CONTEXT_TOO_LONG: "the prompt is longer than the context of this model's workers",
    RejectReason.TTL_EXPIRED: "the request waited too long for a worker",
}


class Exchange:
    """Drives one routed request. ``start`` it once; afterwards it reacts to the client and to its attempt."""

    __slots__ = (
        "_arrival_s",
        "_attempt",
        "_attempts",
        "_body",
        "_chunked",
        "_closed",
        "_committed",
        "_connection",
        "_context",
        "_endpoint",
        "_entry",
        "_excluded",
        "_features",
        "_head",
        "_keep_alive",
        "_metrics",
        "_paused_since_s",
        "_preparation",
        "_refusals",
        "_request_id",
        "_status",
        "_style",
    )

    def __init__(
        self,
        context: RelayContext,
        connection: ClientConnection,
        *,
        head: RequestHead,
        body: bytes,
        endpoint: Endpoint,
        style: ErrorStyle,
        request_id: bytes,
        features: RequestFeatures,
    ) -> None:
        self._context = context
        self._connection = connection
        self._head = head
        self._body = body
        self._endpoint = endpoint
        self._style = style
        self._request_id = request_id
        self._features = features
        self._arrival_s = features.arrival_s
        self._metrics = context.metrics.pool(features.pool)
        self._attempt: Attempt | None = None
        self._attempts = 0
        self._refusals = 0
        self._excluded: frozenset[int] = frozenset()
        self._entry: DecisionEntry | None = None
        self._committed = False
        self._chunked = not head.http10
        self._keep_alive = True
        self._closed = False
        self._status = 0
        self._paused_since_s: float | None = None
        self._preparation: Preparation | None = None

    # -- start and retries

    def start(self, began_s: float) -> None:
        """Decide and send; everything after this happens in callbacks. ``began_s``: when its handling began."""
        self._enter()
        self._begin(began_s)

    def start_after(self, preparation: Preparation) -> None:
        """The same, once more is known of the prompt."""
        self._enter()
        self._preparation = preparation
        preparation.start(asyncio.get_running_loop(), self._prepared)

    def _prepared(self, features: RequestFeatures) -> None:
        self._preparation = None
        if self._closed:
            return
        self._features = features
        try:
            self._begin(self._context.clock())
        except Exception:
            log.exception("request failed inside the router")
            self.abandon()
            self._connection.reply(
                reject_reply(self._style, 500, RejectReason.INTERNAL, "internal error of the router")
            )

    def _enter(self) -> None:
        self._context.exchanges.add(self)
        self._metrics.add(self._metrics.inflight)

    def _begin(self, began_s: float) -> None:
        self._context.retries.request(self._context.fleet.policy.retry_budget_ratio)
        decision = self._decide()
        metrics = self._context.metrics
        metrics.slab.observe(metrics.decision, self._context.clock() - began_s)
        if not self._try(decision):
            self._reject(decision)

    def abandon(self) -> None:
        """Settle the accounts of a request that failed inside the router; its answer is the caller's."""
        if not self._closed:
            self._status = 500
            self._close()
        self._cancel_preparation()
        if self._attempt is not None:
            self._attempt.cancel()

    def _cancel_preparation(self) -> None:
        preparation, self._preparation = self._preparation, None
        if preparation is not None:
            preparation.cancel()

    def _decide(self) -> Decision:
        context = self._context
        fleet = context.fleet
        decision = fleet.live.decide(self._features, context.clock(), self._excluded)
        self._metrics.add(self._metrics.decisions)
        self._entry = context.decisions.add(decision, fleet.epoch, fleet.version)
        return decision

    def _try(self, decision: Decision) -> bool:
        """Begin an attempt at the decided target; False when there is none."""
        context = self._context
        if decision.slot is None:
            return False
        target = context.fleet.target(decision.slot)
        if target is None:
            return False
        ticket = context.fleet.live.account(self._features, decision, context.clock())
        if self._attempts == 0:
            self._metrics.dispatched(decision.prompt_tokens, decision.cached_tokens)
        self._attempts += 1
        body = self._body
        head = request_to_worker(
            self._head,
            target.address.prefix,
            target.address.host_header,
            len(body),
            self._request_id,
            target.data_parallel_rank,
        )
        attempt = self._attempt = Attempt(
            context,
            self,
            target=target,
            ticket=ticket,
            request=head,
            body=body,
            stream=self._features.stream,
            chunked_out=self._chunked,
            markers=markers_of(self._endpoint),
            metrics=self._metrics,
        )
        attempt.begin()
        if self._paused_since_s is not None and self._attempt is attempt:
            attempt.pause()
        return True

    def _retry(self, attempt: Attempt, ending: Ending) -> bool:
        """Try another worker, if the ending, the budget and the fleet allow it."""
        context = self._context
        if ending not in RETRYABLE:
            return False
        if self._attempts >= context.settings.max_attempts:
            context.metrics.limit_hit("attempts")
            return False
        if ending is Ending.REFUSED:
            self._refusals += 1
            if self._refusals > 1:
                return False
        if not context.retries.take():
            context.metrics.limit_hit("retry_budget")
            return False
        self._excluded |= {attempt.target.slot}
        decision = self._decide()
        if decision.slot is None or decision.slot in self._excluded:
            return False
        context.metrics.slab.inc(context.metrics.retries.cell(ending.value))
        log.info(
            "retrying elsewhere",
            extra={"request_id": self._features.request_id, "from": attempt.target.target_id, "cause": ending.value},
        )
        return self._try(decision)

    # -- the client's side (ClientExchange)

    def client_gone(self) -> None:
        """See ClientExchange."""
        if self._closed:
            return
        self._status = CLIENT_LEFT
        slab = self._context.metrics
        slab.slab.inc(slab.disconnects)
        self._close()
        self._cancel_preparation()
        if self._attempt is not None:
            self._attempt.cancel()

    def client_paused(self) -> None:
        """See ClientExchange."""
        self._paused_since_s = self._context.clock()
        if self._attempt is not None:
            self._attempt.pause()

    def client_resumed(self) -> None:
        """See ClientExchange."""
        self._paused_since_s = None
        if self._attempt is not None:
            self._attempt.resume()

    def stop(self) -> None:
        """End now with an error: the router stops."""
        if self._attempt is not None and not self._closed:
            self._attempt.cancel()

    @property
    def answered(self) -> bool:
        """Whether a worker has begun to answer."""
        return self._attempt is not None and self._attempt.head is not None

    @property
    def paused(self) -> bool:
        """Whether the client has yet to read what was written to it."""
        return self._paused_since_s is not None

    def check(self, now_s: float) -> None:
        """Watchdogs, called a few times a second."""
        paused_s = self._paused_since_s
        if paused_s is not None and now_s - paused_s > self._context.settings.client_stall_s:
            self._context.metrics.limit_hit("client_stall")
            connection = self._connection
            self.client_gone()
            connection.abort()
        elif self._attempt is not None:
            self._attempt.check(now_s)

    # -- the worker's side (AttemptOwner)

    def attempt_first_output(self, attempt: Attempt, now_s: float) -> None:
        """See AttemptOwner."""
        if not self._features.stream:
            return
        ttft_s = now_s - self._arrival_s
        self._metrics.observe(self._metrics.ttft, ttft_s)
        if self._entry is not None:
            self._entry.observed_ttft_s = ttft_s

    def attempt_events(self, attempt: Attempt, data: bytes) -> Writer:
        """See AttemptOwner."""
        write = self._connection.write
        write(data if self._committed else self._commit(attempt, content_length=None) + data)
        return write

    def attempt_piece(self, attempt: Attempt, payload: bytes) -> None:
        """See AttemptOwner."""
        head = b""
        if not self._committed:
            assert attempt.head is not None
            length = attempt.head.content_length
            if length is not None:
                self._chunked = False
            head = self._commit(attempt, content_length=length)
        if payload:
            self._connection.write(head + (encode_chunk(payload) if self._chunked else payload))
        elif head:
            self._connection.write(head)

    def attempt_whole(self, attempt: Attempt, body: bytes) -> None:
        """See AttemptOwner."""
        self._chunked = False
        head = self._commit(attempt, content_length=len(body))
        self._connection.write(head + body if len(body) < 65_536 else head)
        if len(body) >= 65_536:
            self._connection.write(body)

    def attempt_ended(self, attempt: Attempt, ending: Ending) -> None:
        """See AttemptOwner."""
        self._attempt = None
        if self._closed:
            return
        if ending is Ending.COMPLETE:
            self._finish(attempt)
        elif self._committed:
            self._fail_midway(attempt, ending)
        elif not self._retry(attempt, ending):
            self._fail(attempt, ending)

    # -- endings

    def _commit(self, attempt: Attempt, content_length: int | None) -> bytes:
        """From here on the client has bytes of this worker: no other may answer, only continue."""
        assert attempt.head is not None
        self._committed = True
        self._status = attempt.head.status
        self._keep_alive = self._connection.keep_alive and (self._chunked or content_length is not None)
        return response_to_client(
            attempt.head,
            extra=self._own_lines(attempt),
            content_length=content_length,
            chunked=self._chunked,
            keep_alive=self._keep_alive,
            http10=self._head.http10,
        )

    def _own_lines(self, attempt: Attempt) -> bytes:
        target = attempt.target
        lines = b"x-request-id: %b\r\nx-twofold-worker: %b\r\n" % (self._request_id, target.public_id)
        if self._context.settings.worker_name_header:
            lines += b"x-twofold-worker-name: %b\r\n" % target.target_id.encode("ascii", "replace")
        return lines

    def _finish(self, attempt: Attempt) -> None:
        connection = self._connection
        if not self._committed:
            # A stream that came to its end without a single event.
            connection.write(self._commit(attempt, content_length=None))
        if self._chunked:
            connection.write(LAST_CHUNK)
        self._close()
        connection.finish(self._keep_alive)

    def _fail_midway(self, attempt: Attempt, ending: Ending) -> None:
        """The client has part of a response: say so where the format can, and never let it look complete."""
        status, reason, message = client_error(ending)
        self._context.metrics.reject(reason.value, status)
        log.warning(
            "response broke off",
            extra={
                "request_id": self._features.request_id,
                "target_id": attempt.target.target_id,
                "cause": ending.value,
                "outputs": attempt.outputs,
            },
        )
        connection = self._connection
        self._close()
        if attempt.head is None or not attempt.head.is_event_stream:
            connection.abort()
            return
        event = error_event(self._style, status, message, reason)
        connection.write(encode_chunk(event) if self._chunked else event)
        connection.finish(keep_alive=False)

    def _fail(self, attempt: Attempt, ending: Ending) -> None:
        """No byte has gone out: a whole error response, the engine's own where it made one."""
        head = attempt.head
        if ending in (Ending.UNAVAILABLE, Ending.REFUSED) and head is not None:
            self.attempt_whole(attempt, attempt.held_body)
            connection = self._connection
            self._close()
            connection.finish(self._keep_alive)
            return
        status, reason, message = client_error(ending)
        self._answer(status, reason, message, retry_after_s=1.0 if status == 503 else 0.0)

    def _reject(self, decision: Decision) -> None:
        reason = decision.reason
        if not isinstance(reason, RejectReason):
            # Chosen, but its slot left the fleet between two snapshots.
            reason = RejectReason.NO_ENDPOINTS
        status = _REJECT_STATUS.get(reason, 503)
        retry_after_s = max(1.0, decision.retry_after_s) if status in (429, 503) else 0.0
        self._answer(status, reason, _REJECT_TEXT.get(reason, reason.value), retry_after_s)

    def _answer(self, status: int, reason: RejectReason, message: str, retry_after_s: float) -> None:
        self._context.metrics.reject(reason.value, status)
        self._status = status
        headers: list[Header] = [(b"x-request-id", self._request_id)]
        if retry_after_s > 0:
            headers.append((b"retry-after", b"%d" % max(1, round(retry_after_s))))
        connection = self._connection
        self._close()
        connection.reply(reject_reply(self._style, status, reason, message, headers=headers))

    def _close(self) -> None:
        """Account for the request, once."""
        self._closed = True
        context = self._context
        self._metrics.answered(self._status, context.clock() - self._arrival_s)
        context.exchanges.discard(self)
