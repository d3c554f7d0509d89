"""``twofold``: one command for everything that is not administration of a live fleet (that is ``routerctl``)."""

import importlib
import sys
from collections.abc import Callable, Sequence

from twofold import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("twofold.cli.up", "run a whole fleet on this machine"),
    "demo": ("twofold.cli.demo", "one workload under three routing policies, side by side"),
    "replay": ("twofold.cli.replay", "send a recorded or generated workload to an OpenAI-compatible URL"),
    "profile": ("twofold.cli.profile", "measure a running engine and write its engine profile"),
    "controlplane": ("controlplane.__main__", "run the control plane"),
    "router": ("router.__main__", "run one router replica"),
    "emulator": ("emulator.__main__", "run emulated engines"),
}


def usage() -> str:
    """Help text of the command itself."""
    lines = [f"  {name:13} {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: twofold COMMAND [options]\n\n"
        "Router and autoscaler control plane for fleets of vLLM workers.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n  twofold COMMAND --help   options of one command\n  twofold --version\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"twofold {__version__}\n")
        return 0
    entry = COMMANDS.get(arguments[0])
    if entry is None:
        sys.stderr.write(f"twofold: error: unknown command {arguments[0]!r}; try: {', '.join(COMMANDS)}\n")
        return 2
    run: Callable[[Sequence[str]], int] = importlib.import_module(entry[0]).main
    try:
        return run(arguments[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
