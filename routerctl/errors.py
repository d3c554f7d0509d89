"""How a command ends: exit codes, and the errors that carry them."""

import enum


class ExitCode(enum.IntEnum):
    """Exit status of routerctl; part of its interface."""

    OK = 0
    REFUSED = 1
    """The operation failed or was refused: not found, not allowed, not in time."""
    USAGE = 2
    """The command line, or a file it names, is wrong; nothing was asked of the control plane."""
    UNREACHABLE = 3
    """No answer from the control plane."""
    INTERRUPTED = 130


class CommandError(Exception):
    """Ends the command with ``code``; the text is the one line that the user reads."""

    code = ExitCode.REFUSED


class Refused(CommandError):
    """The control plane answered, and the answer is no."""


class NotFound(Refused):
    """The control plane does not know what was named."""


class UsageError(CommandError):
    """What was asked for makes no sense."""

    code = ExitCode.USAGE


class Unreachable(CommandError):
    """The control plane did not answer."""

    code = ExitCode.UNREACHABLE
