"""``top``: load of routers and workers, live on a terminal."""

import argparse

from rich.console import Console
from rich.live import Live

from routerctl.errors import Unreachable
from routerctl.options import seconds
from routerctl.printers import top
from routerctl.printers.machine import document
from routerctl.printers.text import moment
from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold.v1 import admin_pb2

DEFAULT_INTERVAL_S = 2.0


def register(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    description = """Show the load of routers and workers, the busiest workers first: live on a terminal until Ctrl-C,
    once when the output is not a terminal, is JSON or YAML, or with --once."""
    parser = add(verbs, "top", _top, common, "show the load of routers and workers", description)
    parser.add_argument(
        "--interval",
        dest="interval_s",
        type=seconds(0.2, 3600),
        default=DEFAULT_INTERVAL_S,
        metavar="SECONDS",
        help=f"time between two looks (default: {DEFAULT_INTERVAL_S:g})",
    )
    parser.add_argument("--once", action="store_true", help="print one table and end")


def _top(arguments: argparse.Namespace, session: Session) -> int:
    if session.out.isatty() and not arguments.once and not session.for_machines:
        return _live(arguments.interval_s, session)
    with session.connect() as client:
        answer = client.call(client.admin.Top, admin_pb2.TopRequest())
    session.emit(lambda: document(answer), lambda: top.text(answer, wide=session.wide))
    return 0


def _live(interval_s: float, session: Session) -> int:
    """Shows and asks again until interrupted. A control plane that goes away is waited for, its last answer shown."""
    trouble = ""
    with session.connect() as client:
        answer = client.call(client.admin.Top, admin_pb2.TopRequest())
        with Live(console=Console(file=session.out), screen=True, auto_refresh=False) as live:
            while True:
                title = f"{session.options.control_plane}   {moment(session.now())}   every {interval_s:g} s"
                live.update(top.screen(answer, title, trouble, wide=session.wide), refresh=True)
                session.sleep(interval_s)
                try:
                    answer, trouble = client.call(client.admin.Top, admin_pb2.TopRequest()), ""
                except Unreachable as error:
                    trouble = str(error)
