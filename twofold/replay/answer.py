"""Taking one answer apart: times, counts, and the proof that every token came once and in order."""

from collections.abc import Callable
from typing import Any

import msgspec

from emulator.tokens import ChainChecker
from twofold.replay.client import Receiver

MAX_PENDING_BYTES = 4 << 20
MAX_ERROR_BYTES = 4096


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    id: str = ""


_DECODE = msgspec.json.Decoder(_Chunk).decode


class Answer(Receiver):
    """The answer to one completion or chat request, streamed or whole.

    ``checker`` verifies the text; None counts a token per event instead. ``on_gap`` gets the seconds between two events
    that carry text. ``failure`` names what went wrong with the answer itself: "http", "error-event", "bad-event",
    "truncated".
    """

    __slots__ = (
        "_error_body",
        "_on_gap",
        "_pending",
        "cached_tokens",
        "checker",
        "complete",
        "completion_tokens",
        "events",
        "failure",
        "finish_reason",
        "first_s",
        "last_s",
        "pieces",
        "prompt_tokens",
        "sse_done",
        "streamed",
    )

    def __init__(
        self, checker: ChainChecker | None, *, keep_text: bool, streamed: bool, on_gap: Callable[[float], None]
    ) -> None:
        super().__init__()
        self.checker = checker
        self.streamed = streamed
        self.pieces: list[str] | None = [] if keep_text else None
        self.first_s = 0.0
        self.last_s = 0.0
        self.events = 0
        self.prompt_tokens = 0
        self.cached_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.finish_reason = ""
        self.sse_done = False
        self.complete = False
        self.failure = ""
        self._on_gap = on_gap
        self._pending = b""
        self._error_body = b""

    @property
    def text(self) -> str:
        """The text, if it was to be kept."""
        return "".join(self.pieces or ())

    @property
    def tokens(self) -> int:
        """Output tokens delivered: by the checker's count, the usage, or the events."""
        if self.checker is not None:
            return self.checker.delivered
        return self.completion_tokens if self.completion_tokens is not None else self.events

    @property
    def error_message(self) -> str:
        """The beginning of an error body."""
        return self._error_body.decode("utf-8", "replace")

    def on_body(self, data: bytes, now_s: float) -> None:
        """See Receiver."""
        if self.status != 200:
            self._error_body = (self._error_body + data)[:MAX_ERROR_BYTES]
            return
        if self._pending:
            data = self._pending + data
        if not self.streamed:
            self._keep_pending(data)
            return
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, rest = data.split(b"\n\n")
        self._keep_pending(rest)
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                self._event(event[6:], now_s)
            else:
                self._odd_event(event, now_s)

    def on_complete(self, now_s: float) -> None:
        """See Receiver."""
        self.complete = True
        if self.status != 200:
            self.failure = "http"
        elif self.streamed:
            if not self.sse_done and not self.failure:
                self.failure = "truncated"
        else:
            self._event(self._pending, now_s)
        self._pending = b""

    def _keep_pending(self, rest: bytes) -> None:
        if len(rest) > MAX_PENDING_BYTES:
            self.failure = self.failure or "bad-event"
            rest = b""
        self._pending = rest

    def _odd_event(self, event: bytes, now_s: float) -> None:
        """Comments, several lines, other fields."""
        lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            self._event(b"\n".join(lines), now_s)

    def _event(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self.sse_done = True
            return
        if self.sse_done:
            self.failure = self.failure or "bad-event"
            return
        try:
            chunk = _DECODE(payload)
        except msgspec.DecodeError:
            self.failure = self.failure or "bad-event"
            return
        if chunk.error is not None:
            self.failure = self.failure or "error-event"
            self._error_body = payload[:MAX_ERROR_BYTES]
            return
        if chunk.choices:
            self._choice(chunk.choices[0], now_s)
        usage = chunk.usage
        if usage is not None:
            self.prompt_tokens = usage.prompt_tokens
            self.completion_tokens = usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.cached_tokens = usage.prompt_tokens_details.cached_tokens

    def _choice(self, choice: _Choice, now_s: float) -> None:
        delta = choice.delta or choice.message
        text = delta.content if delta is not None else choice.text
        if text:
            if self.events:
                self._on_gap(now_s - self.last_s)
            else:
                self.first_s = now_s
            self.last_s = now_s
            self.events += 1
            if self.checker is not None:
                self.checker.feed(text)
            if self.pieces is not None:
                self.pieces.append(text)
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
