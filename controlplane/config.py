"""The fleet file in force: read, watched, and kept when a new version of it is bad."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from controlplane.discovery.fleet_file import FleetFile, FleetFileError, load_fleet_file

log = logging.getLogger(__name__)

POLL_S = 1.0


class FleetFileWatch:
    """Hands every good version of the file to ``apply``; ``fault`` says why the present one is not in force."""

    def __init__(self, path: Path, apply: Callable[[FleetFile], None]) -> None:
        self._path = path
        self._apply = apply
        self._mark: tuple[int, int, int] | None = None
        self._now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.fault = ""
        self.reloads = 0

    def start(self, first: FleetFile) -> None:
        """Put ``first``, which was read from the path, in force and begin to watch."""
        self._mark = self._stat()
        self._apply(first)
        self._task = asyncio.create_task(self._run(), name="fleet-file")

    def reload(self) -> None:
        """Read the file now, changed or not."""
        self._mark = None
        self._now.set()

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._now.wait()
            self._now.clear()
            mark = self._stat()
            if mark != self._mark:
                self._mark = mark
                await self._read()

    async def _read(self) -> None:
        try:
            file = await asyncio.to_thread(load_fleet_file, self._path)
            self._apply(file)
        except FleetFileError as error:
            self.fault = str(error)
            log.error("fleet file not taken over, the old one stays in force", extra={"reason": self.fault})
        except Exception:
            self.fault = "the new fleet file could not be applied; see the log"
            log.exception("fleet file could not be applied")
        else:
            self.fault = ""
            self.reloads += 1
            log.info("fleet file in force", extra={"path": str(self._path), "pools": len(file.pools)})

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return (0, 0, 0)
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
