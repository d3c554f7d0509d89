"""Messages as plain dictionaries with stable keys, and those as JSON and YAML.

Keys are the field names of ``proto/twofold/v1`` (snake_case, with units). Every key is always there: an absent message
or optional field is null. Integers are numbers, enum values are lower-case words without their prefix, numbers that
JSON does not know (NaN, infinities) are null, and bytes are text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message


def document(message: Message) -> dict[str, Any]:
    """A message and all messages in it as a dictionary."""
    fields: Sequence[Any] = message.DESCRIPTOR.fields
    return {field.name: _field(message, field) for field in fields}


def enum_word(kind: EnumDescriptor, number: int) -> str:
    """Value of an enum as a word: HEALTH_HEALTHY -> "healthy"; the number of a value that is not known here."""
    value = kind.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in kind.name).lstrip("_") + "_"
    return str(value.name).removeprefix(prefix).lower()


def to_json(value: Mapping[str, Any]) -> str:
    """JSON text, indented, ASCII only: nothing in it can steer a terminal."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def to_yaml(value: Mapping[str, Any]) -> str:
    """YAML text with the same content as the JSON."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(value, Dumper=dumper, sort_keys=False, width=1000))


def _field(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            return {str(key): _scalar(kind.fields_by_name["value"], value[key]) for key in sorted(value)}
        return [_scalar(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _scalar(field, value)


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return document(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value
