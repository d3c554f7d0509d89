"""The structured-output fields of a request, and the text that satisfies them."""

import json
from typing import Any

import msgspec

from emulator.structured import regex, schema
from emulator.structured.picker import ConstraintError, Picker

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What the output has to be. ``kind``: json, json_object, regex, choice, tag or free (accepted, not enforced)."""

    kind: str
    schema: Any = None
    pattern: str = ""
    choices: tuple[str, ...] = ()

    def text(self, before: bytes, choice: int = 0) -> str | None:
        """An output after ``before``, the bytes of the prompt; None where nothing is enforced.

        Raises ConstraintError where none is found.
        """
        try:
            return self._text(Picker(before, choice))
        except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError):
            raise ConstraintError(f"the {self.kind} constraint is malformed") from None

    def _text(self, picker: Picker) -> str | None:
        if self.kind == "json":
            return json.dumps(schema.instance(self.schema, picker), ensure_ascii=False)
        if self.kind == "json_object":
            return json.dumps(schema.instance(_ANY_OBJECT, picker))
        if self.kind == "regex":
            regex.write(regex.parse(self.pattern), picker)
            return picker.text
        if self.kind == "tag" and self.schema is not None:
            inner = schema.instance(self.schema["content"]["json_schema"], picker)
            return f"{self.schema['begin']}{json.dumps(inner, ensure_ascii=False)}{self.schema['end']}"
        if self.kind == "choice":
            _write_choice(self.choices, picker)
            return picker.text
        return None


_ANY_OBJECT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def parse_constraint(structured: Any, response_format: Any) -> Constraint | None:
    """The constraint of ``structured_outputs`` or ``response_format``; the latter wins, as in vLLM.

    Raises ConstraintError with vLLM's words where vLLM refuses too, else with a reason of its own.
    """
    given = dict(structured) if isinstance(structured, dict) else {}
    given = response_format_constraint(response_format) or given
    named = [kind for kind in _KINDS if given.get(kind) is not None]
    if not named:
        return None
    constraint = _constraint(named[0], given[named[0]])
    constraint.text(b"")
    return constraint


def response_format_constraint(response_format: Any) -> dict[str, Any] | None:
    """``response_format`` as ``structured_outputs`` says it; None where it constrains nothing."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        wrapper = response_format.get("json_schema")
        return {"json": wrapper.get("schema", {}) if isinstance(wrapper, dict) else {}}
    return {"structural_tag": json.dumps(response_format)}


def count_kinds(structured: Any) -> int:
    """How many kinds of constraint ``structured_outputs`` names."""
    return sum(structured.get(kind) is not None for kind in _KINDS) if isinstance(structured, dict) else 0


def _constraint(kind: str, value: Any) -> Constraint:
    if kind == "json":
        return Constraint(kind="json", schema=_schema(value))
    if kind == "json_object":
        if value is False:
            raise ConstraintError(
                "structured_outputs.json_object must be True if set; omit structured_outputs to disable "
                "structured outputs"
            )
        return Constraint(kind="json_object")
    if kind == "regex":
        if "\x00" in str(value):
            raise ConstraintError("structured_outputs.regex must not contain a NUL character ('\\x00')")
        return Constraint(kind="regex", pattern=str(value))
    if kind == "choice":
        if not value:
            raise ConstraintError(f"Choice '{value}' cannot be an empty list")
        if not isinstance(value, list):
            raise ConstraintError("structured_outputs.choice must be a list of strings")
        return Constraint(kind="choice", choices=tuple(str(item) for item in value))
    if not str(value).strip():
        raise ConstraintError(f"structured_outputs.{kind} cannot be an empty string")
    if kind == "structural_tag":
        return Constraint(kind="tag", schema=_first_tag(value))
    return Constraint(kind="free")


def _first_tag(value: Any) -> Any:
    """The first tag of a structural tag that wants at least one, else None: then the output is free."""
    try:
        tag = json.loads(value) if isinstance(value, str) else value
        form = tag["format"]
        first = form["tags"][0] if form.get("at_least_one") else None
        return first if first and first["content"]["type"] == "json_schema" else None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _schema(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ConstraintError("structured_outputs.json cannot be an empty string")
    try:
        return json.loads(value)
    except ValueError:
        raise ConstraintError("Invalid JSON grammar specification.") from None


def _write_choice(choices: tuple[str, ...], picker: Picker) -> None:
    """One of ``choices``, decided character by character, so that what is left of them leads to the same end."""
    left = sorted(set(choices))
    position = 0
    while True:
        ended = any(len(text) == position for text in left)
        nexts = sorted({text[position] for text in left if len(text) > position})
        place = picker.below(len(nexts) + ended)
        if place == len(nexts):
            return
        picker.write(nexts[place])
        left = [text for text in left if text[position : position + 1] == nexts[place]]
        position += 1
