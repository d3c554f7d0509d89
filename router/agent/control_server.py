"""The agent's end of the control channel: relays connect, commands go to them, answers come back."""

import asyncio
import contextlib
import itertools
import logging
from pathlib import Path

from router.shm.control import (
    AgentMessage,
    ControlError,
    Hello,
    RelayMessage,
    agent_side,
    encode_frame,
)

log = logging.getLogger(__name__)

READ_BYTES = 65536
HELLO_TIMEOUT_S = 5.0
MAX_PENDING = 256
MAX_CONNECTIONS = 1024


class RelayGoneError(Exception):
    """The relay is not connected, or its connection ended before it answered."""


class _RelayLink:
    """One connected relay and the answers it owes."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.pending: dict[int, asyncio.Future[RelayMessage]] = {}

    def end(self) -> None:
        for future in self.pending.values():
            if not future.done():
                future.set_exception(RelayGoneError("the relay closed the control channel"))
        self.pending.clear()
        self.writer.close()


class ControlServer:
    """Listens in the replica's directory. Use as an async context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._links: dict[int, _RelayLink] = {}
        self._ids = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.refused = 0
        """Commands and connections beyond the bounds."""

    @property
    def relays(self) -> list[int]:
        """Indices of the connected relays."""
        return sorted(self._links)

    @property
    def pending(self) -> int:
        """Answers that all relays owe."""
        return sum(len(link.pending) for link in self._links.values())

    async def __aenter__(self) -> "ControlServer":
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, str(self._path), limit=READ_BYTES)
        self._path.chmod(0o600)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def next_id(self) -> int:
        """A fresh id for a command."""
        return next(self._ids)

    async def ask(self, relay: int, message: AgentMessage, timeout_s: float) -> RelayMessage:
        """Send a command and wait for its answer. Raises RelayGoneError, TimeoutError, or ControlError (too long)."""
        link = self._links.get(relay)
        if link is None:
            raise RelayGoneError(f"relay {relay} is not connected")
        if len(link.pending) >= MAX_PENDING:
            self.refused += 1
            raise RelayGoneError(f"relay {relay} owes too many answers")
        frame = encode_frame(message)
        future: asyncio.Future[RelayMessage] = asyncio.get_running_loop().create_future()
        link.pending[message.id] = future
        try:
            async with asyncio.timeout(timeout_s):
                link.writer.write(frame)
                await link.writer.drain()
                return await future
        except TimeoutError:  # an OSError too, but not a lost connection
            raise
        except OSError as error:
            raise RelayGoneError(f"relay {relay}: {error.strerror or 'connection lost'}") from None
        finally:
            link.pending.pop(message.id, None)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        link = _RelayLink(writer)
        relay: int | None = None
        try:
            if len(self._tasks) > MAX_CONNECTIONS:
                self.refused += 1
                raise ControlError("too many connections")
            decoder = agent_side()
            while True:
                timeout_s = HELLO_TIMEOUT_S if relay is None else None
                async with asyncio.timeout(timeout_s):
                    data = await reader.read(READ_BYTES)
                if not data:
                    return
                for message in decoder.feed(data):
                    relay = self._receive(link, relay, message)
        except (ControlError, TimeoutError) as error:
            reason = str(error) or "it did not say hello"
            log.warning("relay disconnected", extra={"relay": relay, "reason": reason})
        except OSError:
            pass
        except asyncio.CancelledError:
            pass  # the agent stops; nobody waits for this task's result
        finally:
            if relay is not None and self._links.get(relay) is link:
                del self._links[relay]
            link.end()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _receive(self, link: _RelayLink, relay: int | None, message: RelayMessage) -> int:
        if isinstance(message, Hello):
            former = self._links.get(message.relay)
            if former is not None and former is not link:
                former.end()
            self._links[message.relay] = link
            log.info("relay connected", extra={"relay": message.relay, "relay_pid": message.pid})
            return message.relay
        if relay is None:
            raise ControlError("first message is no hello")
        future = link.pending.get(message.id)
        if future is not None and not future.done():
            future.set_result(message)
        return relay
