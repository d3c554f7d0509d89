"""A small instance of a JSON schema: required properties only, least lengths and numbers, strings and options by hash.

Understood: ``type``, ``enum``, ``const``, ``properties``/``required``/``minProperties``, ``items``/``prefixItems``/
``minItems``, the bounds of numbers and strings, ``multipleOf``, ``pattern``, common ``format`` values, ``anyOf``,
``oneOf``, ``allOf`` and local ``$ref``. Other keywords are ignored.
"""

import math
from typing import Any

from emulator.structured import regex
from emulator.structured.picker import ConstraintError, Picker

_MAX_DEPTH = 32
_MAX_ITEMS = 256
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_FORMATS = {
    "date": "2024-01-01",
    "time": "00:00:00Z",
    "date-time": "2024-01-01T00:00:00Z",
    "duration": "P1D",
    "email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def instance(schema: Any, picker: Picker, root: Any = None, depth: int = 0) -> Any:
    """A value that satisfies ``schema``. Raises ConstraintError where none is found."""
    picker.step()
    root = schema if root is None else root
    if depth > _MAX_DEPTH:
        raise ConstraintError("the JSON schema is nested too deeply, or requires itself")
    if schema is True or schema == {}:
        return {} if depth == 0 else None
    if not isinstance(schema, dict):
        raise ConstraintError("a JSON schema must be an object or true")
    if "const" in schema:
        return schema["const"]
    options = schema.get("enum")
    if options is not None:
        if not isinstance(options, list) or not options:
            raise ConstraintError("enum of a JSON schema must be a list that is not empty")
        return options[picker.below(len(options))]
    schema = _resolved(schema, picker, root, depth)
    if "const" in schema or "enum" in schema:
        return instance(schema, picker, root, depth + 1)
    return _of_type(_type(schema), schema, picker, root, depth)


def _resolved(schema: dict[str, Any], picker: Picker, root: Any, depth: int) -> dict[str, Any]:
    """``schema`` with ``$ref``, ``allOf`` and one option of ``anyOf`` or ``oneOf`` merged in."""
    for _ in range(_MAX_DEPTH):
        rest = dict(schema)
        parts: list[Any] = []
        if "$ref" in rest:
            parts.append(_referenced(rest.pop("$ref"), root))
        parts += rest.pop("allOf", [])
        for name in ("anyOf", "oneOf"):
            options = rest.pop(name, None)
            if options:
                parts.append(_first_feasible(options, picker, root, depth))
        if not parts:
            return rest
        schema = rest
        for part in parts:
            if isinstance(part, dict):
                schema = _merged(schema, part)
    raise ConstraintError("the JSON schema refers to itself without end")


def _first_feasible(options: Any, picker: Picker, root: Any, depth: int) -> Any:
    if not isinstance(options, list):
        raise ConstraintError("anyOf and oneOf of a JSON schema must be lists")
    first = picker.below(len(options))
    failure: ConstraintError | None = None
    for option in options[first:] + options[:first]:
        try:
            instance(option, Picker(b""), root, depth + 1)
        except ConstraintError as error:
            failure = failure or error
        else:
            return option
    raise failure or ConstraintError("no option of a JSON schema can be satisfied")


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged = {**first, **second}
    if "properties" in first and "properties" in second:
        merged["properties"] = {**first["properties"], **second["properties"]}
    if "required" in first and "required" in second:
        merged["required"] = [*first["required"], *second["required"]]
    return merged


def _referenced(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise ConstraintError(f"$ref {reference!r} is not local to the JSON schema")
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            raise ConstraintError(f"$ref {reference!r} leads nowhere")
        found = found[name]
    return found


def _type(schema: dict[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((item for item in kind if item != "null"), "null")
    if kind is None:
        for name, implied in (
            *(("properties", "object"), ("required", "object"), ("items", "array"), ("prefixItems", "array")),
            *(("pattern", "string"), ("minLength", "string"), ("format", "string"), ("minimum", "number")),
        ):
            if name in schema:
                return implied
        return "object"
    if kind not in _TYPES:
        raise ConstraintError(f"Grammar error: Invalid type: {kind}")
    return str(kind)


def _of_type(kind: str, schema: dict[str, Any], picker: Picker, root: Any, depth: int) -> Any:
    if kind == "object":
        return _object(schema, picker, root, depth)
    if kind == "array":
        return _array(schema, picker, root, depth)
    if kind == "string":
        return _string(schema, picker)
    if kind in ("integer", "number"):
        return _number(schema, whole=kind == "integer")
    return False if kind == "boolean" else None


def _object(schema: dict[str, Any], picker: Picker, root: Any, depth: int) -> dict[str, Any]:
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ConstraintError("properties of a JSON schema must be an object, required a list")
    names = [name for name in properties if name in required]
    names += [name for name in required if name not in properties]
    for name in properties:
        if len(names) < schema.get("minProperties", 0) and name not in names:
            names.append(name)
    found = {}
    for name in names:
        picker.write(f"{name}:")
        found[name] = instance(properties.get(name, True), picker, root, depth + 1)
    return found


def _array(schema: dict[str, Any], picker: Picker, root: Any, depth: int) -> list[Any]:
    least = schema.get("minItems", 0)
    if not isinstance(least, int) or least > _MAX_ITEMS:
        raise ConstraintError(f"minItems of a JSON schema must be an integer of at most {_MAX_ITEMS}")
    fixed = schema.get("prefixItems", [])
    rest = schema.get("items", True)
    found = []
    for place in range(least):
        picker.write(f"{place}:")
        found.append(instance(fixed[place] if place < len(fixed) else rest, picker, root, depth + 1))
    return found


def _string(schema: dict[str, Any], picker: Picker) -> str:
    if "pattern" in schema:
        before = len(picker.text)
        regex.write(regex.parse(str(schema["pattern"])), picker)
        return picker.text[before:]
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    size = max(least, 3) if most is None else max(least, min(3, most))
    before = len(picker.text)
    for _ in range(size):
        picker.write(_LETTERS[picker.below(len(_LETTERS))])
    return picker.text[before:]


def _number(schema: dict[str, Any], *, whole: bool) -> int | float:
    step = _numbers(schema, "multipleOf") or ([1] if whole else [])
    gap = step[0] if step else 0.5
    lows, highs = _numbers(schema, "minimum"), _numbers(schema, "maximum")
    lows += [math.floor(over) + 1 if whole else over + gap for over in _numbers(schema, "exclusiveMinimum")]
    highs += [math.ceil(under) - 1 if whole else under - gap for under in _numbers(schema, "exclusiveMaximum")]
    value: int | float = 0
    if lows and max(lows) > 0:
        value = max(lows)
    elif highs and min(highs) < 0:
        value = min(highs)
    if step and value % step[0]:
        value = math.ceil(value / step[0]) * step[0] if value > 0 else math.floor(value / step[0]) * step[0]
    value = int(value) if whole else value
    if (lows and value < max(lows)) or (highs and value > min(highs)):
        raise ConstraintError("the bounds of a number in a JSON schema leave no value")
    return value


def _numbers(schema: dict[str, Any], name: str) -> list[int | float]:
    value = schema.get(name)
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
