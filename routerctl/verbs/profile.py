"""``profile``: where the time of a running process goes, asked of the replica's admin port or the control plane's
metrics port."""

import argparse
import http.client
import ipaddress
import json
import urllib.parse
from pathlib import Path

import shtab

from routerctl.errors import NotFound, Refused, Unreachable, UsageError
from routerctl.options import Options, seconds
from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold.v1 import admin_pb2

CONTROL_PLANE = "controlplane"
DEFAULT_METRICS_URL = "http://127.0.0.1:7701"
DEFAULT_SECONDS = 10.0
MAX_SECONDS = 60.0
MAX_HZ = 200.0
MAX_ANSWER_BYTES = 64 << 20
MARGIN_S = 15.0
"""A busy process may answer this much later than the profile itself takes."""

_DESCRIPTION = """Profile a running process: "controlplane", or REPLICA/PROCESS as in router-0/relay-1, router-0/agent.
The process must have been started with --debug-profile. Its admin (or metrics) port is usually open to its own host
only: run routerctl there, or give --url. The answer goes to standard output: a table, or what flame graph tools
(collapsed) and speedscope.app (speedscope) read."""


def register(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = add(verbs, "profile", _profile, common, "profile a running relay, agent or control plane", _DESCRIPTION)
    parser.add_argument("process", metavar="PROCESS", help='"controlplane" or REPLICA/PROCESS')
    parser.add_argument(
        "--seconds",
        type=seconds(0.1, MAX_SECONDS),
        default=DEFAULT_SECONDS,
        metavar="S",
        help=f"how long (default: {DEFAULT_SECONDS:g}, at most {MAX_SECONDS:g})",
    )
    parser.add_argument(
        "--hz", type=_rate, default=MAX_HZ, metavar="N", help=f"samples a second (default and most: {MAX_HZ:g})"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="wall: where time passes, waiting included, all threads; cpu: what keeps the main thread busy, exact "
        "also for callbacks of microseconds (default: wall)",
    )
    parser.add_argument(
        "--format", choices=("table", "collapsed", "speedscope"), default="table", help="form (default: table)"
    )
    parser.add_argument("--url", metavar="URL", help="admin or metrics port; default: what the control plane tells")
    write = parser.add_argument("--write", metavar="FILE", help="write the profile to a file")
    write.complete = shtab.FILE  # type: ignore[attr-defined]


def _profile(arguments: argparse.Namespace, session: Session) -> int:
    replica, _, process = arguments.process.rpartition("/")
    if not process or (not replica and process != CONTROL_PLANE):
        raise UsageError(f"{arguments.process!r} is neither {CONTROL_PLANE!r} nor REPLICA/PROCESS")
    url = arguments.url or (_admin_url(session, replica) if replica else DEFAULT_METRICS_URL)
    query = {
        "process": process,
        "seconds": f"{arguments.seconds:g}",
        "hz": f"{arguments.hz:g}",
        "clock": arguments.clock,
        "format": arguments.format,
    }
    in_clear = getattr(arguments, "plaintext", False)
    body = _get(url, query, session.options, arguments.seconds + MARGIN_S, in_clear=in_clear)
    if not arguments.write:
        session.out.write(body.decode("utf-8", "replace"))
        session.out.flush()
        return 0
    try:
        Path(arguments.write).write_bytes(body)
    except OSError as error:
        raise UsageError(f"cannot write {arguments.write}: {error.strerror}") from None
    return 0


def _admin_url(session: Session, replica: str) -> str:
    with session.connect() as client:
        routers = client.call(client.admin.ListRouters, admin_pb2.ListRoutersRequest()).routers
    known = {router.hello.replica_id: router.hello.admin_address for router in routers if router.connected}
    if replica not in known:
        raise NotFound(f"no router {replica!r} is connected; there are: {', '.join(sorted(known)) or 'none'}")
    return f"http://{known[replica]}"


def _get(url: str, query: dict[str, str], options: Options, timeout_s: float, *, in_clear: bool) -> bytes:
    """Body of the answer; the token goes to other hosts without TLS only if ``in_clear``.

    Raises Refused, Unreachable, UsageError.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"{url!r} is not an http(s) URL")
    headers = {}
    if options.token and (parts.scheme == "https" or _is_loopback(host) or in_clear):
        headers["authorization"] = f"Bearer {options.token}"
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=timeout_s)
    try:
        connection.request(
            "GET", f"{parts.path.rstrip('/')}/debug/profile?{urllib.parse.urlencode(query)}", headers=headers
        )
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_BYTES + 1)
    except TimeoutError:
        raise Unreachable(f"{url} did not answer within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{url} is unreachable: {getattr(error, 'strerror', None) or error}") from None
    finally:
        connection.close()
    if len(body) > MAX_ANSWER_BYTES:
        raise Refused(f"{url} answered more than {MAX_ANSWER_BYTES} bytes")
    if answer.status != 200:
        raise Refused(f"{url} says {answer.status}: {_message(body)}")
    return body


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= MAX_HZ:
        raise argparse.ArgumentTypeError(f"expected a rate in 1..{MAX_HZ:g}, got {text!r}")
    return value
