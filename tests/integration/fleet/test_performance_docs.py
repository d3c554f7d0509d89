"""docs/performance.md names every metric that there is, and no other."""

import re
from pathlib import Path

import aiohttp
import pytest

from router.telemetry.metrics import LIMITS
from twofold.cli.fleet_runner import Fleet

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE = DOCS / "performance.md"
KV_EVENTS = DOCS / "kv-events.md"
"""Names what is only there where engines publish KV events."""
TYPE_LINE = re.compile(r"^# TYPE (twofold_\S+) ", re.MULTILINE)
NAME = re.compile(r"`(twofold_[a-z0-9_]+)")
LIMIT = re.compile(r'limit="([a-z_]+)"')
LIMIT_HITS = re.compile(r'^twofold_(?:controlplane_)?limit_hits_total\{limit="([a-z_]+)"\}', re.MULTILINE)

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="documentation is not part of the wheel")


async def exposed(url: str) -> tuple[set[str], str]:
    """Names of the metrics at ``url``, and all of the page."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as reply:
        assert reply.status == 200
        text = await reply.text()
    return set(TYPE_LINE.findall(text)), text


async def test_every_metric_is_documented_and_every_documented_metric_exists(start_fleet) -> None:  # type: ignore[no-untyped-def]
    fleet: Fleet = await start_fleet(replicas=1, relays=1, engines=1)
    replica, replica_page = await exposed(fleet.router_admin_urls[0])
    control_plane, control_plane_page = await exposed(f"http://{fleet.file.control_plane.metrics}")
    page = PAGE.read_text()
    documented = set(NAME.findall(page))
    there = replica | control_plane
    elsewhere = set(NAME.findall(KV_EVENTS.read_text())) if KV_EVENTS.exists() else set()
    assert there - documented - elsewhere == set(), "metrics that docs/performance.md does not name"
    assert documented - there == set(), "metrics that docs/performance.md names and nobody exposes"
    assert set(LIMIT_HITS.findall(replica_page)) == set(LIMITS)
    assert set(LIMIT.findall(page)) == set(LIMIT_HITS.findall(replica_page + control_plane_page))
