"""Error bodies, word for word as vLLM 0.32 sends them."""

from typing import Any

import msgspec

ENGINE_DEAD_MESSAGE = "EngineCore encountered an issue. See stack trace (above) for the root cause."
SHUT_DOWN_MESSAGE = "cannot schedule new futures after shutdown"


class ApiError(Exception):
    """A refused request: HTTP status and the fields of the error body.

    ``unforeseen``: in vLLM this is an exception that nobody caught, whose answer lacks the headers of the middleware.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type_: str = "BadRequestError",
        param: str | None = None,
        unforeseen: bool = False,
    ):
        super().__init__(message)
        self.unforeseen = unforeseen
        self.message = message
        self.status = status
        self.type = type_
        self.param = param

    def body(self) -> bytes:
        """The OpenAI-style body."""
        return error_body(self.message, self.type, self.param, self.status)


def error_body(message: str, type_: str, param: str | None, code: int) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}``."""
    return msgspec.json.encode({"error": {"message": message, "type": type_, "param": param, "code": code}})


def parameter_error(message: str, param: str, value: object = None) -> ApiError:
    """A check of vLLM that names its parameter in the message."""
    shown = f"(parameter={param})" if value is None else f"(parameter={param}, value={value})"
    return ApiError(f"{message} {shown}", param=param)


def describe_input(value: object) -> str:
    """An input as vLLM's validation messages show it: strings and numbers as they are, containers by their size."""
    if isinstance(value, dict):
        return f"<dict of {len(value)} items>"
    if isinstance(value, list):
        return f"<list of {len(value)} items>"
    return str(value)


class Invalid(msgspec.Struct, frozen=True, kw_only=True):
    """One finding of body validation."""

    kind: str
    location: str
    message: str
    shown: str
    context: dict[str, Any] | None = None

    def text(self) -> str:
        """The finding as one line of the message."""
        fields: dict[str, object] = {
            "type": self.kind,
            "loc": self.location,
            "msg": self.message,
            "input": self.shown,
        }
        if self.context is not None:
            fields["ctx"] = self.context
        return repr(fields)


def validation_error(findings: list[Invalid]) -> ApiError:
    """The 400 that vLLM answers where other servers answer 422."""
    count = "1 validation error" if len(findings) == 1 else f"{len(findings)} validation errors"
    lines = "".join(f"\n  {finding.text()}" for finding in findings)
    return ApiError(f"{count}:{lines}", type_="Bad Request", param=findings[0].location)


def engine_dead() -> ApiError:
    """What every request gets once EngineCore has died."""
    return ApiError(ENGINE_DEAD_MESSAGE, status=500, type_="InternalServerError")


ENGINE_DEAD_EVENT = (
    b'data: {"error": {"message": "%s", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
    % ENGINE_DEAD_MESSAGE.encode()
)
