"""Stand-ins for vLLM workers: ``python -m dataplane.upstream PORTS`` serves that many ports from one light process.

They answer at once, or stream events at a fixed pace. ``POST /pace {"events", "gap_ms"}`` on any port sets both for
all; the first line of standard output is the list of ports.
"""

import asyncio
import json
import re
import sys

import uvloop

from dataplane.loads import ANSWER_TOKENS
from dataplane.wire import DONE, MODEL, STREAM_HEAD, chunk, stream_events, whole_response

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_METRICS = f"""\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 0.0
vllm:num_requests_waiting{{engine="0",model_name="{MODEL}"}} 0.0
vllm:kv_cache_usage_perc{{engine="0",model_name="{MODEL}"}} 0.0
vllm:prefix_cache_queries_total{{engine="0",model_name="{MODEL}"}} 0.0
vllm:prefix_cache_hits_total{{engine="0",model_name="{MODEL}"}} 0.0
vllm:prompt_tokens_total{{engine="0",model_name="{MODEL}"}} 0.0
vllm:generation_tokens_total{{engine="0",model_name="{MODEL}"}} 0.0
vllm:num_preemptions_total{{engine="0",model_name="{MODEL}"}} 0.0
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="27000"}} 1.0
process_start_time_seconds 1.7952e+09
"""


def _answer(status: bytes, content_type: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nserver: uvicorn\r\ncontent-length: %d\r\ncontent-type: %b\r\n\r\n%b" % (
        status, len(body), content_type, body,
    )  # fmt: skip


def _json(value: object) -> bytes:
    return _answer(b"200 OK", b"application/json", json.dumps(value).encode())


_CARD = {"id": MODEL, "object": "model", "created": 0, "owned_by": "vllm", "root": MODEL, "max_model_len": 131072}
_GET = {
    b"/health": _answer(b"200 OK", b"text/plain", b""),
    b"/metrics": _answer(b"200 OK", b"text/plain", _METRICS.encode()),
    b"/v1/models": _json({"object": "list", "data": [_CARD]}),
    b"/version": _json({"version": "0.32.0"}),
}
_NOT_FOUND = _answer(b"404 Not Found", b"application/json", b'{"detail":"Not Found"}')
_WHOLE = whole_response(ANSWER_TOKENS)


class Pace:
    """Steps all streams from one timer with a resolution of a millisecond; streams keep the phase they began in."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self._phases: list[list[Worker]] = [[]]
        self._active = 0
        self._at_ms = 0

    def set(self, events: int, gap_ms: int) -> None:
        """Events of a stream, and milliseconds between them."""
        self.chunks = [chunk(event) for event in stream_events(events)]
        self.chunks[-1] += chunk(DONE) + b"0\r\n\r\n"
        self._phases = [[] for _ in range(gap_ms)]
        self._active = 0

    def join(self, stream: "Worker") -> None:
        """Send the first event now and the others in pace."""
        loop = asyncio.get_running_loop()
        if not self._active:
            self._at_ms = int(loop.time() * 1000)
            loop.call_later(0.001, self._tick)
        self._active += 1
        self._phases[int(loop.time() * 1000) % len(self._phases)].append(stream)
        stream.transport.write(STREAM_HEAD + self.chunks[0])
        stream.sent = 1

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now_ms = int(loop.time() * 1000)
        phases = self._phases
        while self._at_ms < now_ms:
            self._at_ms += 1
            phase = phases[self._at_ms % len(phases)]
            if phase:
                phases[self._at_ms % len(phases)] = [stream for stream in phase if self._step(stream)]
        if self._active > 0:
            loop.call_later(0.001, self._tick)

    def _step(self, stream: "Worker") -> bool:
        stream.transport.write(self.chunks[stream.sent])
        stream.sent += 1
        more = stream.sent < len(self.chunks) and not stream.transport.is_closing()
        self._active -= not more
        return more


class Worker(asyncio.Protocol):
    """One connection: requests one after the other."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._head = b""
        self._pieces: list[bytes] = []
        self._left = 0
        self.sent = 0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if not self._left:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            length = _LENGTH.search(data, 0, end)
            self._head = data[:end]
            data = data[end + 4 :]
            self._left = int(length[1]) if length else 0
        self._left -= len(data)
        self._pieces.append(data)
        if self._left < 0:
            self.transport.close()  # nothing here pipelines; a proxy that did would be a finding
        elif self._left == 0:
            head, self._head = self._head, b""
            pieces, self._pieces = self._pieces, []
            method, path, _ = head.split(b" ", 2)
            self._serve(method, path, pieces)

    def _serve(self, method: bytes, path: bytes, body: list[bytes]) -> None:
        if path == b"/v1/chat/completions":
            if self._pace.chunks:
                self._pace.join(self)
            else:
                self.transport.write(_WHOLE)
        elif path == b"/pace":
            wanted = json.loads(b"".join(body))
            if wanted["events"]:
                self._pace.set(wanted["events"], wanted["gap_ms"])
            else:
                self._pace.chunks = []
            self.transport.write(_json({}))
        else:
            known = _GET.get(path.partition(b"?")[0], _NOT_FOUND)
            self.transport.write(known if method == b"GET" else _NOT_FOUND)


async def _main(ports: int) -> None:
    loop = asyncio.get_running_loop()
    pace = Pace()
    servers = [await loop.create_server(lambda: Worker(pace), "127.0.0.1", 0, backlog=4096) for _ in range(ports)]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await loop.connect_read_pipe(_UntilClosed, sys.stdin)
    await asyncio.get_running_loop().create_future()


class _UntilClosed(asyncio.Protocol):
    """Ends the process when whoever started it is gone."""

    def connection_lost(self, error: Exception | None) -> None:
        raise SystemExit(0)


if __name__ == "__main__":
    try:
        uvloop.run(_main(int(sys.argv[1])))
    except (KeyboardInterrupt, SystemExit):
        pass
