"""Launcher: settings, sockets, and the backoff of one child."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from router import children
from router.children import BACKOFF_FIRST_S, BACKOFF_MAX_S, HEALTHY_AFTER_S, Child
from router.launcher import LaunchError, LauncherSettings, bind, bind_relays, raise_file_limit
from twofold import settings


def test_bad_settings_are_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--relays", "0"], "relays must be 1..256"),
        (["--port", "70000"], "port must be 0..65535"),
        (["--replica-id", "a/b"], "replica id"),
        (["--grace-s", "-1"], "must not be negative"),
        (["--slots", "0"], "slots must be"),
        (["--relays", "two"], "--relays"),
    ):
        with pytest.raises(SystemExit) as stopped:
            settings.load(LauncherSettings, argv, prog="router", environ={})
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message in error
        assert len(error.splitlines()) == 1


def test_the_launcher_stays_small() -> None:
    """It must outlive everything else in a replica, so it may not drag the libraries of its children along."""
    script = (
        "import sys, router.launcher; "
        "print(sorted({'asyncio','grpc','google','numpy','aiohttp','yaml','uvloop','psutil'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_relays_share_one_port_and_nobody_else_gets_it() -> None:
    sockets = bind_relays("127.0.0.1", 0, 3)
    try:
        ports = {sock.getsockname()[1] for sock in sockets}
        assert len(ports) == 1
        with pytest.raises(LaunchError, match="address already in use"):
            bind_relays("127.0.0.1", ports.pop(), 1)
    finally:
        for sock in sockets:
            sock.close()


def test_addresses_that_cannot_be_are_explained() -> None:
    with pytest.raises(LaunchError, match="cannot resolve"):
        bind("no such host", 0, reuse_port=False)
    with pytest.raises(LaunchError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0, reuse_port=False)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6() -> None:
    try:
        sock = bind("::1", 0, reuse_port=True)
    except LaunchError:
        pytest.skip("no IPv6 loopback here")
    assert sock.family == socket.AF_INET6
    sock.close()


def ended(child: Child, now_s: float) -> int:
    deadline = time.monotonic() + 10
    while (code := child.reap(now_s)) is None:
        assert time.monotonic() < deadline, "the child did not end"
        time.sleep(0.005)
    return code


def test_backoff_doubles_to_its_bound_and_begins_anew_after_a_healthy_life() -> None:
    child = Child("x", [sys.executable, "-c", "raise SystemExit(3)"])
    now_s, delays = 100.0, []
    for _ in range(9):
        child.start(now_s)
        assert child.pid is not None
        assert ended(child, now_s) == 3
        assert not child.running
        delays.append(round(child.start_at_s - now_s, 3))
        now_s = child.start_at_s
    assert delays == [BACKOFF_FIRST_S * 2**n for n in range(7)] + [BACKOFF_MAX_S] * 2
    assert child.is_crash_looping
    child.start(now_s)
    assert ended(child, now_s + HEALTHY_AFTER_S) == 3
    assert child.start_at_s - (now_s + HEALTHY_AFTER_S) == pytest.approx(BACKOFF_FIRST_S)
    assert not child.is_crash_looping


def test_a_command_that_cannot_be_executed_is_tried_again_later() -> None:
    child = Child("x", ["/nonexistent/program"])
    child.start(5.0)
    assert not child.running
    assert child.start_at_s > 5.0
    assert child.reap(5.0) is None


def test_a_child_gets_its_signals_unblocked_and_only_its_descriptors() -> None:
    given, kept = socket.socketpair()
    script = "import os, signal, sys; os.fstat(int(sys.argv[1])); sys.exit(len(signal.pthread_sigmask(0, ())))"
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    try:
        child = Child("x", [sys.executable, "-c", script, str(given.fileno())], pass_fds=[given.fileno()])
        child.start(0.0)
        assert ended(child, 0.0) == 0
        other = Child("y", [sys.executable, "-c", script, str(kept.fileno())])
        other.start(0.0)
        assert ended(other, 0.0) == 1, "a descriptor leaked into a child"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        given.close()
        kept.close()


def test_children_may_open_all_the_files_that_the_user_may() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, before[0] // 2), before[1]))
    try:
        assert raise_file_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_child_in_the_queue_for_a_cpu_is_starved_and_one_that_sleeps_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    queued_s: float | None = 5.0
    monkeypatch.setattr(children, "cpu_queue_s", lambda pid: queued_s)
    child = Child("relay-0", [sys.executable, "-c", "import signal; signal.pause()"])
    assert not child.starved(0.0)  # it does not run
    child.start(0.0)
    try:
        assert child.starved(100.0)  # benefit of the doubt until there are two looks
        queued_s = 5.8
        assert child.starved(101.0)
        assert not child.starved(102.0)
        queued_s = 6.7
        assert child.starved(103.0)
        child.watch_no_more()
        assert child.starved(200.0)
        queued_s = None
        assert not child.starved(201.0)
    finally:
        child.send(signal.SIGKILL)
        while child.reap(300.0) is None:
            time.sleep(0.01)


def test_time_in_the_queue_for_a_cpu_is_read_of_live_processes_only() -> None:
    assert (children.cpu_queue_s(os.getpid()) or 0.0) >= 0.0
    assert children.cpu_queue_s(2**22 + 1) is None
