"""The relay's end of the control channel to its agent. Optional: a relay without agent serves all the same."""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

from router.relay.context import RelayContext
from router.relay.service import RelayService
from router.routing.types import BadRequest
from router.shm.control import (
    AgentMessage,
    ControlError,
    Done,
    Explained,
    ExplainPast,
    ExplainRequest,
    Failed,
    Hello,
    Homes,
    Recorded,
    RecordProfile,
    RelayMessage,
    ResolveHomes,
    SetLogLevel,
    Stop,
    encode_frame,
    relay_side,
)
from twofold.runtime import sampler

log = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
READ_BYTES = 65_536


class ControlClient:
    """Connects to the agent whenever there is one and answers its commands."""

    def __init__(
        self,
        path: Path,
        *,
        relay: int,
        context: RelayContext,
        service: RelayService,
        stop: Callable[[float], None],
    ) -> None:
        self._path = path
        self._relay = relay
        self._context = context
        self._service = service
        self._stop = stop

    async def run(self) -> None:
        """Serve until cancelled."""
        backoff_s = MIN_BACKOFF_S
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(os.fspath(self._path))
            except OSError:
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
                continue
            backoff_s = MIN_BACKOFF_S
            try:
                await self._serve(reader, writer)
            except (OSError, ControlError) as error:
                log.info("control channel lost", extra={"cause": str(error)})
            finally:
                writer.close()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_frame(Hello(relay=self._relay, pid=os.getpid())))
        decoder = relay_side()
        while data := await reader.read(READ_BYTES):
            for message in decoder.feed(data):
                if isinstance(message, RecordProfile):
                    self._context.spawn(self._record(message, writer))
                else:
                    writer.write(self._frame(message))
            await writer.drain()

    async def _record(self, message: RecordProfile, writer: asyncio.StreamWriter) -> None:
        """Profile this process beside its work, then answer if the agent is still there."""
        profile = None
        with contextlib.suppress(sampler.BusyError):
            profile = await sampler.record(
                f"relay-{self._relay}", seconds=message.seconds, hz=message.hz, clock=message.clock
            )
        if writer.is_closing():
            return
        try:
            writer.write(encode_frame(Recorded(id=message.id, profile=profile)))
        except ControlError:
            writer.write(encode_frame(Failed(id=message.id, message="the profile is too long")))

    def _frame(self, message: AgentMessage) -> bytes:
        try:
            return encode_frame(self.answer(message))
        except ControlError:
            return encode_frame(Failed(id=message.id, message="the answer is too long"))
        except Exception:
            log.exception("control command failed")
            return encode_frame(Failed(id=message.id, message="internal error of the relay"))

    def answer(self, message: AgentMessage) -> RelayMessage:
        """Do what a command asks, other than RecordProfile, which takes its time."""
        if isinstance(message, ExplainPast):
            return Explained(id=message.id, decisions=self._context.decisions.find(message.request_id))
        if isinstance(message, ExplainRequest):
            return self._explain(message)
        if isinstance(message, ResolveHomes):
            return self._homes(message)
        if isinstance(message, SetLogLevel):
            level = logging.getLevelNamesMapping().get(message.level.upper())
            if level is None:
                return Failed(id=message.id, message=f"unknown log level {message.level[:32]!r}", invalid=True)
            logging.getLogger().setLevel(level)
            return Done(id=message.id)
        assert isinstance(message, Stop)
        self._stop(message.grace_s)
        return Done(id=message.id)

    def _homes(self, message: ResolveHomes) -> Homes:
        live = self._context.fleet.live
        pool = live.pool_state(message.pool)
        if pool is None:
            return Homes(id=message.id)
        homes = tuple(live.homes(message.pool, key) for key in message.keys)
        return Homes(id=message.id, ring_version=pool.ring.version, homes=homes)

    def _explain(self, message: ExplainRequest) -> RelayMessage:
        try:
            explained = self._service.explain(message.path, message.headers, message.body)
        except BadRequest as error:
            return Failed(id=message.id, message=error.message, invalid=error.status != 503)
        return Explained(id=message.id, decisions=(explained,))
