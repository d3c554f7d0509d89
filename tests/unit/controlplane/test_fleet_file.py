"""fleet.yaml: what is accepted, and errors that name file, line and path."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controlplane.discovery.fleet_file import (
    FleetFile,
    FleetFileError,
    fleet_file_from_mapping,
    load_fleet_file,
    parse_fleet_file,
    split_listen,
    valid_url,
)

GOOD = """\
name: demo
control_plane: {listen: 127.0.0.1:7700, metrics: 127.0.0.1:7701}
routers: {replicas: 2, relays: 1, host: 127.0.0.1, port: 8000, admin_port: 8100}
policy: {name: twofold}
profiles:
  - {base: l4-8b-tp1, name: my-l4, kv_capacity_tokens: 50000}
pools:
  - name: llama-8b
    models: [llama-3.1-8b, default]
    slo: {ttft_s: 2.0, tpot_s: 0.1, percentile: 0.9}
    workers:
      - {profile: a100-80gb-8b-tp1, engine: emulated, replicas: 4, time_scale: 2.0, port_base: 9100}
      - {profile: cpu-tiny, engine: vllm, replicas: 2, port_base: 9200, engine_args: [--dtype, float32], env: {A: b}}
      - {profile: my-l4, urls: ["http://10.0.0.5:8000", "http://[::1]:8001"]}
"""


def test_the_documented_file_is_understood() -> None:
    file = parse_fleet_file(GOOD.encode())
    assert [group.desired for group in file.pools[0].workers] == [4, 2, 2]
    pool = file.model_pools()[0]
    assert (pool.models, pool.slo.ttft_s) == (("llama-3.1-8b", "default"), 2.0)
    profiles = file.model_profiles()
    assert set(profiles) == {"a100-80gb-8b-tp1@x2", "cpu-tiny", "my-l4"}
    assert profiles["my-l4"].kv_capacity_tokens == 50_000


def test_a_faster_clock_is_a_faster_profile() -> None:
    file = parse_fleet_file(GOOD.encode())
    fast = file.model_profiles()["a100-80gb-8b-tp1@x2"]
    plain = parse_fleet_file(GOOD.replace("time_scale: 2.0, ", "").encode()).model_profiles()["a100-80gb-8b-tp1"]
    assert fast.prefill_s(4096, 0) == pytest.approx(plain.prefill_s(4096, 0) / 2)


def test_written_and_read_again_it_is_the_same() -> None:
    file = parse_fleet_file(GOOD.encode())
    assert parse_fleet_file(yaml.safe_dump(msgspec.to_builtins(file)).encode()) == file
    assert fleet_file_from_mapping(msgspec.to_builtins(file)) == file


def test_an_empty_file_is_a_fleet_of_nothing() -> None:
    assert parse_fleet_file(b"") == FleetFile()


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        ("replicas: 4", "replicas: many", 12, "pools[0].workers[0].replicas: expected 'int', got 'str'"),
        ("replicas: 4", "replicas: -1", 12, "pools[0].workers[0].replicas: expected 'int' >= 0"),
        ("replicas: 4", "replicsa: 4", 12, "pools[0].workers[0].replicsa: unknown field"),
        ("name: llama-8b", "title: llama-8b", 8, "pools[0].title: unknown field"),
        ("- name: llama-8b\n    ", "- ", 8, "pools[0]: object missing required field 'name'"),
        ("a100-80gb-8b-tp1", "b200", 12, "pools[0].workers[0].profile: unknown engine profile 'b200'"),
        ("http://10.0.0.5:8000", "10.0.0.5:8000", 14, "pools[0].workers[2].urls[0]: '10.0.0.5:8000' is not http"),
        ("engine: vllm", "engine: sglang", 13, "pools[0].workers[1].engine: invalid enum value 'sglang'"),
        ("port_base: 9200", "port_base: 9103", 13, "port 9103 is also used by llama-8b/a100-80gb-8b-tp1"),
        ("port_base: 9100", "port_base: 65533", 12, "port 65536 is above 65535"),
        ("name: twofold", "name: magic", 4, "policy.name: unknown policy 'magic'"),
        ("listen: 127.0.0.1:7700", "listen: nowhere", 2, "control_plane.listen: expected host:port"),
        ("base: l4-8b-tp1", "base: nope", 5, "profiles: unknown engine profile 'nope'"),
        ("[llama-3.1-8b, default]", "[]", 9, "pools[0].models: expected 'array' of length >= 1"),
        ("engine: vllm, replicas: 2", "engine: vllm, time_scale: 3", 13, "time_scale: only emulated engines have one"),
        ("models:", "models: [x]\n    models:", 10, "'models' is given twice"),
        ("name: demo", "name: [unclosed", 2, "expected ',' or ']', but got ':'"),
    ],
)
def test_errors_name_line_and_path(old: str, new: str, line: int, text: str) -> None:
    assert old in GOOD
    with pytest.raises(FleetFileError) as caught:
        parse_fleet_file(GOOD.replace(old, new, 1).encode(), "fleet.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"fleet.yaml:{line}: ")
    assert text in str(caught.value)


def pool(**changes: Any) -> dict[str, Any]:
    """A pool with one group."""
    return {"name": "p", "models": ["m"], "workers": [{"profile": "cpu-tiny"}], **changes}


@pytest.mark.parametrize(
    ("pools", "text"),
    [
        ([pool(), pool(models=["n"])], "pools[1].name: pool 'p' is defined twice"),
        ([pool(), pool(name="q")], "pools[1].models[0]: model 'm' is also served by pool 'p'"),
        ([pool(workers=[{"profile": "cpu-tiny"}] * 2)], "pools[0].workers[1]: another group"),
        ([pool(name="a b")], "pools[0].name"),
        ([pool(reference_profile="nope")], "pools[0].reference_profile: unknown engine profile"),
        ([pool(workers=[{"profile": "cpu-tiny", "urls": ["http://a:1"] * 2}])], "http://a:1 is listed twice"),
        ([pool(workers=[{"profile": "cpu-tiny", "replicas": 10_001}])], "pools[0].workers[0].replicas"),
    ],
)
def test_contradictions_are_refused(pools: list[Any], text: str) -> None:
    with pytest.raises(FleetFileError, match=r"^[^\n]*$") as caught:
        fleet_file_from_mapping({"pools": pools})
    assert text in str(caught.value)


def test_the_reference_of_a_pool_does_not_depend_on_the_order_of_its_groups() -> None:
    groups = [{"profile": "l4-8b-tp1"}, {"profile": "h100-8b-tp1"}, {"profile": "a100-80gb-8b-tp1"}]
    names = {
        fleet_file_from_mapping({"pools": [pool(workers=order)]}).model_pools()[0].reference_profile
        for order in (groups, groups[::-1])
    }
    assert names == {"h100-8b-tp1"}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "x: &x {y: *x}",
        "a: " + "[" * 200 + "]" * 200,
        "[" * 100_000,
        "{" * 5_000,
        "\n".join(
            ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
        ),
        "when: 2020-13-99",
        "? [a, b]\n: c",
        "!!python/object/apply:os.system ['true']",
        "\x00",
        "a: !!int x",
        "- just\n- a list",
        "just text",
        "pools: 7",
        "name: " + "x" * 100_000,
        "a: b\n---\nc: d",
        "1: 2",
        "name: \ud7ff",
        "name: demo\nname: demo2\npools: {}",
    ],
)
def test_hostile_files_are_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(FleetFileError) as caught:
        parse_fleet_file(text.encode("utf-8", "surrogatepass"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@given(st.binary(max_size=300))
@settings(max_examples=400, deadline=None)
def test_garbage_never_crashes(raw: bytes) -> None:
    try:
        parse_fleet_file(raw)
    except FleetFileError as error:
        assert "\n" not in str(error)  # noqa: PT017


WORDS = "name pools : - [ ] { } , &a *a !! | > ' \" # profile workers models cpu-tiny 1e999 -1 .nan ~ null true 0x7f"
TOKENS = st.sampled_from([*WORDS.split(), *"<<?%@", "2020-01-01", ": ", "- ", "\n", "  "])


@given(st.lists(TOKENS, max_size=60).map("".join))
@settings(max_examples=400, deadline=None)
def test_garbage_made_of_yaml_never_crashes(text: str) -> None:
    try:
        parse_fleet_file(text.encode())
    except FleetFileError as error:
        assert "\n" not in str(error)  # noqa: PT017


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(range(11)), VALUES)
@example(place=3, value={"\n": None})
@settings(max_examples=400, deadline=None)
def test_any_value_anywhere_is_taken_or_refused(place: int, value: Any) -> None:
    mapping: dict[str, Any] = yaml.safe_load(GOOD)
    group = mapping["pools"][0]["workers"][0]
    holders: list[tuple[Any, Any]] = [
        *((mapping, key) for key in ("name", "pools", "profiles", "policy", "routers", "control_plane")),
        *((group, key) for key in ("profile", "urls", "time_scale", "env")),
        (mapping["pools"][0], "models"),
    ]
    holder, key = holders[place]
    holder[key] = value
    try:
        file = fleet_file_from_mapping(mapping)
    except FleetFileError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        file.model_pools()
        file.model_profiles()


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FleetFileError, match="No such file"):
        load_fleet_file(tmp_path / "none.yaml")
    with pytest.raises(FleetFileError, match="directory"):
        load_fleet_file(tmp_path)


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("http://a:1", True),
        ("http://[::1]:80", True),
        ("http://a:1/", True),
        ("https://a:1", False),
        ("http://a", False),
        ("http://a:0", False),
        ("http://a:99999", False),
        ("http://u:p@a:1", False),
        ("http://a:1/x", False),
        ("http://a:1?x", False),
        ("http://:1", False),
        ("http://a:1\r\nx: y", False),
        ("http://" + "a" * 600 + ":1", False),
        ("http://[::1:1", False),
    ],
)
def test_urls(url: str, good: bool) -> None:
    assert valid_url(url) is good


def test_listen_addresses() -> None:
    assert split_listen("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_listen("[::1]:0") == ("::1", 0)
    assert [split_listen(text) for text in ("x", ":80", "a:b", "a:70000", "::1:80")] == [None] * 5
