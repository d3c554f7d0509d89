"""``get workers|models|routers|pools``: lists."""

import argparse
from collections.abc import Callable, Iterable
from typing import TypeVar

from routerctl.errors import Refused
from routerctl.printers import fleet
from routerctl.printers.machine import document
from routerctl.printers.text import render
from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold.v1 import admin_pb2, fleet_pb2

Item = TypeVar("Item")


def register(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = add(verbs, "get", None, None, "list workers, models, routers or pools")
    nouns = parser.add_subparsers(metavar="WHAT", required=True)
    for name, run, summary in (
        ("workers", _workers, "list workers, one row per target"),
        ("models", _models, "list the model names that clients may ask for"),
        ("routers", _routers, "list router replicas"),
        ("pools", _pools, "list pools"),
    ):
        noun = add(nouns, name, run, common, summary)
        noun.add_argument("names", nargs="*", metavar="NAME", help="show these only")
        if name in ("workers", "models"):
            noun.add_argument("--pool", default="", help="show this pool only")


def _workers(arguments: argparse.Namespace, session: Session) -> int:
    snapshot = _fleet(session)
    shown = [target for target in snapshot.targets if arguments.pool in ("", target.pool)]
    shown = _named("worker", arguments.names, shown, lambda target: (target.worker_id, target.target_id))
    session.emit(
        lambda: _header(snapshot) | {"workers": [document(target) for target in shown]},
        lambda: render(fleet.workers(shown, session.now()), wide=session.wide),
    )
    return 0


def _models(arguments: argparse.Namespace, session: Session) -> int:
    snapshot = _fleet(session)
    shown = [model for model in fleet.model_documents(snapshot) if arguments.pool in ("", model["pool"])]
    shown = _named("model", arguments.names, shown, lambda model: (str(model["name"]),))
    session.emit(
        lambda: _header(snapshot) | {"models": shown},
        lambda: render(fleet.models(shown), wide=session.wide),
    )
    return 0


def _pools(arguments: argparse.Namespace, session: Session) -> int:
    snapshot = _fleet(session)
    shown = _named("pool", arguments.names, snapshot.pools, lambda pool: (pool.name,))
    session.emit(
        lambda: _header(snapshot) | {"pools": fleet.pool_documents(snapshot, shown)},
        lambda: render(fleet.pools(snapshot, shown), wide=session.wide),
    )
    return 0


def _routers(arguments: argparse.Namespace, session: Session) -> int:
    with session.connect() as client:
        answer = client.call(client.admin.ListRouters, admin_pb2.ListRoutersRequest())
    shown = _named("router", arguments.names, answer.routers, lambda router: (router.hello.replica_id,))
    session.emit(
        lambda: {"routers": [fleet.router_document(router) for router in shown]},
        lambda: render(fleet.routers(shown, session.now()), wide=session.wide),
    )
    return 0


def _fleet(session: Session) -> fleet_pb2.FleetSnapshot:
    with session.connect() as client:
        return client.call(client.admin.GetFleet, admin_pb2.GetFleetRequest())


def _header(snapshot: fleet_pb2.FleetSnapshot) -> dict[str, object]:
    return {"epoch": snapshot.epoch, "version": snapshot.version}


def _named(
    noun: str, names: list[str], items: Iterable[Item], names_of: Callable[[Item], tuple[str, ...]]
) -> list[Item]:
    found = list(items)
    if not names:
        return found
    known = {name for item in found for name in names_of(item)}
    missing = [name for name in names if name not in known]
    if missing:
        raise Refused(f"{noun} {missing[0]!r} not found")
    wanted = set(names)
    return [item for item in found if wanted.intersection(names_of(item))]
