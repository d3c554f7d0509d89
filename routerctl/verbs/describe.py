"""``describe worker ID``: everything known about one worker."""

import argparse

from routerctl.printers import worker
from routerctl.printers.machine import document
from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold.v1 import admin_pb2


def register(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = add(verbs, "describe", None, None, "show all that is known about a worker")
    nouns = parser.add_subparsers(metavar="WHAT", required=True)
    noun = add(nouns, "worker", _worker, common, "show targets, profile, load by router and events of a worker")
    noun.add_argument("worker", metavar="WORKER", help="worker id")


def _worker(arguments: argparse.Namespace, session: Session) -> int:
    with session.connect() as client:
        request = admin_pb2.DescribeWorkerRequest(worker_id=arguments.worker)
        answer = client.call(client.admin.DescribeWorker, request)
    session.emit(
        lambda: {"worker_id": arguments.worker} | document(answer),
        lambda: worker.describe(arguments.worker, answer, session.now()),
    )
    return 0
