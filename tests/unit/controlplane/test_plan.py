"""Desired state and the processes it leads to."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.discovery.fleet_file import FleetFile, fleet_file_from_mapping
from controlplane.plan import Desired, LaunchGroup, PlanError, launch_groups, settle, submit
from controlplane.providers.units import command, desired_units, fingerprint, worker_id

KEY = ("p", "cpu-tiny", "")


def file(**group: Any) -> FleetFile:
    """A fleet file with one group."""
    return fleet_file_from_mapping(
        {"pools": [{"name": "p", "models": ["m", "alias"], "workers": [{"profile": "cpu-tiny", **group}]}]}
    )


def launch(**group: Any) -> LaunchGroup:
    """The launch details of that group."""
    return next(iter(launch_groups(file(**group)).values()))


def desired(replicas: int, **changes: Any) -> Desired:
    """Desired state of that group."""
    return Desired(pool="p", profile="cpu-tiny", replicas=replicas, **changes)


def test_the_file_is_what_is_desired_until_a_plan_says_otherwise() -> None:
    groups = launch_groups(file(replicas=2))
    first = settle(groups, {})
    assert (first[KEY].replicas, first[KEY].generation) == (2, 1)
    planned = submit(first, [desired(5, generation=7)], 100)
    assert settle(groups, planned)[KEY].replicas == 5
    changed = settle(launch_groups(file(replicas=3)), planned)[KEY]
    assert (changed.replicas, changed.generation) == (3, 8)


def test_groups_that_left_the_file_are_desired_no_more() -> None:
    assert settle({}, settle(launch_groups(file()), {})) == {}


@pytest.mark.parametrize(
    ("item", "field", "stale"),
    [
        (desired(1, generation=1), "pools[0].generation", True),
        (replace(desired(1, generation=2), pool="q"), "pools[0].pool", False),
        (replace(desired(1, generation=2), profile="x"), "pools[0].profile", False),
        (desired(101, generation=2), "pools[0].replicas", False),
        (desired(1, generation=2, routing_share=2.0), "pools[0].routing_share", False),
        (desired(1, generation=2, routing_share=float("nan")), "pools[0].routing_share", False),
    ],
)
def test_plans_that_are_refused(item: Desired, field: str, stale: bool) -> None:
    known = settle(launch_groups(file()), {})
    with pytest.raises(PlanError) as caught:
        submit(known, [item], 100)
    assert (caught.value.field, caught.value.stale) == (field, stale)


def test_all_of_a_plan_is_accepted_or_none() -> None:
    known = settle(launch_groups(file()), {})
    with pytest.raises(PlanError, match="named twice"):
        submit(known, [desired(3, generation=2), desired(4, generation=3)], 100)
    assert known[KEY].replicas == 1


@given(st.sets(st.integers(0, 20), max_size=10), st.integers(0, 15), st.sets(st.integers(0, 20), max_size=5))
def test_shrinking_takes_victims_then_the_highest_and_growing_fills_gaps(
    present: set[int], replicas: int, victims: set[int]
) -> None:
    group = launch()
    names = tuple(worker_id(group, index) for index in victims)
    units = desired_units(group, desired(replicas, victims=names), present)
    chosen = {unit.indices[0] for unit in units}
    assert len(chosen) == len(units) == replicas
    if replicas <= len(present):
        assert chosen <= present
        left = present - chosen
        assert all(v in left for v in victims & present) or not (left - victims)
    else:
        assert present <= chosen
        assert max(chosen, default=0) < max(len(present) + replicas, max(present, default=0) + 1)


def test_several_engines_share_a_process_on_neighbouring_ports() -> None:
    group = launch(replicas=7, engines_per_process=3, port_base=9000)
    units = desired_units(group, desired(7), {0, 1, 2})
    assert [(unit.port, len(unit.indices)) for unit in units] == [(9000, 3), (9003, 3), (9006, 1)]
    argv, _ = command(units[1], units[1].port, "")
    assert argv[argv.index("--engines") + 1] == "3"


def test_commands_of_emulated_engines() -> None:
    group = launch(
        port_base=9000, time_scale=4, fault_injection=True, engine_args=["--max-num-seqs", "8"], env={"A": "b"}
    )
    unit = desired_units(group, replace(desired(1), profile=group.profile), set())[0]
    argv, env = command(unit, 9000, "/run/profiles")
    text = " ".join(argv)
    assert "-m emulator --profile cpu-tiny --model m" in text
    assert "--time-scale 4 --profile-file /run/profiles --admin-port 10000 --enable-fault-injection" in text
    assert argv[-2:] == ["--max-num-seqs", "8"]
    assert env == {"A": "b"}
    assert unit.worker_ids == ("p-cpu-tiny-x4-0",) or unit.worker_ids[0].startswith("p-cpu-tiny-x4-")


def test_commands_of_vllm_engines() -> None:
    group = launch(engine="vllm", python="/v/bin/python", engine_args=["--model", "tiny"], port_base=9200)
    argv, _ = command(desired_units(group, desired(1), set())[0], 9200, "")
    assert argv[:3] == ["/v/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert argv[argv.index("--served-model-name") + 1] == "m"
    assert argv[-2:] == ["--model", "tiny"]


def test_the_fingerprint_follows_what_decides_how_an_engine_runs() -> None:
    def of(**group: Any) -> str:
        made = launch(**group)
        return fingerprint(desired_units(made, replace(desired(2), profile=made.profile), set())[0], [])

    assert of() == of() == of(replicas=9)
    different = [of(), of(time_scale=2), of(env={"A": "1"}), of(port_base=1000), of(engine_args=["x"])]
    assert len(set(different)) == len(different)


def test_worker_ids_are_names_and_never_collide() -> None:
    long = fleet_file_from_mapping(
        {
            "pools": [
                {
                    "name": "p" * 120,
                    "models": ["a"],
                    "workers": [{"profile": "cpu-tiny", "zone": zone} for zone in "ab"],
                }
            ]
        }
    )
    ids = {worker_id(group, 0) for group in launch_groups(long).values()}
    assert len(ids) == 2
    assert all(len(name) <= 128 and "/" not in name for name in ids)
