"""When workers are probed: spread out, bounded in all, unsure ones first."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.fleet.events import ProbeResult
from controlplane.fleet.values import ProbeOutcome, RankRecord, Source, WorkerRecord
from controlplane.probes import prober as prober_module
from controlplane.probes.client import Finding
from controlplane.probes.prober import Intervals, Prober
from twofold.model.fleet import EngineFacts, Health

from .builders import spec


class Client:
    """Every probe succeeds at once."""

    def __init__(self) -> None:
        self.probed: list[str] = []

    async def probe(self, url: str, known: EngineFacts | None, model: str) -> Finding:
        self.probed.append(url)
        return Finding(outcome=ProbeOutcome.OK, facts=known or EngineFacts())


class Fleet:
    """Workers w0..wn in a state of health, and a prober of them."""

    def __init__(self, count: int, health: Health = Health.HEALTHY, *, reported: bool = True) -> None:
        self.client: Any = Client()
        self.results: list[ProbeResult] = []
        self.records = {
            f"w{i}": WorkerRecord(
                spec=spec(f"w{i}", url=f"http://w{i}:1"), source=Source.FILE, ranks=(RankRecord(),), health=health
            )
            for i in range(count)
        }
        self.prober = Prober(
            self.client, self.results.append, self.records.get, lambda target_id: (0, 0), lambda: reported
        )

    def declare(self) -> None:
        self.prober.set_workers((name, record.spec.url, "m") for name, record in self.records.items())

    def interval_s(self, name: str) -> float:
        return self.prober._interval_s(self.prober._plans[name])


@pytest.mark.parametrize(
    ("health", "reported", "interval_s"),
    [
        (Health.STARTING, True, Intervals().unsure),
        (Health.SUSPECT, True, Intervals().unsure),
        (Health.HEALTHY, True, Intervals().reported),
        (Health.HEALTHY, False, Intervals().unreported),
        (Health.RECONFIGURING, True, Intervals().unreported),
        (Health.GONE, True, Intervals().gone),
    ],
)
def test_how_often_depends_on_what_is_known(health: Health, reported: bool, interval_s: float) -> None:
    fleet = Fleet(3, health, reported=reported)
    fleet.declare()
    assert {fleet.interval_s(name) for name in fleet.records} == {interval_s}


def test_a_failed_probe_makes_a_healthy_worker_unsure() -> None:
    fleet = Fleet(1)
    fleet.declare()
    fleet.records["w0"] = replace(fleet.records["w0"], failed_probes=1)
    assert fleet.interval_s("w0") == Intervals().unsure


def test_in_a_large_fleet_all_of_one_state_share_a_bound_and_the_few_unsure_keep_their_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prober_module, "MAX_PER_S", 10.0)
    fleet = Fleet(100, reported=False)
    fleet.declare()
    for name in fleet.records:
        fleet.interval_s(name)
    assert fleet.interval_s("w0") == pytest.approx(10.0), "100 workers at 10 a second"
    for name in ("w1", "w2"):
        fleet.records[name] = replace(fleet.records[name], health=Health.SUSPECT)
    assert [fleet.interval_s(name) for name in ("w1", "w2")] == [Intervals().unsure] * 2
    fleet.records = {name: record for name, record in fleet.records.items() if name in ("w3", "w4")}
    fleet.declare()
    assert fleet.interval_s("w3") == Intervals().unreported, "the others are gone and forgotten"


async def test_the_first_probes_of_many_workers_are_spread_and_each_worker_is_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prober_module, "MAX_PER_S", 200.0)
    fleet = Fleet(100)
    fleet.declare()
    due = sorted(plan.due_s for plan in fleet.prober._plans.values())
    assert 0.3 < due[-1] - due[0] <= 0.5
    fleet.prober.start()
    async with asyncio.timeout(20):
        while len({result.worker_id for result in fleet.results}) < 100:
            await asyncio.sleep(0.01)
    assert len(fleet.results) == 100
    await fleet.prober.stop()


async def test_a_router_that_fails_brings_the_next_probe_forward() -> None:
    fleet = Fleet(5)
    fleet.declare()
    fleet.prober.start()
    async with asyncio.timeout(20):
        while len(fleet.results) < 5:
            await asyncio.sleep(0.01)
        fleet.prober.probe_soon("w3")
        while len(fleet.results) < 6:
            await asyncio.sleep(0.01)
    assert fleet.results[-1].worker_id == "w3"
    await fleet.prober.stop()
