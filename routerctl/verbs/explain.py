"""``explain``: why a request went where it went, or where one would go."""

import argparse
import json
import sys
from typing import Any

import shtab

from routerctl.errors import Refused, UsageError
from routerctl.options import read_bytes
from routerctl.printers import decision
from routerctl.printers.machine import document
from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold.v1 import admin_pb2, router_pb2

MAX_BODY_BYTES = 4 << 20
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_SERVER_SHARE, _SERVER_MIN_S, _SERVER_MAX_S = 0.6, 0.1, 30.0

_DESCRIPTION = """Explain a past request (--request-id; every router is asked) or a request that is not sent
(--model with --prompt, or --file with a body as a client would send it)."""


def register(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = add(verbs, "explain", _explain, common, "explain a routing decision", _DESCRIPTION)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--request-id", metavar="ID", help="x-request-id of a past request")
    subject.add_argument("--prompt", metavar="TEXT", help="prompt of a hypothetical request; needs --model")
    file = subject.add_argument("--file", metavar="FILE", help="JSON body of a hypothetical request; - reads stdin")
    file.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("--model", default="", help="model of the hypothetical request; replaces the body's")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="output limit of the hypothetical request")
    parser.add_argument("--chat", action="store_true", help="ask as a chat completion, the prompt as user message")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="NAME:VALUE",
        help="request header of the hypothetical request; may be repeated",
    )


def _explain(arguments: argparse.Namespace, session: Session) -> int:
    past = arguments.request_id is not None
    subject = _past(arguments) if past else router_pb2.ExplainCommand(request=_hypothetical(arguments))
    deadline_s = routers_deadline_s(session.options.timeout_s)
    with session.connect() as client:
        request = admin_pb2.ExplainRequest(subject=subject, deadline_s=deadline_s)
        answer = client.call(client.admin.Explain, request)
    if not answer.decisions:
        silent = f"; no answer from {', '.join(answer.silent_replicas)}" if answer.silent_replicas else ""
        raise Refused(f"no router gave a decision{silent}")
    session.emit(
        lambda: document(answer),
        lambda: "\n".join(decision.explain(one, past=past, wide=session.wide) for one in answer.decisions),
    )
    if answer.silent_replicas:
        session.note(f"no answer from {', '.join(answer.silent_replicas)}")
    return 0


def routers_deadline_s(timeout_s: float) -> float:
    """How long the control plane may wait for routers: so that it answers before ``timeout_s``, within the bounds of
    ``ExplainRequest.deadline_s``."""
    return min(max(timeout_s * _SERVER_SHARE, _SERVER_MIN_S), _SERVER_MAX_S)


def _past(arguments: argparse.Namespace) -> router_pb2.ExplainCommand:
    if not arguments.request_id:
        raise UsageError("--request-id is empty")
    if arguments.model or arguments.max_tokens or arguments.chat or arguments.header:
        raise UsageError(
            "--request-id takes no --model, --max-tokens, --chat or --header: the request was already sent"
        )
    return router_pb2.ExplainCommand(request_id=arguments.request_id)


def _hypothetical(arguments: argparse.Namespace) -> router_pb2.HypotheticalRequest:
    changes: dict[str, Any] = {}
    if arguments.model:
        changes["model"] = arguments.model
    if arguments.max_tokens:
        changes["max_tokens"] = arguments.max_tokens
    if arguments.file is None:
        path, raw = _from_prompt(arguments, changes)
    else:
        path, raw = _from_file(arguments, changes)
    if len(raw) > MAX_BODY_BYTES:
        raise UsageError(f"the body is larger than {MAX_BODY_BYTES} bytes")
    return router_pb2.HypotheticalRequest(path=path, body=raw, headers=dict(map(_header, arguments.header)))


def _from_prompt(arguments: argparse.Namespace, changes: dict[str, Any]) -> tuple[str, bytes]:
    if not arguments.model:
        raise UsageError("--prompt needs --model")
    # Arguments that were not UTF-8 arrive as lone surrogates; a router would see replacement characters as well.
    prompt = arguments.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if arguments.chat:
        return CHAT, _encode(changes | {"messages": [{"role": "user", "content": prompt}]})
    return COMPLETIONS, _encode(changes | {"prompt": prompt})


def _from_file(arguments: argparse.Namespace, changes: dict[str, Any]) -> tuple[str, bytes]:
    source = "standard input" if arguments.file == "-" else arguments.file
    raw = sys.stdin.buffer.read(MAX_BODY_BYTES + 1) if arguments.file == "-" else read_bytes(source, MAX_BODY_BYTES)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise UsageError(f"{source}: the body must be a JSON object")
    if "model" not in body and not arguments.model:
        raise UsageError(f"{source} names no model: add one or give --model")
    path = CHAT if arguments.chat or "messages" in body else COMPLETIONS
    # Byte for byte what a client would send, unless something was asked to be different.
    return path, _encode(body | changes) if changes else raw


def _encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    name = name.strip().lower()
    if not colon or not name or not name.isascii() or not text.isprintable():
        raise UsageError(f"--header {text!r} is not NAME:VALUE")
    return name, value.strip()


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)
