"""Statuses: a code, one line, and where it helps the field that is wrong (google.rpc.BadRequest)."""

from typing import NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

MAX_MESSAGE = 1000


class CallError(Exception):
    """Ends a call with a status. ``field`` is the path of the offending field in the request, "" for none."""

    def __init__(self, code: grpc.StatusCode, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.field = field


def invalid(field: str, message: str) -> CallError:
    """INVALID_ARGUMENT for a field."""
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {message}", field=field)


def not_found(field: str, message: str) -> CallError:
    """NOT_FOUND for what a field names."""
    return CallError(grpc.StatusCode.NOT_FOUND, message, field=field)


async def abort(context: "grpc.aio.ServicerContext[object, object]", error: CallError) -> NoReturn:
    """End the call with the error's status."""
    message = str(error)[:MAX_MESSAGE]
    if error.field:
        detail = any_pb2.Any()
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        status = status_pb2.Status(code=error.code.value[0], message=message, details=[detail])
        context.set_trailing_metadata(rpc_status.to_status(status).trailing_metadata)
    await context.abort(error.code, message)
    raise AssertionError("abort returned")
