"""``python -m router.agent``: the agent of a replica; started by the launcher."""

import asyncio
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from router.agent.agent import Agent
from router.agent.link import Credentials
from router.agent.settings import AgentSettings, TokenError, read_token
from router.shm.files import SharedMemoryError
from router.shm.replica import AGENT, SharedReplica
from twofold import log as logs
from twofold import settings as settings_loader

EXIT_FAILED = 1
EXIT_USAGE = 2


async def _run(settings: AgentSettings, credentials: Credentials, replica: SharedReplica) -> bool:
    agent = Agent(settings, credentials, replica)
    # Few cycles come to be here, and many values live long: collect rarely, and not what stands since the start.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    await agent.run()
    return not agent.failed


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 after a stop signal, 1 on failure, 2 for settings that cannot work."""
    settings = settings_loader.load(
        AgentSettings,
        sys.argv[1:] if argv is None else argv,
        prog="router.agent",
        description="Agent of a router replica.",
    )
    try:
        logs.configure(f"{settings.replica_id}/agent", level=settings.log_level, file=settings.log_file or None)
        token = read_token(settings.token_file, os.environ.get("TWOFOLD_TOKEN", ""))
        credentials = Credentials(
            token, ca_file=settings.tls_ca_file, cert_file=settings.tls_cert_file, key_file=settings.tls_key_file
        )
        if not settings.replica_dir:
            raise ValueError("replica_dir is required")
    except (TokenError, ValueError, OSError) as error:
        sys.stderr.write(f"router.agent: error: {error}\n")
        return EXIT_USAGE
    try:
        replica = SharedReplica.attach(Path(settings.replica_dir), writer=AGENT)
        ok = asyncio.run(_run(settings, credentials, replica))
    except (SharedMemoryError, OSError) as error:
        sys.stderr.write(f"router.agent: error: {error}\n")
        return EXIT_FAILED
    return 0 if ok else EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
