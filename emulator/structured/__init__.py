"""Text that satisfies a structured-output constraint: a choice, a regular expression, a JSON schema. Pure."""

from emulator.structured.constraint import Constraint, count_kinds, parse_constraint, response_format_constraint
from emulator.structured.picker import ConstraintError

__all__ = ["Constraint", "ConstraintError", "count_kinds", "parse_constraint", "response_format_constraint"]
