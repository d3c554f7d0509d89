"""``policy get`` and ``policy set``: parameters of the routing decision."""

import argparse
from typing import Any

from routerctl.errors import UsageError
from routerctl.printers.machine import document
from routerctl.printers.text import Column, Table, render
from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold.v1 import admin_pb2, fleet_pb2


def register(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verbs."""
    parser = add(verbs, "policy", None, None, "show or change the routing policy")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add(actions, "get", _get, common, "show the routing policy in force")
    change = add(actions, "set", _set, common, "change fields of the routing policy on all routers")
    change.add_argument("fields", nargs="+", metavar="FIELD=VALUE", help="for example name=round_robin or alpha=0.4")


def _get(arguments: argparse.Namespace, session: Session) -> int:
    with session.connect() as client:
        policy = client.call(client.admin.GetPolicy, admin_pb2.GetPolicyRequest())
    _emit(policy, session)
    return 0


def _set(arguments: argparse.Namespace, session: Session) -> int:
    fields: dict[str, str] = {}
    for text in arguments.fields:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{text!r} is not FIELD=VALUE")
        if name in fields:
            raise UsageError(f"{name} is given twice")
        fields[name] = value
    with session.connect() as client:
        policy = client.call(client.admin.SetPolicy, admin_pb2.SetPolicyRequest(fields=fields))
    _emit(policy, session)
    return 0


def _emit(policy: fleet_pb2.RoutingPolicy, session: Session) -> None:
    fields = document(policy)
    session.emit(lambda: fields, lambda: render(_table(fields)))


def _table(fields: dict[str, Any]) -> Table:
    rows = tuple((name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in fields.items())
    return Table(columns=(Column("FIELD"), Column("VALUE")), rows=rows)
