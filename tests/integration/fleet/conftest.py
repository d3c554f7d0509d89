"""Whole fleets in real processes, on free ports."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.fleets import mapping

from controlplane.discovery.fleet_file import fleet_file_from_mapping
from twofold.cli.fleet_runner import Fleet

StartFleet = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def start_fleet(tmp_path: Path) -> AsyncIterator[StartFleet]:
    """Start a fleet and wait until it is ready; stopped after the test."""
    fleets: list[Fleet] = []

    async def start(**options: Any) -> Fleet:
        fleet = Fleet(fleet_file_from_mapping(mapping(**options)), tmp_path / f"run{len(fleets)}")
        fleets.append(fleet)
        await fleet.start()
        await fleet.wait_ready(60)
        return fleet

    yield start
    await asyncio.gather(*(fleet.stop() for fleet in fleets))
