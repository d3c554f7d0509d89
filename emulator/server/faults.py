"""Faults that an engine can be told to show."""

import enum
from typing import Any

import msgspec

from emulator.tokens import FIRST_OUTPUT_ID


class TokenFault(enum.Enum):
    """What happens to one token."""

    NONE = enum.auto()
    DIE = enum.auto()
    CORRUPT = enum.auto()
    DROP = enum.auto()
    DOUBLE = enum.auto()


class FaultRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /faults``.

    ``kind``: die_after_tokens (``tokens``, ``mode``: "process" SIGKILLs the process with all its engines, "engine_core"
    ends streams with vLLM's error event, "abrupt" breaks off its connections), hang, slow (``factor``), refuse
    (listener closed), status (``status`` on generation calls, the next ``count`` ones or all), black_hole (accepts,
    never answers), corrupt_token, drop_token, double_token (after ``tokens`` more tokens, ``count`` times),
    fail_scaling (``step``: "prepare" or "commit" of the next elastic scaling fails). ``rank``: of an engine with
    data-parallel ranks this one alone; without it all, for die_after_tokens the first.
    """

    kind: str
    engine: int = 0
    rank: int | None = None
    step: str = "commit"
    tokens: int = 0
    mode: str = "process"
    factor: float = 1.0
    status: int = 500
    count: int | None = None


class FaultError(ValueError):
    """A fault that makes no sense; the message is one line."""


_TOKEN_KINDS = {
    "corrupt_token": TokenFault.CORRUPT,
    "drop_token": TokenFault.DROP,
    "double_token": TokenFault.DOUBLE,
}
KINDS = ("die_after_tokens", "hang", "slow", "refuse", "status", "black_hole", "fail_scaling", *_TOKEN_KINDS)
DIE_MODES = ("process", "engine_core", "abrupt")


class Faults:
    """The faults of one engine. Those that concern tokens count tokens over all its requests."""

    def __init__(self) -> None:
        self.hang = False
        self.slow_factor = 1.0
        self.refuse = False
        self.black_hole = False
        self.status = 0
        self.status_left = -1
        self.die_after: int | None = None
        self.die_mode = "process"
        self._pending: list[tuple[TokenFault, int, int]] = []

    @property
    def armed(self) -> bool:
        """Whether tokens must be looked at one by one."""
        return self.die_after is not None or bool(self._pending)

    def add(self, request: FaultRequest) -> None:
        """Put one more fault in force. Raises FaultError."""
        if request.kind not in KINDS:
            raise FaultError(f"unknown fault {request.kind!r}; known: {', '.join(KINDS)}")
        if request.tokens < 0 or (request.count is not None and request.count < 1):
            raise FaultError("tokens must not be negative and count must be at least 1")
        if request.kind in _TOKEN_KINDS:
            self._pending.append((_TOKEN_KINDS[request.kind], request.tokens, request.count or 1))
        elif request.kind == "die_after_tokens":
            if request.mode not in DIE_MODES:
                raise FaultError(f"unknown mode {request.mode!r}; known: {', '.join(DIE_MODES)}")
            self.die_after, self.die_mode = request.tokens, request.mode
        elif request.kind == "slow":
            if not 0 < request.factor <= 1000:
                raise FaultError("factor must be above 0 and at most 1000")
            self.slow_factor = request.factor
        elif request.kind == "status":
            if not 400 <= request.status <= 599:
                raise FaultError("status must be from 400 to 599")
            self.status, self.status_left = request.status, request.count or -1
        else:
            setattr(self, request.kind, True)

    def take_status(self) -> int:
        """The status that the next generation call must get, 0 for none."""
        if not self.status or not self.status_left:
            return 0
        if self.status_left > 0:
            self.status_left -= 1
        return self.status

    def next_token(self, last: bool) -> TokenFault:
        """What happens to the next token. A request's last token is never dropped: its end must still be seen."""
        if self.die_after is not None:
            if self.die_after <= 0:
                return TokenFault.DIE
            self.die_after -= 1
        for index, (fault, after, count) in enumerate(self._pending):
            if after > 0:
                self._pending[index] = (fault, after - 1, count)
                continue
            if last:
                return TokenFault.NONE
            if count > 1:
                self._pending[index] = (fault, 0, count - 1)
            else:
                del self._pending[index]
            return fault
        return TokenFault.NONE

    def describe(self) -> dict[str, Any]:
        """The faults in force, for the admin port."""
        found: dict[str, Any] = {name: True for name in ("hang", "refuse", "black_hole") if getattr(self, name)}
        if self.slow_factor != 1.0:
            found["slow"] = self.slow_factor
        if self.status and self.status_left:
            found["status"] = self.status
        if self.die_after is not None:
            found["die_after_tokens"] = self.die_after
        if self._pending:
            found["tokens"] = [fault.name.lower() for fault, _, _ in self._pending]
        return found


def other_output_id(token: int) -> int:
    """A different output id of the same text length."""
    return token + 1 if token == FIRST_OUTPUT_ID else token - 1
