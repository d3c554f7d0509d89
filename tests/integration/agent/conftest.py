"""Fixtures of the agent's integration tests."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from .fakes import FakeControlPlane, FakeWorker


@pytest.fixture
async def control_plane() -> AsyncIterator[FakeControlPlane]:
    """A control plane without a fleet."""
    fake = await FakeControlPlane().start()
    yield fake
    await fake.stop()


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    """A worker whose streams wait for its ``release``."""
    fake = await FakeWorker().start()
    yield fake
    fake.release.set()
    await fake.stop()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that opens a connection for each request, so that requests spread over the relays."""
    timeout = aiohttp.ClientTimeout(total=30)
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
        yield client
