"""The command line as a process: usage, completion, broken pipes, Ctrl-C, and ``top`` on a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import yaml
from unit.routerctl import samples
from unit.routerctl.fakes import Ctl, FakeControlPlane

from routerctl.main import build_parser
from twofold import __version__

DEADLINE_S = 30.0


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("get",),
        ("get", "nothing"),
        ("describe", "worker"),
        ("cordon",),
        ("drain",),
        ("policy",),
        ("policy", "set"),
        ("completion", "tcsh"),
        ("get", "workers", "-o", "xml"),
        ("get", "workers", "--timeout", "0"),
        ("get", "workers", "--timeout", "nan"),
        ("top", "--interval", "inf"),
        ("get", "workers", "--contr", "127.0.0.1:1"),
        ("drain", "w", "--timeout", "x"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_asks_nothing(ctl: Ctl, control_plane: FakeControlPlane, argv: tuple[str, ...]) -> None:
    ran = ctl(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert "usage: routerctl" in ran.err
    assert control_plane.requests == []


def test_common_options_hold_before_and_after_the_verb(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["GetPolicy"] = b""
    assert json.loads(ctl("-o", "json", "policy", "get").out)
    assert json.loads(ctl("policy", "get", "-o", "json").out)
    assert yaml.safe_load(ctl("-o", "json", "policy", "get", "-o", "yaml").out)
    assert not ctl("-o", "json", "policy", "get", "-o", "table").out.startswith("{")


def test_version(ctl: Ctl) -> None:
    assert ctl("version").out == f"routerctl {__version__}\n"
    assert json.loads(ctl("version", "-o", "json").out) == {"version": __version__}


def test_help_names_the_exit_codes(ctl: Ctl) -> None:
    ran = ctl("--help")
    assert ran.code == 0
    assert "3 control plane unreachable" in " ".join(ran.out.split())


def test_every_verb_has_help_and_a_summary() -> None:
    parsers = [build_parser()]
    seen = 0
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            choices = action.choices if isinstance(action.choices, dict) else {}
            parsers += choices.values()
            if not choices:
                seen += 1
                assert action.help or action.metavar or action.choices, (parser.prog, action.dest)
    assert seen > 100


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_names_the_verbs_and_is_a_valid_script(ctl: Ctl, shell: str) -> None:
    ran = ctl("completion", shell)
    assert ran.code == 0
    for word in ("describe", "uncordon", "--control-plane", "routers"):
        assert word in ran.out
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=ran.out, text=True, capture_output=True, timeout=DEADLINE_S)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_bash_completes_verbs(ctl: Ctl) -> None:
    ask = "\nCOMP_WORDS=(routerctl unc); COMP_CWORD=1; _shtab_routerctl; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    done = subprocess.run(
        ["bash"], input=ctl("completion", "bash").out + ask, text=True, capture_output=True, timeout=DEADLINE_S
    )
    assert done.stdout.split() == ["uncordon"]


@pytest.fixture
def environment(control_plane: FakeControlPlane) -> dict[str, str]:
    return {**os.environ, "TWOFOLD_CONTROL_PLANE": control_plane.address, "TERM": "xterm", "COLUMNS": "160"}


def test_as_a_module_in_another_encoding(control_plane: FakeControlPlane, environment: dict[str, str]) -> None:
    fleet = samples.fleet()
    fleet.targets[0].node = "m\u00fcnchen-\u4e16"
    control_plane.answers["GetFleet"] = fleet
    done = subprocess.run(
        [sys.executable, "-m", "routerctl", "get", "workers", "-o", "wide"],
        env=environment | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"m\\xfcnchen-\\u4e16" in done.stdout


@pytest.mark.parametrize("argv", [("get", "workers"), ("get", "workers", "-o", "json"), ("--help",)], ids=" ".join)
def test_a_reader_that_leaves_is_no_failure(
    control_plane: FakeControlPlane, environment: dict[str, str], argv: tuple[str, ...]
) -> None:
    fleet = samples.fleet()
    fleet.targets.extend(samples.target(f"x{i}") for i in range(5000))
    control_plane.answers["GetFleet"] = fleet
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "routerctl", *argv],
            env=environment,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_is_1_and_one_line(control_plane: FakeControlPlane, environment: dict[str, str]) -> None:
    control_plane.answers["GetFleet"] = samples.fleet()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "routerctl", "get", "workers"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"routerctl: error: cannot write the answer")
    assert len(done.stderr.splitlines()) == 1


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_ctrl_c_during_a_call_is_130(control_plane: FakeControlPlane, environment: dict[str, str]) -> None:
    def hang(request: object) -> bytes:
        control_plane.released.wait(DEADLINE_S)
        return b""

    control_plane.answers["GetFleet"] = hang
    child = subprocess.Popen(
        [sys.executable, "-m", "routerctl", "get", "workers", "--timeout", "60"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        until(lambda: bool(control_plane.requests))
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=DEADLINE_S)
    finally:
        child.kill()
        child.wait()
    assert (child.returncode, out, err) == (130, b"", b"")


class Screen:
    """What a child prints on a terminal."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.text = ""
        self.master, slave = pty.openpty()
        self.child = subprocess.Popen(argv, env=environment, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)

    def wait_for(self, *words: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not all(word in self.text for word in words):
            assert time.monotonic() < deadline_s, self.text[-2000:]
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")


@pytest.fixture
def live_top(control_plane: FakeControlPlane, environment: dict[str, str]) -> Iterator[Screen]:
    control_plane.answers["Top"] = samples.top()
    screen = Screen([sys.executable, "-m", "routerctl", "top", "--interval", "0.2"], environment)
    yield screen
    screen.child.kill()
    screen.child.wait()
    os.close(screen.master)


def test_top_is_live_on_a_terminal_until_ctrl_c(live_top: Screen, control_plane: FakeControlPlane) -> None:
    live_top.wait_for("router-0", "w1", control_plane.address)
    changed = samples.top()
    changed.routers[0].replica_id = "router-after-change"
    control_plane.answers["Top"] = changed
    live_top.wait_for("router-after-change")
    live_top.child.send_signal(signal.SIGINT)
    live_top.wait_for("\x1b[?1049l")
    assert live_top.child.wait(DEADLINE_S) == 130
    assert "Traceback" not in live_top.text


def test_top_outlasts_a_control_plane_that_goes_away(live_top: Screen, control_plane: FakeControlPlane) -> None:
    from unit.routerctl.fakes import UNAVAILABLE

    live_top.wait_for("router-0")
    control_plane.answers |= {"Top": UNAVAILABLE, "GetPolicy": UNAVAILABLE}
    live_top.wait_for("is unreachable")
    assert live_top.child.poll() is None
    back = samples.top()
    back.routers[0].replica_id = "router-is-back"
    control_plane.answers["Top"] = back
    live_top.wait_for("router-is-back")


def test_top_once_and_without_a_terminal(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Top"] = samples.top()
    for argv in (("top",), ("top", "--once")):
        ran = ctl(*argv)
        assert (ran.code, ran.err) == (0, "")
        lines = [line.split() for line in ran.out.splitlines()]
        assert ["router-0", "12", "3.5", "1,500", "250", "ms", "1.75", "s", "50.0%", "12.5%"] in lines
        assert [line[0] for line in lines if line and line[0].startswith("w")] == ["w1", "w0", "w2"]
        assert any(line[:8] == ["w1", "llama-8b", "healthy", "7", "0", "3,000", "1.50", "s"] for line in lines)


def test_top_as_json(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["Top"] = samples.top()
    found = json.loads(ctl("top", "-o", "json").out)
    assert set(found) == {"routers", "targets", "loads"}
    assert found["routers"][0]["top"]["requests_per_s"] == 3.5
    assert found["routers"][1]["top"] is None


@pytest.mark.parametrize("flags", [("-o", "json"), ("-o", "yaml"), ("--once",)], ids=" ".join)
def test_top_ends_by_itself_on_a_terminal_when_asked(
    control_plane: FakeControlPlane, environment: dict[str, str], flags: tuple[str, ...]
) -> None:
    control_plane.answers["Top"] = samples.top()
    screen = Screen([sys.executable, "-m", "routerctl", "top", *flags], environment)
    try:
        screen.wait_for("router-0", "w2")
        assert screen.child.wait(DEADLINE_S) == 0
        assert "\x1b[?1049h" not in screen.text
    finally:
        screen.child.kill()
        screen.child.wait()
        os.close(screen.master)


def test_an_answer_that_is_no_message_prints_no_traceback(
    control_plane: FakeControlPlane, environment: dict[str, str]
) -> None:
    control_plane.answers["GetFleet"] = b"\xff\xff\xffgarbage"
    done = subprocess.run(
        [sys.executable, "-m", "routerctl", "get", "workers"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("routerctl: error: ")
    assert len(done.stderr.splitlines()) == 1
