"""Entry point: parses the command line, runs the verb, turns every ending into an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence

# Before anything loads grpc, whose C core otherwise writes lines of its own to standard error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from routerctl.errors import CommandError, ExitCode
from routerctl.options import common_parser, resolve
from routerctl.session import Session
from routerctl.verbs import cordon, describe, explain, get, local, policy, profile, top

PROG = "routerctl"

_EPILOG = """exit codes: 0 done; 1 failed or refused; 2 wrong usage; 3 control plane unreachable; 130 interrupted"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    common = common_parser()
    parser = argparse.ArgumentParser(
        prog=PROG,
        parents=[common],
        description="Look at and change a Twofold fleet through its control plane.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for module in (get, describe, explain, cordon, policy, top, profile):
        module.register(verbs, common)
    local.register(verbs, common, build_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; exits with 2 by itself on a command line that cannot be parsed."""
    _write_anything(sys.stdout, sys.stderr)
    try:
        try:
            arguments = build_parser().parse_args(argv)
            session = Session(resolve(arguments, os.environ))
            return int(arguments.run(arguments, session))
        finally:
            sys.stdout.flush()
    except CommandError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough. Nothing more may be written, not even by the interpreter's own last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except OSError as error:
        return _fail(f"cannot write the answer: {error.strerror or error}", ExitCode.REFUSED)
    except Exception as error:
        return _fail(f"internal error: {type(error).__name__}: {error}", ExitCode.REFUSED)


def _fail(message: str, code: ExitCode) -> ExitCode:
    from routerctl.printers.text import printable

    line = printable(" ".join(message.split()))
    sys.stderr.write(f"{PROG}: error: {line}\n")
    return code


def _write_anything(*streams: object) -> None:
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
