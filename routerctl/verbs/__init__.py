"""One module per group of verbs. Each has ``register(verbs, common)``, which adds its parsers and sets ``run``."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from routerctl.session import Session

if TYPE_CHECKING:
    Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
else:
    Verbs: TypeAlias = object

Run: TypeAlias = Callable[[argparse.Namespace, Session], int]


def add(
    verbs: Verbs,
    name: str,
    run: Run | None,
    common: argparse.ArgumentParser | None,
    summary: str,
    description: str = "",
) -> argparse.ArgumentParser:
    """Parser of one verb; ``run(arguments, session)`` returns the exit code."""
    parser = verbs.add_parser(
        name,
        parents=[common] if common is not None else [],
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        allow_abbrev=False,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser
