"""What a recorded scenario and its repetition have in common: how streams end, what is answered, which metrics move."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from .client import Response, exchange, open_request, parse, read_response

RECORDINGS = Path(__file__).parent / "recordings"
_CHANGING = ("date", "content-length")
_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
_END_NAMES = {"truncated-eof": "truncated", "eof": "truncated", "reset": "truncated", "closed-by-client": "closed"}


def load(case: str) -> dict[str, Any]:
    """A recording by folder and name."""
    return dict(json.loads((RECORDINGS / f"{case}.json").read_text()))


def ending(response: Response | Mapping[str, Any] | None) -> dict[str, Any]:
    """Status, header names and order, how the connection ended, and the events after the last plain one."""
    if isinstance(response, Response):
        chunks = None if response.chunks is None else [chunk.decode("utf-8", "replace") for chunk in response.chunks]
        body = response.body.decode("utf-8", "replace") if chunks is None else None
        return _ending(response.status or None, response.headers, response.end, chunks, body)
    if response is None or "error" in response:
        return {"refused": True}
    chunks = [chunk for _, chunk in response["chunks"]] if "chunks" in response else None
    body = json.dumps(response["json"]) if "json" in response else response.get("text")
    return _ending(response["status"], response.get("headers", []), response["end"], chunks, body)


def _ending(status: int | None, headers: Any, end: str, chunks: list[str] | None, body: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"status": status, "end": _END_NAMES.get(end, end)}
    if status is None:
        return found
    found["headers"] = [(name.lower(), "*" if name.lower() in _CHANGING else value) for name, value in headers]
    if chunks is not None:
        found["last events"] = _tail(chunks)
    elif body:
        found["error"] = _error_of(body)
    return found


def _error_of(body: str) -> Any:
    try:
        value = json.loads(body)
    except ValueError:
        return body
    return value.get("error") or value.get("status") if isinstance(value, dict) else value


def _tail(chunks: list[str]) -> list[Any]:
    tail: list[Any] = []
    for chunk in reversed(chunks):
        data = chunk.strip().removeprefix("data: ")
        if data == "[DONE]":
            tail.append("[DONE]")
            continue
        try:
            event = json.loads(data)
        except ValueError:
            break
        if "error" in event:
            tail.append(event)
            continue
        choice = (event.get("choices") or [{}])[0]
        if choice.get("finish_reason") is None:
            break
        shown = {name: choice.get(name) for name in ("finish_reason", "stop_reason")}
        tail.append({**shown, "keys": sorted(event), "choice keys": sorted(choice)})
    return tail[::-1]


def output_tokens(chunks: list[bytes] | None) -> int:
    """Token ids in the chunks of a stream that carries them."""
    found = 0
    for chunk in chunks or []:
        data = chunk.decode().strip().removeprefix("data: ")
        if data != "[DONE]":
            found += sum(len(choice.get("token_ids") or ()) for choice in json.loads(data).get("choices", ()))
    return found


class Stream:
    """A request read by a thread of its own; ``silence_s``: it gives up after so long without a byte."""

    def __init__(
        self,
        url: str,
        path: str,
        body: Any,
        *,
        headers: dict[str, str] | None = None,
        silence_s: float = 60.0,
        method: str = "POST",
    ) -> None:
        self.response: Response | None = None
        self.received = b""
        self.longest_gap_s = 0.0
        self._changed = threading.Condition()
        self._last_s = 0.0
        self.socket = open_request(url, method, path, body, headers=headers, timeout_s=silence_s)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.response = read_response(self.socket, until=self._seen)
        except OSError:
            self.response = Response(status=0, reason="", headers=[], body=b"", chunks=None, end="truncated")
        with self._changed:
            self._changed.notify_all()

    def _seen(self, received: bytes) -> bool:
        now_s = time.monotonic()
        with self._changed:
            if len(received) > len(self.received):
                if self._last_s:
                    self.longest_gap_s = max(self.longest_gap_s, now_s - self._last_s)
                self._last_s = now_s
                self.received = received
                self._changed.notify_all()
        return False

    @property
    def ended(self) -> bool:
        """Whether the response is over, in whatever way."""
        return self.response is not None

    def events(self) -> int:
        """Events that have come."""
        return self.received.count(b"data: {")

    def wait_events(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until ``count`` events have come."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.events() >= count or self.ended, timeout_s)
        assert came, f"{self.events()} events instead of {count}"
        assert self.events() >= count, f"the stream ended after {self.events()} events: {self.received[-400:]!r}"

    def finish(self, timeout_s: float = 90.0) -> Response:
        """The response, once it is over."""
        self._thread.join(timeout_s)
        assert self.response is not None, f"no end after {timeout_s} s"
        self.socket.close()
        return self.response

    def hang_up(self) -> None:
        """Close the connection as a client that has had enough."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.finish()

    def partial(self) -> Response | None:
        """What has come so far."""
        return parse(self.received)


class Metrics(msgspec.Struct, kw_only=True):
    """The series of one scrape that the recordings of scenarios show."""

    running: float
    waiting: float
    kv_usage: float
    generated: float
    success: dict[str, float]


def scrape(url: str) -> Metrics:
    """Ask ``/metrics``."""
    return metrics_of(exchange(url, "GET", "/metrics").body.decode())


def metrics_of(text: str) -> Metrics:
    """The interesting series of a page, summed over ranks."""
    values = {name: sum_of(text, name) for name in (*_GAUGES, "vllm:generation_tokens_total")}
    success: dict[str, float] = {}
    for line in text.splitlines():
        match = re.match(r'vllm:request_success_total\{.*finished_reason="(\w+)".*\} (\S+)$', line)
        if match:
            success[match[1]] = success.get(match[1], 0.0) + float(match[2])
    running, waiting, kv_usage = (values[name] for name in _GAUGES)
    generated = values["vllm:generation_tokens_total"]
    return Metrics(running=running, waiting=waiting, kv_usage=kv_usage, generated=generated, success=success)


def sum_of(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of a series with these labels."""
    total = 0.0
    for line in text.splitlines():
        named = line.startswith((name + "{", name + " "))
        if named and all(f'{key}="{value}"' in line for key, value in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


def recorded_metrics(point: Mapping[str, Any]) -> Metrics:
    """A point of a recorded timeline."""
    return Metrics(
        running=point[_GAUGES[0]],
        waiting=point[_GAUGES[1]],
        kv_usage=point[_GAUGES[2]],
        generated=point.get("vllm:generation_tokens_total", 0.0),
        success={name[8:]: value for name, value in point.items() if name.startswith("success:")},
    )


def movement(before: Metrics, during: Metrics, after: Metrics) -> dict[str, Any]:
    """How the series moved, in what can be compared between engines of different speed."""
    return {
        "running": (before.running, during.running, after.running),
        "waiting": (before.waiting, during.waiting, after.waiting),
        "kv used": (before.kv_usage > 0, during.kv_usage > 0, after.kv_usage > 0),
        "tokens counted meanwhile": before.generated < during.generated <= after.generated,
        "ends counted": {name: after.success[name] - before.success[name] for name in before.success},
    }


def recorded_movement(timeline: list[dict[str, Any]]) -> dict[str, Any]:
    """The movement of a recorded timeline; its middle is where most ran."""
    points = [recorded_metrics(point) for point in timeline if _GAUGES[0] in point]
    return movement(points[0], max(points, key=lambda point: point.running), points[-1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def attempt(url: str, method: str, path: str, body: Any = None, *, timeout_s: float = 20.0) -> Response | None:
    """One exchange; None where the connection is refused."""
    try:
        return exchange(url, method, path, body, timeout_s=timeout_s)
    except (ConnectionRefusedError, ConnectionResetError):
        return None


def apart(expected: Any, got: Any) -> str | None:
    """What differs between two stories, or None."""
    if expected == got:
        return None
    if isinstance(expected, dict) and isinstance(got, dict):
        lines = [
            f"{name}: expected {expected.get(name)!r}, got {got.get(name)!r}"
            for name in sorted(expected.keys() | got.keys())
            if expected.get(name) != got.get(name)
        ]
        return "\n".join(lines)
    return f"expected {expected!r}, got {got!r}"
