"""Commands of the control plane and of the admin port, answered with the help of the relays."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence

import grpc

from router.agent.control_server import ControlServer, RelayGoneError
from router.shm.control import (
    MAX_BODY_BYTES,
    ControlError,
    ExplainedDecision,
    ExplainPast,
    ExplainRequest,
    Failed,
    Homes,
    RelayMessage,
    ResolveHomes,
)
from twofold.v1 import router_pb2 as pb

log = logging.getLogger(__name__)

MAX_DEADLINE_S = 30.0
DEFAULT_DEADLINE_S = 5.0
MAX_RUNNING = 64
MAX_REQUEST_ID_CHARS = 256


class CommandError(Exception):
    """A command that cannot be answered with a result."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Commands:
    """Answers commands. ``top`` gives the figures of the whole replica."""

    def __init__(self, replica_id: str, control: ControlServer, top: Callable[[], pb.RouterTop]) -> None:
        self._replica_id = replica_id
        self._control = control
        self._top = top
        self._running = 0
        self.refused = 0
        """Commands that were not begun because too many were running."""

    async def run(self, command: pb.RouterCommand) -> pb.CommandResult:
        """The answer to ``command``, at the latest when its deadline passes; never raises."""
        deadline_s = min(command.deadline_s if command.deadline_s > 0 else DEFAULT_DEADLINE_S, MAX_DEADLINE_S)
        result = pb.CommandResult(command_id=command.command_id, replica_id=self._replica_id)
        if self._running >= MAX_RUNNING:
            self.refused += 1
            return _failed(result, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many commands are running")
        self._running += 1
        try:
            async with asyncio.timeout(deadline_s):
                await self._answer(command, result)
        except TimeoutError:
            _failed(result, grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {deadline_s:g} s")
        except CommandError as error:
            _failed(result, error.code, str(error))
        except Exception:
            log.exception("command failed", extra={"command_id": command.command_id})
            _failed(result, grpc.StatusCode.INTERNAL, "the router failed; see its log")
        finally:
            self._running -= 1
        return result

    async def _answer(self, command: pb.RouterCommand, result: pb.CommandResult) -> None:
        kind = command.WhichOneof("command")
        if kind == "explain":
            result.decisions.extend(await self.explain(command.explain))
        elif kind == "top":
            result.top.CopyFrom(self._top())
        elif kind == "drain":
            raise CommandError(grpc.StatusCode.UNIMPLEMENTED, "this router does not migrate streams")
        else:
            raise CommandError(grpc.StatusCode.UNIMPLEMENTED, "this router does not know the command")

    async def explain(self, command: pb.ExplainCommand) -> list[pb.Decision]:
        """Decisions, oldest first.

        Raises CommandError: NOT_FOUND when no relay remembers the request, UNAVAILABLE when no relay could be asked,
        INVALID_ARGUMENT for a request that makes no sense.
        """
        if command.WhichOneof("subject") == "request_id":
            return await self._explain_past(command.request_id)
        if command.WhichOneof("subject") == "request":
            return await self._explain_request(command.request)
        raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, "explain needs a request id or a request")

    async def _explain_past(self, request_id: str) -> list[pb.Decision]:
        if not request_id or len(request_id) > MAX_REQUEST_ID_CHARS:
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, "request id must have 1..256 characters")
        asked: list[Coroutine[None, None, list[pb.Decision]]] = [
            self._ask(relay, ExplainPast(id=self._control.next_id(), request_id=request_id))
            for relay in self._control.relays
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = [decision for answer in answers if isinstance(answer, list) for decision in answer]
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if not found and (errors or not answers):
            raise errors[0] if errors else CommandError(grpc.StatusCode.UNAVAILABLE, "no relay is connected")
        if not found:
            raise CommandError(grpc.StatusCode.NOT_FOUND, f"no relay of {self._replica_id} remembers the request")
        return sorted(found, key=lambda decision: decision.at_s)

    async def _explain_request(self, request: pb.HypotheticalRequest) -> list[pb.Decision]:
        if len(request.body) > MAX_BODY_BYTES:
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, f"body exceeds {MAX_BODY_BYTES} bytes")
        failure = CommandError(grpc.StatusCode.UNAVAILABLE, "no relay is connected")
        for relay in self._control.relays:
            message = ExplainRequest(
                id=self._control.next_id(), path=request.path, headers=dict(request.headers), body=request.body
            )
            try:
                return await self._ask(relay, message)
            except CommandError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise
                failure = error
        raise failure

    @property
    def running(self) -> int:
        """Commands being answered."""
        return self._running

    @property
    def replica_id(self) -> str:
        """Name of the replica that answers."""
        return self._replica_id

    async def homes(self, pool: str, keys: Sequence[int]) -> dict[int, Homes]:
        """Home targets of ring keys, by relay: each relay computes them from its own copy of the rings.

        Raises CommandError as ``explain`` does.
        """
        found: dict[int, Homes] = {}
        for relay in self._control.relays:
            message = ResolveHomes(id=self._control.next_id(), pool=pool, keys=tuple(keys))
            answer = await self._answer_of(relay, message)
            if isinstance(answer, Homes):
                found[relay] = answer
        return found

    async def _ask(self, relay: int, message: ExplainPast | ExplainRequest) -> list[pb.Decision]:
        answer = await self._answer_of(relay, message)
        decisions = getattr(answer, "decisions", ())
        return [decision_to_proto(decision, self._replica_id, relay) for decision in decisions]

    async def _answer_of(self, relay: int, message: ExplainPast | ExplainRequest | ResolveHomes) -> RelayMessage:
        try:
            answer: RelayMessage = await self._control.ask(relay, message, MAX_DEADLINE_S)
        except RelayGoneError as error:
            raise CommandError(grpc.StatusCode.UNAVAILABLE, str(error)) from None
        except ControlError as error:
            raise CommandError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        if isinstance(answer, Failed):
            code = grpc.StatusCode.INVALID_ARGUMENT if answer.invalid else grpc.StatusCode.INTERNAL
            raise CommandError(code, answer.message)
        return answer


def decision_to_proto(decision: ExplainedDecision, replica_id: str, relay: int) -> pb.Decision:
    """An explained decision as a message."""
    return pb.Decision(
        request_id=decision.request_id,
        replica_id=replica_id,
        relay=relay,
        at_s=decision.at_s,
        pool=decision.pool,
        policy=decision.policy,
        target_id=decision.target_id,
        reason=decision.reason,
        ring_key=f"{decision.key:016x}",
        key_depth=decision.key_depth,
        ring_version=decision.ring_version,
        prompt_tokens=decision.prompt_tokens,
        predicted_ttft_s=decision.predicted_ttft_s,
        observed_ttft_s=decision.observed_ttft_s,
        examined=[
            pb.ExaminedTarget(
                target_id=target.target_id,
                role=target.role,
                ineligible=target.ineligible,
                cached_tokens=target.cached_tokens,
                uncached_tokens=target.uncached_tokens,
                own_s=target.own_s,
                own_reference_s=target.own_reference_s,
                wait_s=target.wait_s,
                price_s=target.price_s,
                chosen=target.chosen,
            )
            for target in decision.examined
        ],
        snapshot_epoch=decision.snapshot_epoch,
        snapshot_version=decision.snapshot_version,
    )


def _failed(result: pb.CommandResult, code: grpc.StatusCode, message: str) -> pb.CommandResult:
    result.code = code.value[0]
    result.message = message
    return result
