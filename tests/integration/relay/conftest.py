"""Fixtures of the relay's tests: they run on uvloop, as the relay does."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop
from support.relays import TestRelay, relay


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[TestRelay]:
    """A relay with default settings; the test installs its workers."""
    async with relay(tmp_path) as made:
        yield made
