"""Counts recorded exchanges that an engine repeated: equal, different, or not comparable.

A test says what it found through the ``tally`` fixture before it asserts. ``tests/contract/conftest.py`` adds the
findings of all processes of a run up and prints one line, ``RESULT {"emulator": {"equal": ...}, "vllm": {...}}``.
"""

from collections.abc import Callable, Iterable
from typing import Any

EQUAL, DIFFERENT, NOT_COMPARABLE = "equal", "different", "not_comparable"
PROPERTY = "recorded exchange"

Tally = Callable[..., None]


def tally_into(properties: list[tuple[str, Any]]) -> Tally:
    """A function ``tally(kind, case, difference, *, comparable=True)`` that notes a finding in a test's properties.

    ``kind``: "emulator" or "vllm"; ``case``: folder and name of the recording; ``difference``: what differs, or None.
    """

    def tally(kind: str, case: str, difference: str | None, *, comparable: bool = True) -> None:
        outcome = NOT_COMPARABLE if not comparable else EQUAL if difference is None else DIFFERENT
        properties.append((PROPERTY, (kind, case, outcome)))

    return tally


def counts(properties: Iterable[tuple[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts of outcomes by kind of engine. A case noted twice counts once, by its worst outcome."""
    worst: dict[tuple[str, str], str] = {}
    order = (NOT_COMPARABLE, EQUAL, DIFFERENT)
    for name, value in properties:
        if name != PROPERTY:
            continue
        kind, case, outcome = value
        known = worst.get((kind, case), NOT_COMPARABLE)
        worst[kind, case] = max(known, outcome, key=order.index)
    found: dict[str, dict[str, int]] = {}
    for (kind, _), outcome in worst.items():
        entry = found.setdefault(kind, {EQUAL: 0, DIFFERENT: 0, NOT_COMPARABLE: 0})
        entry[outcome] += 1
    return found


def different(properties: Iterable[tuple[str, Any]]) -> list[str]:
    """The cases that differ, as "kind case"."""
    every = {value for name, value in properties if name == PROPERTY}
    return sorted(f"{kind} {case}" for kind, case, outcome in every if outcome == DIFFERENT)
