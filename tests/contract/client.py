"""A raw HTTP client for contract tests: header order, chunk borders and how a response ended are all visible."""

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec


class Response(msgspec.Struct, kw_only=True):
    """``end``: complete, truncated (the connection ended inside the response), closed (by us) or timeout."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    chunks: list[bytes] | None
    end: str

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[str | None, str]]:
        """Server-sent events: (name, data)."""
        found = []
        for block in self.body.decode().split("\n\n")[:-1]:
            name, data = None, []
            for line in block.split("\n"):
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    data.append(line[6:])
            found.append((name, "\n".join(data)))
        return found

    def deltas(self) -> list[Any]:
        """The JSON of all events but the closing one."""
        return [json.loads(data) for _, data in self.events() if data != "[DONE]"]


def open_request(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    *,
    raw: bytes | None = None,
    timeout_s: float = 60.0,
    close: bool = True,
) -> socket.socket:
    """Send a request and return the socket."""
    parts = urlsplit(url)
    data = raw if raw is not None else (json.dumps(body).encode() if body is not None else b"")
    fields = {"Host": parts.netloc, "Accept": "*/*"}
    if close:
        fields["Connection"] = "close"
    if data or method == "POST":
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    fields |= headers or {}
    sock = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    sock.sendall(head.encode("latin-1") + b"\r\n" + data)
    return sock


def read_response(sock: socket.socket, until: Callable[[bytes], bool] | None = None) -> Response:
    """Read one response to its end, or until ``until`` is true of what has come (then the socket is closed)."""
    received = b""
    end = "truncated"
    while True:
        parsed = parse(received)
        if parsed is not None and parsed.end == "complete":
            return parsed
        if until is not None and until(received):
            end = "closed"
            sock.close()
            break
        try:
            data = sock.recv(65536)
        except TimeoutError:
            end = "timeout"
            break
        except ConnectionResetError:
            break
        if not data:
            break
        received += data
    parsed = parse(received)
    if parsed is None:
        return Response(status=0, reason="", headers=[], body=received, chunks=None, end=end)
    parsed.end = "complete" if parsed.end == "complete" else end
    return parsed


def exchange(url: str, method: str, path: str, body: Any = None, **options: Any) -> Response:
    """One request on its own connection."""
    with open_request(url, method, path, body, **options) as sock:
        return read_response(sock)


def parse(received: bytes) -> Response | None:
    """The response in ``received``: None without a whole head, ``end`` empty while the body is not complete."""
    head, separator, rest = received.partition(b"\r\n\r\n")
    if not separator:
        return None
    lines = head.decode("latin-1").split("\r\n")
    _, status, *reason = lines[0].split(" ", 2)
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines[1:])]
    fields = {name.lower(): value for name, value in headers}
    response = Response(status=int(status), reason=" ".join(reason), headers=headers, body=b"", chunks=None, end="")
    if fields.get("transfer-encoding") != "chunked":
        length = int(fields.get("content-length", "0"))
        response.body = rest[:length]
        response.end = "complete" if len(rest) >= length else ""
        return response
    response.chunks = []
    position = 0
    while (line_end := rest.find(b"\r\n", position)) >= 0:
        size = int(rest[position:line_end], 16)
        start = line_end + 2
        if size == 0:
            response.end = "complete"
            break
        if len(rest) < start + size + 2:
            break
        response.chunks.append(rest[start : start + size])
        position = start + size + 2
    response.body = b"".join(response.chunks)
    return response
