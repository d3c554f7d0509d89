"""Strings that match a regular expression.

Understood: literals, escapes (``\\d \\w \\s`` and their opposites, ``\\t \\n \\xhh \\uhhhh``), ``.``, classes, groups,
alternatives, greedy and lazy quantifiers, and the anchors ``^ $``, as the whole text has to match anyway. Look-around,
back references and flags are refused.
"""

from collections.abc import Sequence

import msgspec

from emulator.structured.picker import ConstraintError, Picker

_EXTRA_REPEATS = 8
"""An unbounded repetition goes on at most this often beyond its least count."""
_MAX_DEPTH = 50
_PRINTABLE = [(0x20, 0x7E)]
_WORD = [(ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("_"), ord("_")), (ord("a"), ord("z"))]
_DIGIT = [(ord("0"), ord("9"))]
_SPACE = [(0x09, 0x0D), (0x20, 0x20)]
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}

Ranges = list[tuple[int, int]]


class Chars(msgspec.Struct, frozen=True):
    """One character out of inclusive code point ranges."""

    ranges: tuple[tuple[int, int], ...]


class Repeat(msgspec.Struct, frozen=True):
    """``node`` from ``least`` to ``most`` times; None is unbounded."""

    node: "Node"
    least: int
    most: int | None


class Sequenced(msgspec.Struct, frozen=True):
    """One after the other."""

    nodes: tuple["Node", ...]


class Either(msgspec.Struct, frozen=True):
    """One of several."""

    nodes: tuple["Node", ...]


Node = Chars | Repeat | Sequenced | Either


def parse(pattern: str) -> Node:
    """The pattern as a tree. Raises ConstraintError for what is wrong or not understood."""
    parser = _Parser(pattern)
    node = parser.alternatives()
    if not parser.at_end:
        raise parser.error("unbalanced parenthesis")
    return node


def write(node: Node, picker: Picker) -> None:
    """Write a text that matches. Raises ConstraintError if it would be too long."""
    picker.step()
    if isinstance(node, Chars):
        place = picker.below(sum(last - first + 1 for first, last in node.ranges))
        for first, last in node.ranges:
            if place <= last - first:
                picker.write(chr(first + place))
                return
            place -= last - first + 1
    elif isinstance(node, Sequenced):
        for part in node.nodes:
            write(part, picker)
    elif isinstance(node, Either):
        write(node.nodes[picker.below(len(node.nodes))], picker)
    else:
        count = 0
        most = node.least + _EXTRA_REPEATS if node.most is None else min(node.most, node.least + _EXTRA_REPEATS)
        while count < node.least or (count < most and picker.below(2)):
            write(node.node, picker)
            count += 1


class _Parser:
    """Recursive descent over the pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._position = 0
        self._depth = 0

    @property
    def at_end(self) -> bool:
        return self._position >= len(self._pattern)

    def error(self, reason: str) -> ConstraintError:
        return ConstraintError(f"regex {self._pattern!r}: {reason} at position {self._position}")

    def alternatives(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self.error("too many nested groups")
        found = [self._sequence()]
        while self._take("|"):
            found.append(self._sequence())
        self._depth -= 1
        return found[0] if len(found) == 1 else Either(tuple(found))

    def _sequence(self) -> Node:
        nodes: list[Node] = []
        while not self.at_end and self._peek() not in "|)":
            if self._take("^") or self._take("$"):
                continue
            nodes.append(self._quantified(self._atom()))
        return nodes[0] if len(nodes) == 1 else Sequenced(tuple(nodes))

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == ".":
            return Chars(tuple(_PRINTABLE))
        if char in "*+?":
            raise self.error("nothing to repeat")
        if char == "\\":
            return Chars(tuple(self._escape()))
        return _literal(char)

    def _group(self) -> Node:
        if self._take("?") and not self._take(":"):
            if not self._take("P<") or (end := self._pattern.find(">", self._position)) < 0:
                raise self.error("look-around and flags are not supported")
            self._position = end + 1
        node = self.alternatives()
        if not self._take(")"):
            raise self.error("missing closing parenthesis")
        return node

    def _quantified(self, node: Node) -> Node:
        while not self.at_end:
            bounds = self._bounds()
            if bounds is None:
                break
            self._take("?") or self._take("+")
            least, most = bounds
            if most is not None and most < least:
                raise self.error("wrong bounds of a repetition")
            node = Repeat(node, least, most)
        return node

    def _bounds(self) -> tuple[int, int | None] | None:
        if self._take("*"):
            return 0, None
        if self._take("+"):
            return 1, None
        if self._take("?"):
            return 0, 1
        if self._peek() != "{":
            return None
        end = self._pattern.find("}", self._position)
        least, comma, most = self._pattern[self._position + 1 : max(end, self._position)].partition(",")
        if end < 0 or not (least.isdecimal() or (comma and not least)) or not (most.isdecimal() or not most):
            return None if least[:1].isalpha() else self._wrong_bounds()
        self._position = end + 1
        low = int(least or 0)
        return low, (int(most) if most else None) if comma else low

    def _wrong_bounds(self) -> tuple[int, int | None]:
        raise self.error("wrong bounds of a repetition")

    def _class(self) -> Node:
        opposite = self._take("^")
        ranges: Ranges = []
        first = True
        while first or not self.at_end:
            if self.at_end:
                raise self.error("unterminated character class")
            if self._peek() == "]" and not first:
                break
            first = False
            ranges += self._class_item()
        if not self._take("]"):
            raise self.error("unterminated character class")
        merged = _merged(ranges)
        found = _without(_PRINTABLE, merged) if opposite else merged
        if not found:
            raise self.error("an empty character class")
        return Chars(tuple(found))

    def _class_item(self) -> Ranges:
        low = self._class_char()
        if len(low) > 1 or low[0][0] != low[0][1] or self._pattern[self._position : self._position + 1] != "-":
            return low
        if self._pattern[self._position + 1 : self._position + 2] in ("]", ""):
            return low
        self._position += 1
        high = self._class_char()
        if len(high) > 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
            raise self.error("a wrong character range")
        return [(low[0][0], high[0][0])]

    def _class_char(self) -> Ranges:
        char = self._next()
        return self._escape() if char == "\\" else [(ord(char), ord(char))]

    def _escape(self) -> Ranges:
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.lower() in _CLASSES:
            return _without(_PRINTABLE, _CLASSES[char.lower()])
        if char in ("x", "u"):
            size = 2 if char == "x" else 4
            digits = self._pattern[self._position : self._position + size]
            try:
                code = int(digits, 16)
            except ValueError:
                raise self.error("a wrong escape") from None
            self._position += size
            return [(code, code)]
        if char in _CONTROLS:
            return [(ord(_CONTROLS[char]),) * 2]
        if char.isalnum():
            raise self.error(f"\\{char} is not supported")
        return [(ord(char), ord(char))]

    def _peek(self) -> str:
        return self._pattern[self._position]

    def _next(self) -> str:
        if self.at_end:
            raise self.error("unexpected end")
        self._position += 1
        return self._pattern[self._position - 1]

    def _take(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._position):
            return False
        self._position += len(text)
        return True


def _literal(char: str) -> Chars:
    return Chars(((ord(char), ord(char)),))


def _merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    found: Ranges = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _without(ranges: Sequence[tuple[int, int]], excluded: Sequence[tuple[int, int]]) -> Ranges:
    found: Ranges = []
    for first, last in ranges:
        start = first
        for low, high in _merged(excluded):
            if high < start or low > last:
                continue
            if low > start:
                found.append((start, low - 1))
            start = high + 1
        if start <= last:
            found.append((start, last))
    return found
