"""The connection to the control plane: one channel at a time, the fleet watched over it, the report stream beside."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from router.agent.backoff import Backoff
from twofold import wire
from twofold.model.fleet import FleetSnapshot
from twofold.v1 import fleet_pb2, fleet_pb2_grpc

log = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
"""A report stream that was cancelled gets this long to end before the link goes on without it."""
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
Metadata = tuple[tuple[str, str], ...]


class LinkError(Exception):
    """The link to the control plane failed in a way gRPC does not see; the message says how."""


class Credentials:
    """How the agent proves itself and checks the control plane."""

    def __init__(self, token: str = "", *, ca_file: str = "", cert_file: str = "", key_file: str = "") -> None:
        """Raises OSError when a file cannot be read, ValueError when certificate and key do not come together."""
        if bool(cert_file) != bool(key_file):
            raise ValueError("tls_cert_file and tls_key_file go together")
        self.token = token
        self.metadata: Metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._tls: grpc.ChannelCredentials | None = None
        if ca_file or cert_file:
            self._tls = grpc.ssl_channel_credentials(
                root_certificates=Path(ca_file).read_bytes() if ca_file else None,
                private_key=Path(key_file).read_bytes() if key_file else None,
                certificate_chain=Path(cert_file).read_bytes() if cert_file else None,
            )

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to ``address`` (host:port); connects when first used."""
        options = (
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", int(1000 * BACKOFF_MAX_S)),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        )
        if self._tls is not None:
            return grpc.aio.secure_channel(address, self._tls, options=options)
        return grpc.aio.insecure_channel(address, options=options)


class ControlPlaneLink:
    """Keeps a watch on the fleet open and calls ``on_snapshot`` with every change of it.

    The watch resumes by (epoch, version). While it is open, ``beside(channel)`` runs on the same channel (the report
    stream); it is started again with backoff when it fails, and ended with the channel. After any failure the next
    address is tried.
    """

    def __init__(
        self,
        replica_id: str,
        addresses: Sequence[str],
        credentials: Credentials,
        *,
        connect_timeout_s: float,
        silence_timeout_s: float,
        on_snapshot: Callable[[FleetSnapshot], None],
        beside: Callable[[grpc.aio.Channel], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        self._replica_id = replica_id
        self._addresses = tuple(addresses)
        self._credentials = credentials
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._on_snapshot = on_snapshot
        self._beside = beside
        self._rng = rng
        self._backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S, rng)
        self._last_failure = ""
        self.snapshot: FleetSnapshot | None = None
        self.connected = False
        self.address = ""
        self.reconnects = 0

    def resume_from(self, snapshot: FleetSnapshot) -> None:
        """The snapshot that an earlier agent had; the watch asks only for what changed since."""
        self.snapshot = snapshot

    async def run(self) -> None:
        """Stay connected, for ever."""
        attempt = 0
        while self._addresses:
            self.address = self._addresses[attempt % len(self._addresses)]
            attempt += 1
            try:
                await self._session()
                failure = "the control plane ended the watch"
            except grpc.aio.AioRpcError as error:
                failure = f"{error.code().name}: {(error.details() or '')[:200]}"
            except (LinkError, wire.WireError) as error:
                failure = str(error)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                failure = "the watch was cancelled"
            self.connected = False
            self.reconnects += 1
            self._note_failure(failure)
            await asyncio.sleep(self._backoff.next_s())

    def _note_failure(self, failure: str) -> None:
        level = logging.WARNING if failure != self._last_failure else logging.DEBUG
        self._last_failure = failure
        log.log(level, "no control plane", extra={"address": self.address, "reason": failure})

    async def _session(self) -> None:
        async with self._credentials.channel(self.address) as channel:
            await self._connect(channel)
            held = self.snapshot
            request = fleet_pb2.WatchRequest(
                replica_id=self._replica_id,
                epoch=held.epoch if held else 0,
                version=held.version if held else 0,
            )
            call = fleet_pb2_grpc.FleetServiceStub(channel).Watch(request, metadata=self._credentials.metadata)
            beside = asyncio.create_task(self._keep_beside(channel), name="report")
            try:
                async for response in self._responses(call):
                    self._take(response)
                    if not self.connected:
                        self._note_connected()
            finally:
                call.cancel()
                beside.cancel()
                done, _ = await asyncio.wait({beside}, timeout=END_TIMEOUT_S)
                if not done:
                    # The channel is closed next, which ends its calls.
                    log.warning("the report stream does not end", extra={"address": self.address})
                elif not beside.cancelled():
                    beside.result()

    async def _connect(self, channel: grpc.aio.Channel) -> None:
        """Wait for the connection; a refused one fails at once, so that the next address gets its turn."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise LinkError("connection refused or failed")
                    await channel.wait_for_state_change(state)
        except TimeoutError:
            raise LinkError(f"no connection within {self._connect_timeout_s:g} s") from None

    def _note_connected(self) -> None:
        self.connected = True
        self._backoff.reset()
        self._last_failure = ""
        held = self.snapshot
        extra = {"epoch": held.epoch, "version": held.version} if held is not None else {}
        log.info("watching the fleet", extra={"address": self.address, **extra})

    async def _responses(self, call: Any) -> AsyncIterator[fleet_pb2.WatchResponse]:
        messages = aiter(call)
        while True:
            try:
                async with asyncio.timeout(self._silence_timeout_s):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise LinkError(f"no message for {self._silence_timeout_s:g} s") from None
            yield message

    def _take(self, response: fleet_pb2.WatchResponse) -> None:
        kind = response.WhichOneof("update")
        if kind is None:
            return
        try:
            if kind == "snapshot":
                snapshot = wire.snapshot_from_proto(response.snapshot)
            elif self.snapshot is None:
                raise wire.WireError("delta before any snapshot")
            else:
                snapshot = wire.apply_delta(self.snapshot, response.delta)
        except wire.WireError:
            # Whatever went wrong, a full snapshot repairs it; the one in force stays in force until then.
            self.snapshot = None
            raise
        self.snapshot = snapshot
        self._on_snapshot(snapshot)

    async def _keep_beside(self, channel: grpc.aio.Channel) -> None:
        backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S, self._rng)
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            try:
                await self._beside(channel)
                reason = "the control plane ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {(error.details() or '')[:200]}"
            except (LinkError, asyncio.InvalidStateError) as error:
                reason = str(error)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                reason = "the stream was cancelled"
            if loop.time() - started_s > BACKOFF_MAX_S:
                backoff.reset()
            log.warning("report stream ended", extra={"address": self.address, "reason": reason})
            await asyncio.sleep(backoff.next_s())


def _is_cancelled() -> bool:
    """Whether this task is to end.

    gRPC raises CancelledError also in tasks that nobody cancelled, when a call was cancelled below them; that is a
    failure like any other, and must not end what is to run for ever.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
