"""Error bodies in the shape that the client's SDK expects."""

import enum

import msgspec

from twofold.model.reasons import RejectReason

REASON_HEADER = b"x-twofold-reason"


class ErrorStyle(enum.Enum):
    """Whose error shape an endpoint speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


_OPENAI_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    501: "NotImplementedError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(style: ErrorStyle, status: int, message: str, param: str | None = None) -> bytes:
    """The JSON body of an error response."""
    return msgspec.json.encode(_error_value(style, status, message, param))


def error_event(style: ErrorStyle, status: int, message: str, reason: RejectReason) -> bytes:
    """A server-sent event that tells of a failure after bytes were sent; no end marker follows it."""
    body = _error_value(style, status, message, None)
    body["error"]["reason"] = reason.value
    prefix = b"event: error\n" if style is ErrorStyle.ANTHROPIC else b""
    return prefix + b"data: " + msgspec.json.encode(body) + b"\n\n"


def _error_value(style: ErrorStyle, status: int, message: str, param: str | None) -> dict[str, dict[str, object]]:
    if style is ErrorStyle.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}  # type: ignore[dict-item]
    kind = _OPENAI_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
