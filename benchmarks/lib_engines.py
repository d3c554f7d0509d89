"""Stand-ins for many engines in one process: what the control plane probes, with the body of a real vLLM.

``/metrics`` answers a recorded body of vLLM 0.32 (about 79 kB) in which the series that move on a serving engine move
with every scrape. As in vLLM, ``/metrics/?name[]=...`` answers the named series only.

Run as a program it listens on N ports of 127.0.0.1 and prints them as one line of JSON.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs

import uvloop

BODY = Path(__file__).parent.parent / "tests/unit/controlplane/recordings/metrics_after.txt"
_LINE = re.compile(rb"^((?:vllm:|http_)[a-zA-Z_:]+(?:\{[^}]*\})?) ([0-9.e+-]+)$", re.MULTILINE)
_STATIC = re.compile(rb"_info|_created|_bucket")
_WIDTH = 12
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\ncontent-length: %d\r\n\r\n"
_TOKENS = b'{"count":3,"max_model_len":2048,"tokens":[1,2,3]}'


class Body:
    """A metrics body with figures that grow by one with every rendering (gauges wander in 0..9)."""

    def __init__(self, text: bytes) -> None:
        self._template = bytearray()
        self._counters: list[int] = []
        self._gauges: list[int] = []
        last = 0
        for match in _LINE.finditer(text):
            if _STATIC.search(match[1]):
                continue
            self._template += text[last : match.start(2)]
            is_gauge = b"num_requests" in match[1] or b"usage_perc" in match[1]
            (self._gauges if is_gauge else self._counters).append(len(self._template))
            self._template += b"0" if is_gauge else b"%d.0" % 10 ** (_WIDTH - 3)
            last = match.end(2)
        self._template += text[last:]
        self.length = len(self._template)

    def render(self, turn: int) -> bytes:
        """The body as scraped for the ``turn``-th time."""
        template = self._template
        digits = b"%d.0" % (10 ** (_WIDTH - 3) + turn)
        for at in self._counters:
            template[at : at + len(digits)] = digits
        gauge = b"%d" % (turn % 10)
        for at in self._gauges:
            template[at : at + 1] = gauge
        return bytes(template)


def only(text: bytes, names: frozenset[bytes]) -> bytes:
    """The lines of ``text`` that belong to the named series, with the comments of their families."""
    kept: list[bytes] = []
    comments: list[bytes] = []
    for line in text.split(b"\n"):
        if line.startswith(b"#"):
            if line.startswith(b"# HELP"):
                comments = []
            comments.append(line)
        elif re.split(rb"[{ ]", line, maxsplit=1)[0] in names:
            kept += [*comments, line]
            comments = []
    return b"\n".join(kept) + b"\n"


class Engine:
    """One engine's state."""

    def __init__(self, bodies: dict[frozenset[bytes], Body], *, filters: bool) -> None:
        self._bodies = bodies
        self._filters = filters
        self._scrapes = 0

    def answer(self, target: bytes) -> bytes:
        """The whole response to a request for ``target``."""
        path, _, query = target.partition(b"?")
        if path == b"/health":
            return _HEAD % 0
        if path == b"/metrics" or (path == b"/metrics/" and self._filters):
            self._scrapes += 1
            names = frozenset(parse_qs(query).get(b"name[]", ())) if path == b"/metrics/" else frozenset()
            body = self._bodies.get(names)
            if body is None:
                body = self._bodies[names] = Body(only(BODY.read_bytes(), names))
            return _HEAD % body.length + body.render(self._scrapes)
        if path == b"/v1/models":
            answer = b'{"object":"list","data":[{"id":"m","object":"model","parent":null,"max_model_len":2048}]}'
        elif path == b"/version":
            answer = b'{"version":"0.32.0"}'
        elif path == b"/tokenize":
            answer = _TOKENS
        else:
            return b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        return _HEAD % len(answer) + answer


class _Connection(asyncio.Protocol):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        data = self._pending + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head = data[:end]
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            after = end + 4 + (int(length[1]) if length else 0)
            if len(data) < after:
                break
            self._transport.write(self._engine.answer(head.split(b" ", 2)[1]))
            data = data[after:]
        self._pending = data


async def serve(count: int, *, filters: bool) -> None:
    """Listen on ``count`` free ports, print them, serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    bodies = {frozenset[bytes](): Body(BODY.read_bytes())}
    ports = []
    for _ in range(count):
        engine = Engine(bodies, filters=filters)
        server = await loop.create_server(partial(_Connection, engine), "127.0.0.1", 0, backlog=16)
        ports.append(server.sockets[0].getsockname()[1])
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--no-filter", action="store_true", help="answer the whole body whatever names are asked for")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.count, filters=not arguments.no_filter))
