"""Load of the soak: streams without end, each checked token by token, and what clients do to a router in earnest."""

import asyncio
import contextlib
import random
from array import array
from collections import Counter
from collections.abc import Callable

import msgspec

from emulator.tokens import FIRST_OUTPUT_ID, ChainChecker, ChainViolation, chat_prompt_ids, decode_bytes
from twofold.replay.answer import Answer
from twofold.replay.client import Client, ExchangeError

WORDS = 1 << 18
WORD_BYTES = 4
SYSTEM_PROMPTS = 40
MAX_ERRORS_KEPT = 20


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """What the streams are like. Shares are of all requests; tokens are bounds of uniform draws."""

    output_tokens: tuple[int, int] = (8, 160)
    system_tokens: tuple[int, int] = (60, 1200)
    user_tokens: tuple[int, int] = (20, 400)
    big_tokens: tuple[int, int] = (8_000, 30_000)
    big_share: float = 0.02
    leave_share: float = 0.05
    """Clients that leave in the middle of their stream."""
    whole_share: float = 0.05
    """Requests without streaming."""
    chat_share: float = 0.3
    close_share: float = 0.2
    """Requests after which the connection is not used again."""


class Totals:
    """What came of all requests so far."""

    def __init__(self) -> None:
        self.requests = 0
        self.disconnects = 0
        self.delivered = 0
        self.verified = 0
        self.violations: list[str] = []
        self.errors: Counter[str] = Counter()
        self.error_texts: list[str] = []

    def failed(self, kind: str, text: str) -> None:
        """Count a request that did not end as it should."""
        self.errors[kind] += 1
        if len(self.error_texts) < MAX_ERRORS_KEPT:
            self.error_texts.append(f"{kind}: {text[:300]}")


class Corpus:
    """Random words of one token each; prompts are cut out of it, so that making one costs next to nothing."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self._ids = array("I", [FIRST_OUTPUT_ID + rng.randrange(26**3) for _ in range(WORDS)])
        self._text = decode_bytes(self._ids)

    def cut(self, start: int, tokens: int) -> tuple["array[int]", bytes]:
        """``tokens`` words from ``start`` on: their ids and their text."""
        return self._ids[start : start + tokens], self._text[WORD_BYTES * start : WORD_BYTES * (start + tokens)]


class _Left(Exception):
    """The client goes away in the middle of its stream, as it meant to."""


class _Leaver(Answer):
    """An answer whose client leaves after some events."""

    __slots__ = ("_after",)

    def __init__(self, checker: ChainChecker, after: int) -> None:
        super().__init__(checker, keep_text=False, streamed=True, on_gap=_ignore)
        self._after = after

    def on_body(self, data: bytes, now_s: float) -> None:
        super().on_body(data, now_s)
        if self.events >= self._after and self.done is not None and not self.done.done():
            self.done.set_exception(_Left())


class SoakLoad:
    """Keeps ``streams`` requests under way through ``client`` until cancelled."""

    def __init__(self, client: Client, model: str, *, mix: Mix, seed: int, timeout_s: float) -> None:
        self.totals = Totals()
        self.under_way = 0
        self._client = client
        self._model = model.encode()
        self._mix = mix
        self._seed = seed
        self._timeout_s = timeout_s
        self._corpus = Corpus(seed)
        rng = random.Random(seed + 1)
        self._systems = [(self._start(rng), rng.randint(*mix.system_tokens)) for _ in range(SYSTEM_PROMPTS)]

    async def run(self, streams: int, ramp_s: float) -> None:
        """Start the streams evenly over ``ramp_s``; ends by cancellation, which all clients take as a cue to leave."""
        await asyncio.gather(*(self._stream(number, number * ramp_s / streams) for number in range(streams)))

    async def fill(self, requests: int, concurrency: int, progress: Callable[[int], None]) -> None:
        """``requests`` short ones with prefixes never seen before, so that every table of the router gets full."""
        left = iter(range(requests))
        rng = random.Random(self._seed + 2)

        async def worker() -> None:
            for number in left:
                await self._tokenize(rng)
                if number % 1000 == 0:
                    progress(number)

        await asyncio.gather(*(worker() for _ in range(concurrency)))

    async def _tokenize(self, rng: random.Random) -> None:
        _, text = self._corpus.cut(self._start(rng), 280)
        body = b'{"model":"%s","prompt":"%s"}' % (self._model, text)
        answer = Answer(None, keep_text=False, streamed=False, on_gap=_ignore)
        self.totals.requests += 1
        try:
            await self._client.send(answer, "/tokenize", body, timeout_s=self._timeout_s)
        except ExchangeError as error:
            self.totals.failed(error.kind, str(error))
            return
        if answer.status != 200:
            self.totals.failed(f"http-{answer.status}", answer.error_message)

    async def _stream(self, number: int, wait_s: float) -> None:
        rng = random.Random(self._seed * 1_000_003 + number)
        await asyncio.sleep(wait_s)
        while True:
            self.under_way += 1
            try:
                await self._one(rng)
            finally:
                self.under_way -= 1

    async def _one(self, rng: random.Random) -> None:
        mix, totals = self._mix, self.totals
        tokens = rng.randint(*mix.output_tokens)
        path, fragment, ids = self._prompt(rng)
        whole = rng.random() < mix.whole_share
        leaves = not whole and rng.random() < mix.leave_share
        checker = ChainChecker(ids)
        if leaves:
            answer: Answer = _Leaver(checker, rng.randint(1, tokens))
        else:
            answer = Answer(checker, keep_text=False, streamed=not whole, on_gap=_ignore)
        tail = b',"model":"%s","max_tokens":%d,"min_tokens":%d,"ignore_eos":true,"temperature":0' % (
            self._model,
            tokens,
            tokens,
        )
        body = b"{" + fragment + tail + (b"}" if whole else b',"stream":true}')
        close = "connection: close\r\n" if rng.random() < mix.close_share else ""
        totals.requests += 1
        try:
            await self._client.send(answer, path, body, timeout_s=self._timeout_s, headers=close)
        except (_Left, asyncio.CancelledError) as ending:
            totals.disconnects += 1
            self._judge(answer, None)
            if isinstance(ending, asyncio.CancelledError):
                raise
        except ExchangeError as error:
            totals.failed(error.kind, str(error))
            self._judge(answer, None)
            await asyncio.sleep(0.1)  # a router that refuses everything must not be stormed by all streams at once
        else:
            if answer.failure:
                totals.failed(f"{answer.failure}-{answer.status}", answer.error_message)
            elif answer.finish_reason != "length":
                totals.failed("finish-reason", answer.finish_reason)
            self._judge(answer, None if answer.failure else tokens)

    def _judge(self, answer: Answer, expected_tokens: int | None) -> None:
        """Add up the proof; without ``expected_tokens`` only what came is judged."""
        checker, totals = answer.checker, self.totals
        assert checker is not None
        if expected_tokens is not None:
            with contextlib.suppress(ChainViolation):
                checker.finish(expected_tokens)
        totals.delivered += checker.delivered
        totals.verified += checker.verified
        if checker.violation is not None:
            totals.violations.append(str(checker.violation))

    def _prompt(self, rng: random.Random) -> tuple[str, bytes, list[int]]:
        """Path, the prompt as a member of the body, and its token ids."""
        mix = self._mix
        start, length = rng.choice(self._systems)
        system_ids, system = self._corpus.cut(start, length)
        bounds = mix.big_tokens if rng.random() < mix.big_share else mix.user_tokens
        user_ids, user = self._corpus.cut(self._start(rng), rng.randint(*bounds))
        if rng.random() < mix.chat_share:
            messages = [{"role": "system", "content": system.decode()}, {"role": "user", "content": user.decode()}]
            return "/v1/chat/completions", b'"messages":' + msgspec.json.encode(messages), chat_prompt_ids(messages)
        return "/v1/completions", b'"prompt":"%s%s"' % (system, user), [*system_ids, *user_ids]

    def _start(self, rng: random.Random) -> int:
        return rng.randrange(WORDS - self._mix.big_tokens[1])


def _ignore(_: float) -> None:
    pass
