"""A small verified load for end-to-end tests: streams that check every token against the engine's chain."""

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from emulator.tokens import TokenChain, decode, encode


@dataclass
class Outcome:
    """What became of one request."""

    ok: bool
    status: int
    tokens: int = 0
    error: str = ""
    worker: str = ""


@dataclass
class Load:
    """Closed-loop streams against a router until told to stop; ``started`` and ``outcomes`` grow meanwhile."""

    urls: list[str]
    model: str
    max_tokens: int = 24
    prompt_tokens: int = 600
    outcomes: list[Outcome] = field(default_factory=list)
    first_tokens: int = 0
    _stop: bool = False

    async def run(self, streams: int) -> None:
        """Keep ``streams`` requests running until ``stop``."""
        counter = itertools.count()
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self._stream(session, counter) for _ in range(streams)))

    def stop(self) -> None:
        """Let the running requests end, start no more."""
        self._stop = True

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait until ``condition()`` holds. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    def errors(self) -> list[Outcome]:
        """Requests that did not end well."""
        return [outcome for outcome in self.outcomes if not outcome.ok]

    async def _stream(self, session: aiohttp.ClientSession, counter: "itertools.count[int]") -> None:
        while not self._stop:
            number = next(counter)
            prompt = decode([256 + 26 + 676 + (number * 31 + i * 7) % 17_576 for i in range(self.prompt_tokens)])
            url = self.urls[number % len(self.urls)]
            self.outcomes.append(await self.one(session, url, prompt))

    async def one(self, session: aiohttp.ClientSession, url: str, prompt: str) -> Outcome:
        """One streamed completion, verified token by token."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "stream": True,
            "ignore_eos": True,
            "temperature": 0,
        }
        chain = TokenChain(encode(prompt))
        expected = decode([chain.next() for _ in range(self.max_tokens)])
        text, finish = "", None
        try:
            async with session.post(f"{url}/v1/completions", json=body) as reply:
                worker = reply.headers.get("x-twofold-worker", "")
                if reply.status != 200:
                    return Outcome(False, reply.status, error=(await reply.text())[:300])
                async for line in reply.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        return Outcome(False, 200, error=str(event["error"]), worker=worker)
                    for choice in event["choices"]:
                        if not text:
                            self.first_tokens += 1
                        text += choice["text"]
                        finish = choice["finish_reason"] or finish
        except (aiohttp.ClientError, TimeoutError) as error:
            return Outcome(False, 0, error=repr(error))
        if text != expected:
            return Outcome(False, 200, error="tokens differ from the chain", worker=worker)
        return Outcome(finish == "length", 200, tokens=self.max_tokens, error=f"finish {finish}", worker=worker)
