"""``cordon``, ``uncordon`` and ``drain``: take workers out of service and back."""

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from routerctl.errors import ExitCode, NotFound, Refused, Unreachable
from routerctl.options import TIMEOUT_MAX_S, common_parser, seconds
from routerctl.printers import fleet
from routerctl.printers.machine import document
from routerctl.printers.text import printable
from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold.v1 import admin_pb2, fleet_pb2

if TYPE_CHECKING:
    from routerctl.client import Client

WAIT_TIMEOUT_S = 600.0
POLL_S = 1.0


def register(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verbs."""
    for name, run, summary in (
        ("cordon", _cordon, "send no new work to workers; what runs there stays"),
        ("uncordon", _uncordon, "let workers take new work again"),
    ):
        parser = add(verbs, name, run, common, summary)
        parser.add_argument("workers", nargs="+", metavar="WORKER", help="worker id")
    own_timeout = common_parser(timeout=False)
    parser = add(verbs, "drain", _drain, own_timeout, "cordon a worker and let its requests end or leave")
    parser.add_argument("worker", metavar="WORKER", help="worker id")
    parser.add_argument("--wait", action="store_true", help="return when nothing runs on the worker any more")
    parser.add_argument(
        "--timeout",
        dest="drain_timeout_s",
        type=seconds(0.1, TIMEOUT_MAX_S),
        metavar="SECONDS",
        help=f"longest wait for an answer; with --wait, for the end of the drain (default: {WAIT_TIMEOUT_S:g})",
    )


def _cordon(arguments: argparse.Namespace, session: Session) -> int:
    with session.connect() as client:

        def one(worker: str) -> Iterable[fleet_pb2.Target]:
            return client.call(client.admin.Cordon, admin_pb2.CordonRequest(worker_id=worker)).targets

        return _each(arguments.workers, session, one, "cordoned")


def _uncordon(arguments: argparse.Namespace, session: Session) -> int:
    with session.connect() as client:

        def one(worker: str) -> Iterable[fleet_pb2.Target]:
            return client.call(client.admin.Uncordon, admin_pb2.UncordonRequest(worker_id=worker)).targets

        return _each(arguments.workers, session, one, "uncordoned")


def _each(workers: list[str], session: Session, one: Callable[[str], Iterable[fleet_pb2.Target]], done: str) -> int:
    """Does ``one`` to every worker, also behind one that is refused, and reports all of them."""
    targets: list[fleet_pb2.Target] = []
    lines: list[str] = []
    refused = False
    for worker in dict.fromkeys(workers):
        try:
            changed = list(one(worker))
        except Refused as error:
            session.note(str(error))
            refused = True
            continue
        targets += changed
        lines.append(f"worker {printable(worker)} {done}{_states(changed)}\n")
    session.emit(lambda: {"targets": [document(target) for target in targets]}, lambda: "".join(lines))
    return ExitCode.REFUSED if refused else ExitCode.OK


def _drain(arguments: argparse.Namespace, session: Session) -> int:
    request = admin_pb2.DrainRequest(worker_id=arguments.worker)
    limit_s: float | None = arguments.drain_timeout_s
    with session.connect() as client:
        deadline_s = session.monotonic() + (WAIT_TIMEOUT_S if limit_s is None else limit_s)
        first_timeout_s = session.options.timeout_s if limit_s is None else min(limit_s, session.options.timeout_s)
        answer = client.call(client.admin.Drain, request, first_timeout_s)
        if arguments.wait and not answer.safe_to_delete:
            answer = _wait(request, answer, client, session, deadline_s)
    session.emit(
        lambda: {"worker_id": arguments.worker} | document(answer),
        lambda: _drained(arguments.worker, answer),
    )
    if arguments.wait and not answer.safe_to_delete:
        raise Refused(f"worker {arguments.worker} is not drained in time: {answer.inflight} requests still run on it")
    return ExitCode.OK


def _wait(
    request: admin_pb2.DrainRequest,
    answer: admin_pb2.DrainResponse,
    client: "Client",
    session: Session,
    deadline_s: float,
) -> admin_pb2.DrainResponse:
    """The last answer before the deadline, or the first that says the worker is empty. Outlasts a restart of the
    control plane. Raises Unreachable when it is away at the deadline."""
    trouble: Unreachable | None = None
    shown = -1
    while not answer.safe_to_delete:
        if trouble is None and answer.inflight != shown:
            session.note(f"{answer.inflight} requests still run on {request.worker_id}")
            shown = answer.inflight
        left_s = deadline_s - session.monotonic()
        if left_s <= 0:
            break
        session.sleep(min(POLL_S, left_s))
        call_s = min(session.options.timeout_s, max(0.1, deadline_s - session.monotonic()))
        try:
            answer = client.call(client.admin.Drain, request, call_s)
            trouble = None
        except NotFound:
            session.note(f"worker {request.worker_id} has left the fleet")
            return admin_pb2.DrainResponse(safe_to_delete=True)
        except Unreachable as error:
            if trouble is None:
                session.note(f"{error}; asking again")
            trouble = error
    if trouble is not None:
        raise trouble
    return answer


def _drained(worker: str, answer: admin_pb2.DrainResponse) -> str:
    state = "may be stopped" if answer.safe_to_delete else f"{answer.inflight} requests still run on it"
    return f"worker {printable(worker)} draining{_states(answer.targets)}: {state}\n"


def _states(targets: Iterable[fleet_pb2.Target]) -> str:
    states = [f"{target.target_id} {fleet.status(target)}" for target in targets]
    return f" ({printable('; '.join(states))})" if states else ""
