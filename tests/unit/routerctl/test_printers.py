"""Printers: whatever a message holds, programs get valid JSON and YAML and terminals get no control characters."""

import json
import math
from typing import Any

import pytest
import yaml
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from unit.routerctl import samples

from routerctl.printers import decision, fleet, machine, top, worker
from routerctl.printers.text import Column, Table, age, duration, moment, printable, render
from twofold.v1 import admin_pb2, fleet_pb2, router_pb2

SCALARS: dict[int, st.SearchStrategy[Any]] = {
    1: st.floats(),
    2: st.floats(width=32),
    4: st.integers(0, 2**64 - 1),
    5: st.integers(-(2**31), 2**31 - 1),
    6: st.integers(0, 2**64 - 1),
    8: st.booleans(),
    9: st.text(st.characters(codec="utf-8"), max_size=8),
    12: st.binary(max_size=8),
    13: st.integers(0, 2**32 - 1),
    14: st.integers(0, 9),
}


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], depth: int = 3) -> Message:
    """Messages of a kind with any content, unknown enum values included."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if draw(st.booleans()):
            continue
        if field.message_type is None:
            value = st.lists(SCALARS[field.type], max_size=2) if field.is_repeated else SCALARS[field.type]
            setting = draw(value)
            getattr(message, field.name).extend(setting) if field.is_repeated else setattr(message, field.name, setting)
        elif depth and not field.message_type.GetOptions().map_entry:
            inner = messages(field.message_type._concrete_class, depth - 1)
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(inner, max_size=2)))
            else:
                getattr(message, field.name).CopyFrom(draw(inner))
    return message


def assert_printable(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.endswith("\n")


@given(messages(fleet_pb2.FleetSnapshot), st.floats(0, 1e12), st.booleans())
def test_any_fleet_can_be_shown(snapshot: fleet_pb2.FleetSnapshot, now_s: float, wide: bool) -> None:
    assert_printable(render(fleet.workers(snapshot.targets, now_s), wide=wide))
    assert_printable(render(fleet.models(fleet.model_documents(snapshot)), wide=wide))
    assert_printable(render(fleet.pools(snapshot, snapshot.pools), wide=wide))
    found = machine.document(snapshot) | {"more": fleet.pool_documents(snapshot, snapshot.pools)}
    as_json, as_yaml = machine.to_json(found), machine.to_yaml(found)
    assert as_json.isascii()
    assert json.loads(as_json) == found
    assert yaml.safe_load(as_yaml) == found


@given(messages(admin_pb2.ListRoutersResponse), messages(admin_pb2.TopResponse), st.floats(0, 1e12))
def test_any_routers_and_top_can_be_shown(
    routers: admin_pb2.ListRoutersResponse, load: admin_pb2.TopResponse, now_s: float
) -> None:
    assert_printable(render(fleet.routers(routers.routers, now_s), wide=True))
    assert_printable(top.text(load, wide=True))
    top.screen(load, "title", "trouble", wide=True)
    machine.to_json({"routers": [fleet.router_document(router) for router in routers.routers]})


@given(messages(admin_pb2.DescribeWorkerResponse), st.text(max_size=8), st.floats(0, 1e12))
def test_any_worker_can_be_described(answer: admin_pb2.DescribeWorkerResponse, name: str, now_s: float) -> None:
    assert_printable(worker.describe(name, answer, now_s))


@given(messages(router_pb2.Decision), st.booleans())
def test_any_decision_can_be_explained(one: router_pb2.Decision, past: bool) -> None:
    assert_printable(decision.explain(one, past=past))
    machine.to_json(machine.document(one))


def test_numbers_json_does_not_know_are_null() -> None:
    message = router_pb2.RouterTop(inflight=2**64 - 1, ttft_p50_s=math.nan, hit_ratio=math.inf)
    found = machine.document(message)
    assert (found["inflight"], found["ttft_p50_s"], found["hit_ratio"]) == (2**64 - 1, None, None)
    assert set(found) == {field.name for field in router_pb2.RouterTop.DESCRIPTOR.fields}


def test_enum_values_are_the_words_of_the_model_and_unknown_ones_their_number() -> None:
    assert machine.document(samples.target("w", health=4))["health"] == "gone"
    assert machine.document(samples.target("w", health=77))["health"] == "77"


def test_maps_become_objects() -> None:
    message = admin_pb2.SetPolicyRequest(fields={"b": "2", "a": "1"})
    assert machine.document(message) == {"fields": {"a": "1", "b": "2"}}


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        (0, "0 s"),
        (0.00042, "0.42 ms"),
        (0.25, "250 ms"),
        (0.99949, "999 ms"),
        (0.9999, "1.00 s"),
        (119.99, "119.99 s"),
        (120, "2m00s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (2 * 86400, "2d00h"),
        (-0.5, "-500 ms"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_durations(value_s: float, text: str) -> None:
    assert duration(value_s) == text


@given(st.floats())
def test_times_are_never_an_error(value_s: float) -> None:
    assert moment(value_s)
    assert age(value_s, 1e9)
    assert duration(value_s)


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "a\nb", "\x9b31m", "\u202eabc", "\x00", "\u2028"])
def test_nothing_printed_steers_the_terminal(text: str) -> None:
    assert printable(text).isprintable()
    table = Table(columns=(Column("A"),), rows=((text,),))
    assert_printable(render(table))
    assert len(render(table).splitlines()) == 2


def test_columns_line_up_with_wide_characters() -> None:
    table = Table(columns=(Column("A"), Column("N", number=True)), rows=(("\u4e16\u754c", "1"), ("abcdef", "10")))
    assert render(table) == "A         N\n\u4e16\u754c      1\nabcdef   10\n"
