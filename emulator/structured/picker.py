"""Decisions by hash, and the text they lead to."""

import xxhash

MAX_CHARS = 16_384
"""Longest text that is made up."""
_MAX_STEPS = 200_000


class ConstraintError(Exception):
    """A constraint that is wrong or that this module cannot satisfy; the message says why."""


class Picker:
    """Writes text and decides on the way.

    A decision depends on the bytes before it alone, prompt included. So the rest of a text is the same whether it is
    written in one go or by another engine that is given what there is so far and the rest of the constraint.
    """

    __slots__ = ("_chars", "_draws", "_hasher", "_parts", "_steps")

    def __init__(self, before: bytes, choice: int = 0) -> None:
        self._hasher = xxhash.xxh3_64(before, seed=choice)
        self._parts: list[str] = []
        self._chars = 0
        self._draws = 0
        self._steps = 0

    @property
    def text(self) -> str:
        """What has been written."""
        return "".join(self._parts)

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound`` - 1; 0 without a decision where that is the only one."""
        if bound <= 1:
            return 0
        self._draws += 1
        drawn = xxhash.xxh3_64_intdigest(self._hasher.intdigest().to_bytes(8, "little"), seed=self._draws)
        return drawn % bound

    def step(self) -> None:
        """Count a piece of work. Raises ConstraintError where there is no end to it."""
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise ConstraintError("the constraint takes too much work")

    def write(self, text: str) -> None:
        """Append ``text``. Raises ConstraintError if that is too much."""
        self._parts.append(text)
        self._chars += len(text)
        if self._chars > MAX_CHARS:
            raise ConstraintError(f"the constraint needs more than {MAX_CHARS} characters")
        self._hasher.update(text.encode("utf-8", "replace"))
        self._draws = 0
