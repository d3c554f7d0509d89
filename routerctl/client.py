"""The connection to the control plane: one channel, one way to call it, errors as one line each."""

from types import TracebackType
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from routerctl.errors import CommandError, NotFound, Refused, Unreachable
from routerctl.options import Options, read_bytes
from twofold.v1 import admin_pb2
from twofold.v1.admin_pb2_grpc import AdminServiceStub

MAX_ANSWER_BYTES = 64 << 20
MAX_REQUEST_BYTES = 8 << 20
MAX_PEM_BYTES = 1 << 20

Request = TypeVar("Request", bound=Message)
Answer = TypeVar("Answer", bound=Message)


class Client:
    """Calls of ``AdminService``, each bounded by ``options.timeout_s``. Use as a context manager.

    Raises UsageError for certificate files that cannot be read; no connection is made before the first call.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._channel = _open(options)
        self._metadata = (("authorization", f"Bearer {options.token}"),) if options.token else ()
        self.admin = AdminServiceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def call(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Request, Answer]",
        request: Request,
        timeout_s: float | None = None,
    ) -> Answer:
        """One answer within ``timeout_s`` (default: the option). Raises Refused when the control plane said no,
        NotFound when it does not know what was named, Unreachable when it said nothing."""
        timeout_s = self.options.timeout_s if timeout_s is None else timeout_s
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._explained(error, timeout_s) from None

    def _explained(self, error: grpc.RpcError, timeout_s: float) -> CommandError:
        code, details = error.code(), error.details() or ""
        where = f"control plane {self.options.control_plane}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Unreachable(f"{where} did not answer within {timeout_s:g} s")
        if code is grpc.StatusCode.UNAVAILABLE and not self._answers():
            return Unreachable(f"{where} is unreachable: {details}")
        if code is grpc.StatusCode.NOT_FOUND:
            return NotFound(details or "not found")
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            hint = "" if self.options.token else " (give a token with --token-file or TWOFOLD_TOKEN)"
            return Refused(f"{details or 'not allowed'}{hint}")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Refused(f"{where} does not know this command; is it older than routerctl?")
        if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            return Refused(f"{where} failed: {details or code.name}")
        return Refused(details or code.name)

    def _answers(self) -> bool:
        # UNAVAILABLE is both what grpc says of a dead connection and what the control plane says of missing routers;
        # a second, harmless question tells one from the other.
        try:
            self.admin.GetPolicy(admin_pb2.GetPolicyRequest(), timeout=self.options.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True


def _open(options: Options) -> grpc.Channel:
    arguments: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
        ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
        ("grpc.enable_http_proxy", 0),
    ]
    if options.tls is None:
        return grpc.insecure_channel(options.control_plane, options=arguments)
    tls = options.tls
    if tls.server_name:
        arguments.append(("grpc.ssl_target_name_override", tls.server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=read_bytes(tls.ca, MAX_PEM_BYTES) if tls.ca else None,
        private_key=read_bytes(tls.key, MAX_PEM_BYTES) if tls.key else None,
        certificate_chain=read_bytes(tls.cert, MAX_PEM_BYTES) if tls.cert else None,
    )
    return grpc.secure_channel(options.control_plane, credentials, options=arguments)
