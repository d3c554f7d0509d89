"""The loads, and the requests they are made of: conversations that share system prompts and histories."""

import json
import random
from collections.abc import Iterator
from typing import NamedTuple

from dataplane.wire import MODEL

ANSWER_TOKENS = 16
"""Length of an unstreamed answer: short, so that the cost of the request is what is measured."""
_SYSTEM_PROMPTS = 8
_SESSIONS = 64


class Load(NamedTuple):
    """``events`` 0: unstreamed, as many requests as ``requests_per_s`` and the burst's seconds say."""

    name: str
    key: str
    connections: int
    prompt_bytes: int
    requests_per_s: int = 0
    events: int = 0
    gap_ms: int = 0

    def requests(self, seconds: float) -> int:
        """Requests of one burst."""
        return self.connections if self.events else max(self.connections, round(self.requests_per_s * seconds))

    def units(self, seconds: float) -> int:
        """What costs are divided by: requests, or streamed events."""
        return self.requests(seconds) * max(1, self.events)


LOADS = {
    load.name: load
    for load in (
        Load("ns1", "us_per_request_1k", 64, 1024, requests_per_s=5000),
        Load("ns32", "us_per_request_32k", 64, 32 * 1024, requests_per_s=2500),
        Load("s64", "us_per_event_64", 64, 1024, events=200, gap_ms=12),
        Load("s512", "us_per_event_512", 512, 1024, events=60, gap_ms=80),
    )
}


FILL = Load("fill", "", 64, 1280, requests_per_s=1)


def unrelated_requests(count: int) -> Iterator[bytes]:
    """Requests that share nothing: each is a new prefix, so that every bounded map fills up."""
    filler = b" all of this is padding" * 50
    for number in range(count):
        body = b'{"messages":[{"role":"user","content":"%016x%b"}],"model":"%b","max_tokens":%d}' % (
            number * 0x9E3779B97F4A7C15 % (1 << 64),
            filler,
            MODEL.encode(),
            ANSWER_TOKENS,
        )
        yield _request(body)


def _request(body: bytes) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: router\r\nAccept: application/json\r\n"
        b"Content-Type: application/json\r\nUser-Agent: OpenAI/Python 2.8.0\r\nAuthorization: Bearer sk-none\r\n"
        b"X-Stainless-Lang: python\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def requests(load: Load, round_number: int, count: int) -> Iterator[bytes]:
    """The requests of one burst, the same for every proxy, different in every round.

    Each belongs to one of 64 conversations over 8 system prompts and ends in text of its own; half its bytes are the
    system prompt, a third the conversation so far.
    """
    rng = random.Random(f"{load.prompt_bytes} {round_number}")
    words = [" " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    words += ["\n", ' "so"', " naïve", ".\n\n"]

    def text(size: int) -> str:
        made = ""
        while len(made) < size:
            made += "".join(rng.choices(words, k=16))
        return made[:size]

    # System prompts are those of applications: they stay from round to round, conversations do not.
    stable = random.Random(load.prompt_bytes)
    systems = ["".join(stable.choices(words[:100], k=load.prompt_bytes // 10)) for _ in range(_SYSTEM_PROMPTS)]
    begun = []
    for number in range(_SESSIONS):
        messages = [{"role": "system", "content": systems[number % _SYSTEM_PROMPTS]}]
        for turn in range(2):
            role = ("user", "assistant")[turn]
            messages.append({"role": role, "content": text(load.prompt_bytes // 6)})
        begun.append(json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode()[:-1])
    tail = b'"}],"model":"%b","max_tokens":%d,"temperature":0.7%b}' % (
        MODEL.encode(),
        load.events or ANSWER_TOKENS,
        b',"stream":true' if load.events else b"",
    )
    asked = [json.dumps(text(min(2048, load.prompt_bytes // 6)), ensure_ascii=False).encode()[1:-1] for _ in range(97)]
    for number in range(count):
        history = begun[rng.randrange(_SESSIONS)]
        body = b'{"messages":%b,{"role":"user","content":"%016x %b%b' % (
            history, rng.getrandbits(64), asked[number % 97], tail,
        )  # fmt: skip
        yield _request(body)
