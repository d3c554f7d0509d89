"""One generation call: its choices, each an engine request, their text, and the bytes of the answer.

Subclasses know the shape of an endpoint's answer. A token of a plain stream takes the fast path: one prepared frame
head, the token's text, one prepared frame tail, one write.
"""

import codecs
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from emulator.model import FinishReason, Request
from emulator.outputs import OutputSource, PlannedOutput, RestrictedChain
from emulator.server.errors import ENGINE_DEAD_EVENT, ApiError, engine_dead
from emulator.server.group import Lane
from emulator.server.http import Exchange
from emulator.server.logprobs import ChoiceLogprobs, Entry
from emulator.structured import Constraint, ConstraintError
from emulator.tokens import TokenChain, decode_bytes, encode, is_special, token_bytes

NO_TOKEN = -1
FINGERPRINT = "vllm-0.32.0-twofold"
DONE_EVENT = b"data: [DONE]\n\n"
dumps = msgspec.json.encode


class ToolPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool that the request demands: what the model writes, and whether the request named the tool."""

    text: str
    named: bool


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What a generation request asks for, after validation.

    ``logprobs``, ``prompt_logprobs``: best others per position, None for no log probabilities at all. ``echo_text``:
    text before that of each chat choice. ``allowed``, ``banned``, ``bad_words``: see ``RestrictedChain``.
    """

    prompts: list[list[int]]
    max_tokens: list[int]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    echo: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    natural_end: bool = False
    priority: int = 0
    cache_salt: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    tokens_as_ids: bool = False
    echo_text: str = ""
    constraint: Constraint | None = None
    tool: ToolPlan | None = None
    allowed: Collection[int] = ()
    banned: Collection[int] = ()
    bad_words: tuple[bytes, ...] = ()
    kv_transfer: dict[str, Any] | None = None

    @property
    def restricted(self) -> bool:
        """Whether the output may be other than the chain."""
        return bool(self.constraint or self.tool or self.allowed or self.banned or self.bad_words)

    @property
    def plain(self) -> bool:
        """Whether every output token shows as four plain characters and nothing else."""
        extras = self.stop or self.return_token_ids or self.continuous_usage or self.restricted
        return not extras and self.logprobs is None

    def source(self, prompt: list[int], child: int) -> OutputSource | None:
        """Where choice ``child`` of a prompt gets its tokens from; None for the plain chain.

        Raises ConstraintError where the constraint leaves no text after this prompt.
        """
        text = self.tool.text if self.tool else None
        if self.constraint and text is None:
            text = self.constraint.text(decode_bytes(prompt), child)
        if text is not None:
            return PlannedOutput(encode(text), prompt)
        if self.allowed or self.banned or self.bad_words:
            return RestrictedChain(prompt, child, allowed=self.allowed, banned=self.banned, bad_words=self.bad_words)
        return TokenChain(prompt, child) if child else None


class Choice:
    """One choice of a call: the sink of one engine request."""

    __slots__ = (
        "_decoder",
        "_hold_back",
        "_logprobs",
        "_sent",
        "engine_id",
        "entries",
        "finish_reason",
        "generation",
        "index",
        "opened",
        "output_tokens",
        "pending",
        "prompt_index",
        "request",
        "stop_reason",
        "text",
        "token_ids",
    )

    def __init__(self, generation: "Generation", index: int, prompt_index: int, request: Request) -> None:
        self.generation = generation
        self.index = index
        self.prompt_index = prompt_index
        self.request = request
        self.engine_id = request.request_id
        self.text = ""
        self.token_ids: list[int] = []
        self.pending: list[int] = []
        self.output_tokens = 0
        self.opened = False
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        call = generation.call
        held = max(map(len, call.stop)) - 1 if call.stop and not call.include_stop else 0
        self._hold_back = held
        self._sent = 0
        self.entries: list[Entry] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace") if call.restricted else None
        self._logprobs: ChoiceLogprobs | None = None
        if call.logprobs is not None:
            prompt = call.prompts[prompt_index]
            child = index - prompt_index * call.n
            self._logprobs = ChoiceLogprobs(prompt, child, call.logprobs, sampled_best=not call.restricted)

    def token(self, token_id: int, request: Request) -> None:
        """A token from the engine, or only the end of the request (``NO_TOKEN``)."""
        if self.finish_reason is not None:
            return
        generation = self.generation
        reason = request.finish_reason
        if token_id != NO_TOKEN:
            self.output_tokens += 1
        if reason is None:
            if self.opened and len(self.pending) + 1 < generation.engine.stream_interval_tokens:
                self.pending.append(token_id)
                return
            if generation.fast and self.opened and not self.pending and not generation.exchange.paused:
                generation.write_fast(self, token_id)
                return
            self.pending.append(token_id)
            call = generation.call
            if generation.exchange.paused if call.stream else not call.stop:
                return
        elif token_id != NO_TOKEN:
            self.pending.append(token_id)
        tokens, self.pending = self.pending, []
        self._take(tokens, reason)

    def died(self) -> None:
        """The engine core died."""
        self.generation.engine_died()

    def _take(self, tokens: list[int], reason: FinishReason | None) -> None:
        spoken = tokens
        if reason is FinishReason.STOP and tokens:
            spoken = tokens[:-1]  # the token that ended it, EOS or a stop id, is not text
        before = len(self.text)
        if self._decoder is None:
            self.text += b"".join(map(token_bytes, spoken)).decode("utf-8", "replace")
        else:
            data = b"".join(token_bytes(token) for token in spoken if not is_special(token))
            self.text += self._decoder.decode(data, reason is not None)
        self.token_ids += tokens
        if self._logprobs is not None:
            self.entries = self._logprobs.take(tokens)
        stopped = self._find_stop(before) if self.generation.call.stop else None
        if stopped is not None:
            self.finish_reason, self.stop_reason = "stop", stopped
            if reason is None:
                self.generation.engine.finish(self.engine_id, FinishReason.STOP)
        elif reason is not None:
            self.finish_reason, self.stop_reason = str(reason), self.request.stop_reason
        end = len(self.text) if self.finish_reason else max(self._sent, len(self.text) - self._hold_back)
        delta, self._sent = self.text[self._sent : end], end
        self.generation.advance(self, delta, tokens)
        call = self.generation.call
        if call.stream and not call.stop:
            self.text, self._sent = "", 0

    def _find_stop(self, before: int) -> str | None:
        call = self.generation.call
        if self.output_tokens <= call.min_tokens:
            return None
        for stop in call.stop:
            start = max(0, before - len(stop) + 1)
            position = self.text.find(stop, start)
            if position >= 0:
                self.text = self.text[: position + len(stop) if call.include_stop else position]
                return stop
        return None


def _nothing() -> None:
    pass


class Generation:
    """Base of the endpoints. ``advance`` is called for every piece of progress outside the fast path."""

    fast = False

    def __init__(self, exchange: Exchange, engine: Lane, call: Call, *, response_id: str, model: str) -> None:
        self.exchange = exchange
        self.engine = engine
        self.call = call
        self.response_id = response_id
        self.model = model
        self.created_s = int(time.time())
        try:
            self._sources = [call.source(prompt, child) for prompt in call.prompts for child in range(call.n)]
        except ConstraintError as error:
            raise ApiError(str(error)) from None
        self.choices: list[Choice] = []
        self.unfinished = 0
        self.on_end: Callable[[], None] = _nothing

    def start(self) -> None:
        """Queue the engine requests and, for a stream, send the head."""
        call, arrival_s = self.call, self.exchange.received_s or self.engine.now_s
        for prompt_index, prompt in enumerate(call.prompts):
            for child in range(call.n):
                index = prompt_index * call.n + child
                source = self._sources[index]
                planned = isinstance(source, PlannedOutput)
                request = Request(
                    f"{self.response_id}-{index}-{secrets.token_hex(4)}",
                    prompt,
                    call.max_tokens[prompt_index],
                    arrival_s=arrival_s,
                    priority=call.priority,
                    min_tokens=0 if planned else call.min_tokens,
                    natural_end=planned or call.natural_end,
                    ignore_eos=call.ignore_eos,
                    stop_token_ids=call.stop_token_ids,
                    cache_salt=call.cache_salt,
                    source=source,
                    read_cache=call.prompt_logprobs is None,
                )
                if call.kv_transfer and self.engine.connector is not None:
                    request.remote_tokens = self.engine.connector.remote_tokens(call.kv_transfer, len(prompt))
                self.choices.append(Choice(self, index, prompt_index, request))
        self.unfinished = len(self.choices)
        self.exchange.on_disconnect = self.abandon
        if call.stream:
            self.exchange.start_stream()
            self.opened_stream()
        for choice in self.choices:
            self.engine.submit(choice.request, choice, call.n)

    def abandon(self) -> None:
        """The client has gone: nobody wants the rest."""
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.finish_reason = "abort"
                self.engine.finish(choice.engine_id, FinishReason.ABORT)
        self.on_end()

    def engine_died(self) -> None:
        """EngineCore died under this call."""
        if self.exchange.finished:
            return
        for choice in self.choices:
            choice.finish_reason = choice.finish_reason or "error"
        if self.call.stream:
            self.exchange.end_stream(self.exchange.frame(ENGINE_DEAD_EVENT) + self.exchange.frame(DONE_EVENT))
        else:
            error = engine_dead()
            self.exchange.respond(error.status, error.body())
        self.on_end()

    def advance(self, choice: Choice, delta: str, tokens: list[int]) -> None:
        """Send what is new of a choice, and the end where it was the last one."""
        if self.call.stream:
            self.send_delta(choice, delta, tokens)
        if choice.finish_reason is not None:
            self.unfinished -= 1
            if not self.unfinished:
                if self.call.stream:
                    self.finish_stream()
                else:
                    self.exchange.respond(200, self.whole_body())
                self.on_end()

    def write_fast(self, choice: Choice, token_id: int) -> None:
        """Send one token of a plain stream."""
        raise NotImplementedError

    def opened_stream(self) -> None:
        """The stream's head has been sent."""

    def send_delta(self, choice: Choice, delta: str, tokens: list[int]) -> None:
        """Send the event of one piece of progress."""
        raise NotImplementedError

    def finish_stream(self) -> None:
        """Send the last events."""
        raise NotImplementedError

    def whole_body(self) -> bytes:
        """The body of an answer that is not streamed."""
        raise NotImplementedError

    def kv_transfer_params(self) -> dict[str, Any] | None:
        """What an engine with a KV connector tells of the first choice's blocks, where another one is to go on."""
        connector = self.engine.connector
        return None if connector is None else connector.offered(self.call.kv_transfer, self.choices[0].request)

    def send_event(self, data: bytes) -> None:
        """Send one SSE event without a name."""
        self.exchange.write(self.exchange.frame(b"data: " + data + b"\n\n"))

    def prompt_tokens(self) -> int:
        """Prompt tokens over all prompts, each counted once however many choices it has."""
        return sum(map(len, self.call.prompts))

    def output_tokens(self) -> int:
        """Output tokens over all choices."""
        return sum(choice.output_tokens for choice in self.choices)

    def cached_tokens(self) -> int:
        """Prompt tokens of the first choice found in the prefix cache."""
        return self.choices[0].request.cached_tokens or 0


def usage_numbers(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    """The three counts of a usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
    }


def new_id() -> str:
    """A random request id as vLLM's: 16 hexadecimal digits."""
    return secrets.token_hex(8)
