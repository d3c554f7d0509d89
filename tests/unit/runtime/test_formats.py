"""A profile as collapsed stacks, as a table and for speedscope."""

import json

from twofold.runtime import formats
from twofold.runtime.formats import Format
from twofold.runtime.sampler import Clock, Profile, ThreadProfile

OUTER, INNER, OTHER = "run (a/b.py:1)", "Exchange.start (c/d.py:20)", "helper (a/b.py:9)"
PROFILE = Profile(
    process="relay-0",
    clock=Clock.WALL,
    seconds=10.0,
    hz=100.0,
    cpu_s=4.0,
    idle_threads=2,
    threads=(
        ThreadProfile(
            name="MainThread",
            cpu_s=3.5,
            samples=1000,
            stacks=((f"{OUTER};{INNER}", 600), (OUTER, 300), (f"{OUTER};{INNER};{INNER};{OTHER}", 100)),
        ),
    ),
)


def test_collapsed() -> None:
    assert formats.collapsed(PROFILE).splitlines() == [
        f"relay-0;MainThread;{OUTER};{INNER} 600",
        f"relay-0;MainThread;{OUTER} 300",
        f"relay-0;MainThread;{OUTER};{INNER};{INNER};{OTHER} 100",
    ]


def test_table_counts_a_function_once_per_stack() -> None:
    lines = formats.table(PROFILE).splitlines()
    assert lines[0] == "relay-0: 10.0 s of wall time at 100 Hz, CPU 40.0% of one core, 2 idle threads left out"
    assert lines[2] == "MainThread: 1000 samples, CPU 35.0%"
    assert [line.split(None, 2) for line in lines[4:]] == [
        ["60.0%", "70.0%", INNER],
        ["30.0%", "100.0%", OUTER],
        ["10.0%", "10.0%", OTHER],
    ]


def test_table_is_cut() -> None:
    assert formats.table(PROFILE, rows=1).splitlines()[-1].strip() == "and 2 more functions"


def test_speedscope() -> None:
    value = json.loads(formats.write(PROFILE, Format.SPEEDSCOPE))
    frames = value["shared"]["frames"]
    assert frames[1] == {"name": "Exchange.start", "file": "c/d.py", "line": 20}
    (profile,) = value["profiles"]
    assert profile["type"] == "sampled"
    assert profile["weights"] == [6.0, 3.0, 1.0]
    assert profile["endValue"] == 10.0
    assert [[frames[index]["name"] for index in sample] for sample in profile["samples"]][1] == ["run"]


def test_a_thread_without_samples() -> None:
    idle = ThreadProfile(name="MainThread", cpu_s=0.0, samples=0, stacks=())
    empty = Profile(process="p", clock=Clock.CPU, seconds=1.0, hz=1.0, cpu_s=0.0, idle_threads=0, threads=(idle,))
    assert formats.collapsed(empty) == ""
    assert "0 samples" in formats.table(empty)
    assert formats.speedscope(empty)["profiles"][0]["samples"] == []
