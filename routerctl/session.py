"""What a command works with: options, the connection, where answers go, and the clock."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from routerctl.options import Options, Output
from routerctl.printers import machine
from routerctl.printers.text import printable

if TYPE_CHECKING:
    from routerctl.client import Client


class Session:
    """One run of routerctl. ``now`` is the wall clock, ``monotonic`` and ``sleep`` serve waits."""

    def __init__(
        self,
        options: Options,
        *,
        out: TextIO | None = None,
        err: TextIO | None = None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.options = options
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        self.now = now
        self.monotonic = monotonic
        self.sleep = sleep

    def connect(self) -> "Client":
        """Connection to the control plane."""
        from routerctl.client import Client  # grpc takes a while to load, and help and completion do not need it

        return Client(self.options)

    @property
    def wide(self) -> bool:
        """Whether tables take all their columns."""
        return self.options.output is Output.WIDE

    @property
    def for_machines(self) -> bool:
        """Whether the answer is JSON or YAML."""
        return self.options.output in (Output.JSON, Output.YAML)

    def emit(self, document: Callable[[], Mapping[str, Any]], text: Callable[[], str]) -> None:
        """Print the answer in the form asked for."""
        if self.options.output is Output.JSON:
            self.out.write(machine.to_json(document()))
        elif self.options.output is Output.YAML:
            self.out.write(machine.to_yaml(document()))
        else:
            self.out.write(text())
        self.out.flush()

    def note(self, message: str) -> None:
        """One line for the human beside the answer, on standard error."""
        self.err.write(f"routerctl: {printable(message)}\n")
        self.err.flush()
