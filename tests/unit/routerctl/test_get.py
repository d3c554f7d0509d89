"""``get`` and ``describe``: what is asked and what is shown."""

import json

import grpc
import pytest
import yaml
from unit.routerctl import samples
from unit.routerctl.fakes import Ctl, FakeControlPlane, Status

from twofold.v1 import fleet_pb2


@pytest.fixture(autouse=True)
def _fleet(control_plane: FakeControlPlane) -> None:
    control_plane.answers |= {
        "GetFleet": samples.fleet(),
        "ListRouters": samples.routers(),
        "DescribeWorker": samples.described(),
    }


def test_workers_are_listed_one_row_per_target(ctl: Ctl) -> None:
    ran = ctl("get", "workers")
    assert ran.code == 0
    assert ran.err == ""
    head, *lines = ran.out.splitlines()
    assert head.split() == ["WORKER", "POOL", "PROFILE", "STATUS", "RUNNING", "WAITING", "KV", "SEEN", "CONDITIONS"]
    assert [line.split()[0] for line in lines] == ["w0", "w1", "w2/0", "w2/1"]
    assert [line.split()[3] for line in lines] == ["healthy", "healthy,cordoned", "healthy", "suspect,draining"]
    assert lines[0].split()[4:7] == ["7", "2", "37.5%"]
    assert lines[1].endswith("probe-failing, from-the-future")
    assert not any(line != line.rstrip() for line in lines)


def test_wide_adds_columns(ctl: Ctl) -> None:
    ran = ctl("get", "workers", "-o", "wide")
    assert ran.code == 0
    head, first, *_ = ran.out.splitlines()
    assert {"URL", "NODE", "ZONE", "INCARNATION"} <= set(head.split())
    assert "http://10.0.0.7:8000/w0" in first
    assert "25.0%" in first


def test_workers_as_json_have_stable_keys_and_plain_numbers(ctl: Ctl) -> None:
    ran = ctl("-o", "json", "get", "workers")
    found = json.loads(ran.out)
    assert set(found) == {"epoch", "version", "workers"}
    assert found["epoch"] == 2**63 + 11
    worker = found["workers"][1]
    assert set(worker) == {field.name for field in fleet_pb2.Target.DESCRIPTOR.fields}
    assert worker["health"] == "healthy"
    assert worker["cordoned"] is True
    assert worker["data_parallel_rank"] is None
    assert found["workers"][2]["data_parallel_rank"] == 0
    assert worker["conditions"] == ["probe-failing", "from-the-future"]
    assert worker["load"]["kv_usage"] == 0.375


@pytest.mark.parametrize(
    "command",
    [
        ("get", "workers"),
        ("get", "models"),
        ("get", "pools"),
        ("get", "routers"),
        ("describe", "worker", "w2"),
    ],
)
def test_yaml_says_the_same_as_json(ctl: Ctl, command: tuple[str, ...]) -> None:
    as_json, as_yaml = ctl(*command, "-o", "json"), ctl(*command, "-o", "yaml")
    assert (as_json.code, as_yaml.code) == (0, 0)
    assert as_json.out.startswith("{")
    assert not as_yaml.out.startswith("{")
    assert yaml.safe_load(as_yaml.out) == json.loads(as_json.out)


def test_workers_can_be_chosen_by_id_and_pool(ctl: Ctl) -> None:
    assert [w["target_id"] for w in json.loads(ctl("get", "workers", "w2", "-o", "json").out)["workers"]] == [
        "w2/0",
        "w2/1",
    ]
    assert [w["target_id"] for w in json.loads(ctl("get", "workers", "w2/1", "w0", "-o", "json").out)["workers"]] == [
        "w0",
        "w2/1",
    ]
    assert ctl("get", "workers", "--pool", "empty").out == "no workers\n"


@pytest.mark.parametrize("noun", ["worker", "model", "router", "pool"])
def test_an_unknown_name_is_one_line_and_1(ctl: Ctl, noun: str) -> None:
    ran = ctl("get", f"{noun}s", "nosuch")
    assert (ran.code, ran.out, ran.err) == (1, "", f"routerctl: error: {noun} 'nosuch' not found\n")


def test_models_name_aliases_and_adapters(ctl: Ctl) -> None:
    models = json.loads(ctl("get", "models", "-o", "json").out)["models"]
    assert [(m["name"], m["kind"], m["pool"], m["ready_targets"], m["targets"]) for m in models] == [
        ("default", "alias", "llama-8b", 2, 4),
        ("ghost", "served", "empty", 0, 0),
        ("llama-3.1-8b", "served", "llama-8b", 2, 4),
        ("sql-lora", "adapter", "llama-8b", 2, 4),
    ]
    table = ctl("get", "models").out
    assert "131,072" in table
    assert len(table.splitlines()) == 5
    assert len(ctl("get", "models", "--pool", "empty").out.splitlines()) == 2


def test_pools_show_counts_and_slo(ctl: Ctl) -> None:
    table = ctl("get", "pools").out.splitlines()
    assert table[1].split()[:6] == ["llama-8b", "llama-3.1-8b,", "default", "2", "4", "131,072"]
    assert "ttft 2.00 s, tpot 100 ms at 90.0%" in table[1]
    pools = json.loads(ctl("get", "pools", "-o", "json").out)["pools"]
    assert (pools[0]["targets"], pools[0]["ready_targets"], pools[0]["slo"]["percentile"]) == (4, 2, 0.9)
    assert pools[1]["slo"] is None
    assert "4.25" in ctl("get", "pools", "-o", "wide").out


def test_routers_show_who_is_lost(ctl: Ctl) -> None:
    lines = ctl("get", "routers").out.splitlines()
    assert lines[1].split()[:7] == ["router-0", "connected", "20", "ms", "5/42", "1,234", "2"]
    assert lines[2].split()[:3] == ["router-1", "lost", "5m00s"]
    found = json.loads(ctl("get", "routers", "-o", "json").out)["routers"]
    assert found[0]["replica_id"] == "router-0"
    assert found[0]["snapshot_version"] == 42
    assert found[1]["connected"] is False
    assert "hello" not in found[0]


def test_an_empty_fleet_says_so(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["GetFleet"] = fleet_pb2.FleetSnapshot()
    assert ctl("get", "workers").out == "no workers\n"
    assert ctl("get", "models").out == "no models\n"
    assert json.loads(ctl("get", "pools", "-o", "json").out)["pools"] == []


def test_describe_shows_all_parts(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    ran = ctl("describe", "worker", "w2")
    assert ran.code == 0
    assert control_plane.last("DescribeWorker").worker_id == "w2"
    for part in (
        "Target w2/0:",
        "Target w2/1:",
        "Profile a100-80gb-8b-tp1:",
        "A100-80GB",
        "eu-1",
        "400,000 tokens",
        "6 ms + 20 us",
    ):
        assert part in ran.out
    assert any(line.split()[:4] == ["router-0", "w2/0", "9", "6"] for line in ran.out.splitlines())
    assert "2023-11-14T22:13:20.000Z" in ran.out
    assert "probe-failing" in ran.out


def test_describe_as_json(ctl: Ctl) -> None:
    found = json.loads(ctl("describe", "worker", "w2", "-o", "json").out)
    assert set(found) == {"worker_id", "targets", "profile", "events", "loads"}
    assert found["profile"]["usd_per_hour"] is None
    assert found["profile"]["law"]["base_s"] == 0.006
    assert found["loads"][0]["inflight"] == 9


def test_describe_of_an_unknown_worker_is_1(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["DescribeWorker"] = Status(grpc.StatusCode.NOT_FOUND, "worker 'w9' is not known")
    ran = ctl("describe", "worker", "w9")
    assert (ran.code, ran.out, ran.err) == (1, "", "routerctl: error: worker 'w9' is not known\n")


def test_ready_targets_are_those_that_take_new_work(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    fleet = samples.fleet()
    del fleet.targets[:]
    fleet.targets.extend(
        [
            samples.target("ready"),
            samples.target("cordoned", cordoned=True),
            samples.target("draining", draining=True),
            samples.target("starting", health=fleet_pb2.HEALTH_STARTING),
        ]
    )
    control_plane.answers["GetFleet"] = fleet
    pool = json.loads(ctl("get", "pools", "llama-8b", "-o", "json").out)["pools"][0]
    assert (pool["ready_targets"], pool["targets"]) == (1, 4)
