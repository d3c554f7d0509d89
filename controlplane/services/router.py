"""RouterService: one stream per router replica."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from controlplane.app import ControlPlane
from controlplane.convert import checked_name
from controlplane.routers.hub import HubError, Session
from controlplane.routers.load import LoadError
from controlplane.rpc.errors import CallError, invalid
from twofold.v1 import router_pb2

HELLO_TIMEOUT_S = 10.0
MAX_TEXT = 512


class RouterService:
    """See router.proto."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane

    async def Report(self, requests: AsyncIterator[router_pb2.ReportRequest], context: Any) -> AsyncIterator[bytes]:
        """Load, demand and results up; load of the others and commands down."""
        hub = self._control_plane.hub
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(requests, None)
        except TimeoutError:
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {HELLO_TIMEOUT_S:g} s") from None
        if first is None or first.WhichOneof("message") != "hello":
            raise invalid("hello", "the first message must be hello")
        hello = first.hello
        checked_name("hello.replica_id", hello.replica_id)
        for field in ("version", "admin_address", "serving_url"):
            if len(getattr(hello, field)) > MAX_TEXT:
                raise invalid(f"hello.{field}", f"longer than {MAX_TEXT} characters")
        try:
            session = hub.connect(hello)
        except HubError as error:
            raise CallError(error.code, str(error)) from None
        reader = asyncio.create_task(self._read(session, requests), name=f"report-{hello.replica_id}")
        try:
            async with aclosing(hub.outgoing(session)) as messages:
                async for message in messages:
                    yield message
            if reader.done():
                reader.result()
            elif not session.connected:
                raise CallError(grpc.StatusCode.ABORTED, "replaced by a newer stream of the same replica")
            else:
                raise CallError(grpc.StatusCode.UNAVAILABLE, "the control plane is stopping")
        finally:
            hub.disconnect(session)
            reader.cancel()
            await asyncio.wait({reader})
            if not reader.cancelled():
                reader.exception()

    async def _read(self, session: Session, requests: AsyncIterator[router_pb2.ReportRequest]) -> None:
        hub = self._control_plane.hub
        try:
            async for request in requests:
                kind = request.WhichOneof("message")
                if kind == "load":
                    hub.tick(session, request.load)
                elif kind == "demand":
                    hub.demand.add(request.demand)
                elif kind == "result":
                    hub.result(session, request.result)
                elif kind == "hello":
                    raise invalid("hello", "only the first message is hello")
        except LoadError as error:
            raise invalid(error.field, str(error)) from None
        finally:
            session.ended.set()
            session.wake.set()
