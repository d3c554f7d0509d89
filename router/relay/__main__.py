"""``python -m router.relay``: one relay process, started by the replica's launcher."""

import logging
import socket
import sys
from collections.abc import Sequence

from router.relay.process import serve
from router.relay.settings import RelaySettings
from router.shm.files import SharedMemoryError
from twofold import log as logs
from twofold import settings as settings_loader

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 after a graceful stop, 1 when it cannot serve, 2 for bad settings."""
    settings = settings_loader.load(
        RelaySettings, argv, prog="router.relay", description="One relay of a Twofold router replica."
    )
    try:
        logs.configure(
            f"{settings.replica_id}/relay-{settings.index}", level=settings.log_level, file=settings.log_file
        )
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    if not settings.replica_dir or settings.listen_fd < 0:
        return _fail("--replica-dir and --listen-fd are needed", 2)
    try:
        listener = socket.socket(fileno=settings.listen_fd)
        listener.setblocking(False)
    except OSError as error:
        return _fail(f"--listen-fd {settings.listen_fd}: {error.strerror}", 2)
    try:
        serve(settings, listener)
    except SharedMemoryError as error:
        return _fail(str(error), 1)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"router.relay: error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
