"""Stands for vLLM's API server: starts a child that outlives it and holds a port, as EngineCore does, and serves HTTP.

Called as ``fake_vllm.py -m vllm.entrypoints.openai.api_server --host H --port P --served-model-name M [options]``.
Options: ``--die-at-start``, ``--ignore-sigterm``, ``--core-port N`` (the port that the child holds).
"""

import argparse
import os
import signal
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("-m", dest="module")
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--served-model-name")
parser.add_argument("--core-port", type=int, default=0)
parser.add_argument("--die-at-start", action="store_true")
parser.add_argument("--ignore-sigterm", action="store_true")
parser.add_argument("--label", default="")
options = parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    """Health, metrics and models."""

    def do_GET(self) -> None:
        """Answer one of the probed paths."""
        bodies = {
            "/health": b"",
            "/metrics": b'vllm:num_requests_running{engine="0"} 0\n',
            "/v1/models": b'{"data": [{"id": "%s", "max_model_len": 2048}]}' % options.served_model_name.encode(),
        }
        body = bodies.get(self.path)
        self.send_response(200 if body is not None else 404)
        self.send_header("content-length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def engine_core() -> None:
    """The child: ignores its parent's fate and holds a port."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", options.core_port))
    held.listen()
    while True:
        time.sleep(60)


if options.die_at_start:
    print("ValueError: no model here", file=sys.stderr, flush=True)
    sys.exit(3)
if options.core_port and os.fork() == 0:
    os.setpgid(0, 0)  # a group of its own: only the session ties it to the API server
    engine_core()
if options.ignore_sigterm:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
