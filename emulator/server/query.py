"""Query parameters as FastAPI checks them, with its words."""

from typing import Any
from urllib.parse import parse_qs

import msgspec

from emulator.server.errors import ApiError, Invalid, validation_error
from emulator.server.http import Exchange
from emulator.server.validation import convert_fields


class Query:
    """The parameters of one request. Every method raises ApiError (400) for a value that does not fit."""

    def __init__(self, exchange: Exchange) -> None:
        self._values = parse_qs(exchange.query, keep_blank_values=True)

    def every(self, name: str) -> list[str]:
        """All values of a parameter."""
        return self._values.get(name, [])

    def integer(self, name: str, otherwise: int, lowest: int, highest: int) -> int:
        """An integer from ``lowest`` to ``highest``."""
        text = self._last(name)
        if text is None:
            return otherwise
        value = int(_converted(name, text, "int"))
        if value < lowest:
            message = f"Input should be greater than or equal to {lowest}"
            raise _refused("greater_than_equal", name, message, text, {"ge": lowest})
        if value > highest:
            message = f"Input should be less than or equal to {highest}"
            raise _refused("less_than_equal", name, message, text, {"le": highest})
        return value

    def boolean(self, name: str, otherwise: bool) -> bool:
        """A truth value."""
        text = self._last(name)
        if text is None:
            return otherwise
        return bool(_converted(name, text, "bool"))

    def choice(self, name: str, otherwise: str, choices: tuple[str, ...]) -> str:
        """One of ``choices``."""
        text = self._last(name)
        if text is None:
            return otherwise
        if text not in choices:
            quoted = [f"'{choice}'" for choice in choices]
            expected = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
            raise _refused("literal_error", name, f"Input should be {expected}", text, {"expected": expected})
        return text

    def _last(self, name: str) -> str | None:
        values = self._values.get(name)
        return values[-1] if values else None


def _converted(name: str, text: str, kind: str) -> Any:
    fields: dict[str, Any] = {name: text}
    findings = convert_fields(fields, {name: kind})
    if findings:
        raise validation_error([msgspec.structs.replace(found, location=f"query.{name}") for found in findings])
    return fields[name]


def _refused(kind: str, name: str, message: str, shown: str, context: dict[str, Any]) -> ApiError:
    found = Invalid(kind=kind, location=f"query.{name}", message=message, shown=shown, context=context)
    return validation_error([found])
