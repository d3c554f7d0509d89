"""Handlers of a service made from its descriptor.

Against generated servicers this adds: malformed messages answer INVALID_ARGUMENT instead of a logged traceback, errors
of ours become statuses, unforeseen ones become INTERNAL without their text, and streams may yield encoded bytes, so
that one message is encoded once for many readers.
"""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from controlplane.rpc.errors import CallError, abort

log = logging.getLogger(__name__)

Context = Any


class _Malformed:
    """Stands for a message that could not be decoded."""


_MALFORMED = _Malformed()


def service_handler(descriptor: ServiceDescriptor, servicer: object) -> Any:
    """Handlers of all methods of a service; ``servicer`` has an async method for each, called (request, context)."""
    methods = {
        method.name: _method_handler(descriptor.full_name, method, getattr(servicer, method.name))
        for method in descriptor.methods
    }
    return grpc.method_handlers_generic_handler(descriptor.full_name, methods)


def _method_handler(service: str, method: MethodDescriptor, behaviour: Callable[..., Any]) -> Any:
    name = f"{service}/{method.name}"
    codecs: dict[str, Any] = {
        "request_deserializer": _deserializer(message_factory.GetMessageClass(method.input_type)),
        "response_serializer": _serialize,
    }
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(_streaming(name, behaviour, checked_messages), **codecs)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_streaming(name, behaviour, _checked), **codecs)

    async def unary(request: Any, context: Context) -> Any:
        try:
            return await behaviour(_checked(request), context)
        except CallError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            await _internal(name, context)

    return grpc.unary_unary_rpc_method_handler(unary, **codecs)


def _streaming(name: str, behaviour: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for message in behaviour(check(request), context):
                yield message
        except CallError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            await _internal(name, context)

    return stream


def _checked(request: Any) -> Message:
    if request is _MALFORMED:
        raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "malformed message")
    return request  # type: ignore[no-any-return]


async def checked_messages(requests: AsyncIterator[Any]) -> AsyncIterator[Message]:
    """The messages of a client stream. Raises CallError at a malformed one."""
    async for request in requests:
        yield _checked(request)


def _deserializer(message_class: type[Message]) -> Callable[[bytes], Any]:
    def deserialize(raw: bytes) -> Any:
        try:
            return message_class.FromString(raw)
        except (DecodeError, RecursionError, ValueError):
            return _MALFORMED

    return deserialize


def _serialize(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


async def _internal(name: str, context: Context) -> None:
    log.exception("a call failed", extra={"method": name})
    await abort(context, CallError(grpc.StatusCode.INTERNAL, "internal error; see the control plane's log"))
