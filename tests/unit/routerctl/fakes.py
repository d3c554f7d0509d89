"""A control plane that answers what a test tells it to."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
import msgspec
from google.protobuf.message import Message

from twofold.v1 import admin_pb2

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]


class Status(msgspec.Struct, frozen=True):
    """An answer that is an error."""

    code: Any
    details: str = ""


class FakeControlPlane(grpc.GenericRpcHandler):
    """Answers each method with ``answers[method]``: a message, raw bytes, a Status, or a function of the request
    that gives one of these. A list is used up one by one, its last item again and again."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, Any]] = []
        self.metadata: list[dict[str, str]] = []
        self.port = 0
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = details.method.rpartition("/")[2]
        if name not in self.answers:
            return None
        kind = getattr(admin_pb2, SERVICE.methods_by_name[name].input_type.name)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer(name, request, context),
            request_deserializer=kind.FromString,
            response_serializer=None,
        )

    def _answer(self, name: str, request: Message, context: grpc.ServicerContext) -> bytes:
        self.requests.append((name, request))
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata()})
        answer = self.answers[name]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Status):
            context.abort(answer.code, answer.details)
        return answer if isinstance(answer, bytes) else answer.SerializeToString()

    def last(self, name: str) -> Any:
        return next(request for method, request in reversed(self.requests) if method == name)


class Ran(msgspec.Struct, frozen=True):
    """How one run of routerctl ended."""

    code: int
    out: str
    err: str


Ctl = Callable[..., Ran]


UNAVAILABLE = Status(grpc.StatusCode.UNAVAILABLE, "away")
