"""Reading a workload ahead of the run, so that parsing a line does not make a request late."""

import asyncio
import queue
import threading
from collections.abc import Iterator

from twofold.replay.workload import Session, WorkloadError

READ_AHEAD = 256


class SessionSource:
    """Iterates sessions on a thread, at most ``READ_AHEAD`` ahead. ``close`` ends the thread."""

    def __init__(self, sessions: Iterator[Session], read_ahead: int = READ_AHEAD) -> None:
        self._sessions = sessions
        self._queue: queue.Queue[Session | WorkloadError | None] = queue.Queue(maxsize=read_ahead)
        self._closed = threading.Event()
        self._filled = threading.Event()
        self._thread = threading.Thread(target=self._read, name="workload", daemon=True)
        self._thread.start()

    async def filled(self) -> None:
        """Wait until the read-ahead is full or the workload has ended."""
        await asyncio.to_thread(self._filled.wait)

    async def next(self) -> Session | None:
        """The next session, None at the end. Raises WorkloadError."""
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            item = await asyncio.to_thread(self._queue.get)
        if isinstance(item, WorkloadError):
            raise item
        return item

    def close(self) -> None:
        """Stop reading; idempotent."""
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(timeout=5.0)

    def _read(self) -> None:
        try:
            for session in self._sessions:
                if not self._put(session):
                    return
            self._put(None)
        except WorkloadError as error:
            self._put(error)
        finally:
            self._filled.set()

    def _put(self, item: Session | WorkloadError | None) -> bool:
        while not self._closed.is_set():
            if self._queue.full():
                self._filled.set()
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False
