"""``version`` and ``completion``: what needs no control plane."""

import argparse
from collections.abc import Callable

import shtab

from routerctl.session import Session
from routerctl.verbs import Verbs, add
from twofold import __version__

SHELLS = ("bash", "zsh")


def register(verbs: Verbs, common: argparse.ArgumentParser, root: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the verbs; ``root`` gives the parser that completion describes."""
    add(verbs, "version", _version, common, "print the version of routerctl")
    parser = add(verbs, "completion", None, None, "print a completion script for a shell")
    parser.add_argument("shell", choices=SHELLS)

    def completion(arguments: argparse.Namespace, session: Session) -> int:
        session.out.write(shtab.complete(root(), arguments.shell) + "\n")
        session.out.flush()
        return 0

    parser.set_defaults(run=completion)


def _version(arguments: argparse.Namespace, session: Session) -> int:
    session.emit(lambda: {"version": __version__}, lambda: f"routerctl {__version__}\n")
    return 0
