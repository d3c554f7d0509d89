"""The launcher of one router replica: holds the listening sockets and the shared memory, keeps agent and relays alive.

It does nothing else and imports little, so that there is little in it that can fail. Relays and agent are siblings: the
end of one touches no other. Each relay has a listening socket of its own on the same port (SO_REUSEPORT); because the
launcher keeps it open, connections that arrive while a relay is started again wait in its accept queue.
"""

import errno
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from router.children import EXIT_USAGE, Child
from router.shm.files import ReplicaInUseError, SharedMemoryError, check_replica_id, shared_directory
from router.shm.heartbeat import ProcessState
from router.shm.layout import DEFAULT_SLOTS, clear_accounts, region_sizes
from router.shm.replica import AGENT, MAX_RELAYS, SharedReplica
from twofold import log as logs
from twofold import settings as settings_loader

log = logging.getLogger(__name__)

BACKLOG = 4096
TICK_S = 1.0
STARVED_PATIENCE = 10
"""Hang timeouts that a child may be silent which only waits for a CPU: killing it would not bring it one."""
KILL_AFTER_GRACE_S = 2.5
AGENT_GRACE_S = 3.0
EXIT_FAILED = 1

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})
_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def _help(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set on a replica; settings of its relays are in the file ``relay_config``."""

    replica_id: Annotated[str, _help("stable name of the replica, [A-Za-z0-9._-]{1,128}")] = "router-0"
    host: Annotated[str, _help("address to serve clients on")] = "127.0.0.1"
    port: Annotated[int, _help("port to serve clients on; 0 takes a free one and prints it")] = 8000
    relays: Annotated[int, _help("relay processes")] = 1
    control_plane: Annotated[tuple[str, ...], _help("host:port of the control plane; repeat for standbys")] = ()
    admin_host: Annotated[str, _help("address of the admin port")] = "127.0.0.1"
    admin_port: Annotated[int, _help("port for metrics, readiness and explain; 0 takes a free one")] = 8100
    serving_url: Annotated[str, _help("URL that clients use, as told to the control plane; default: host and port")] = (
        ""
    )
    run_dir: Annotated[str, _help("directory for state that outlives the replica")] = ".run/router"
    shm_dir: Annotated[str, _help("memory-backed directory; without room there, run_dir is used")] = "/dev/shm"
    token_file: Annotated[str, _help("file with the shared token (or TWOFOLD_TOKEN)")] = ""
    tls_ca_file: Annotated[str, _help("certificates to check the control plane by; switches TLS on")] = ""
    tls_cert_file: Annotated[str, _help("client certificate for mutual TLS")] = ""
    tls_key_file: Annotated[str, _help("key of the client certificate")] = ""
    relay_config: Annotated[str, _help("YAML file with relay settings")] = ""
    slots: Annotated[int, _help("most targets the replica can hold")] = DEFAULT_SLOTS
    grace_s: Annotated[float, _help("running streams may go on this long after SIGTERM")] = 30.0
    hang_timeout_s: Annotated[float, _help("a child that does not beat for this long is killed; 0 never")] = 30.0
    debug_profile: Annotated[bool, _help("answer GET /debug/profile on the admin port")] = False
    log_file: Annotated[str, _help("append JSON lines here instead of standard error")] = ""
    log_level: Annotated[str, _help("debug, info, warning or error")] = "info"

    def __post_init__(self) -> None:
        for name, low, high in (("relays", 1, MAX_RELAYS), ("port", 0, 65535), ("admin_port", 0, 65535)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low}..{high}")
        if not 1 <= self.slots <= 1 << 16:
            raise ValueError("slots must be 1..65536")
        if self.grace_s < 0 or self.hang_timeout_s < 0:
            raise ValueError("grace_s and hang_timeout_s must not be negative")
        try:
            check_replica_id(self.replica_id)
        except SharedMemoryError as error:
            raise ValueError(str(error)) from None


class LaunchError(Exception):
    """The replica cannot be set up; the message says why."""


def bind(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """A listening TCP socket. Raises LaunchError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise LaunchError(f"cannot resolve {host!r}: {error.strerror}") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host in ("::", "") else 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        reason = "address already in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise LaunchError(f"cannot listen on {_authority(host, port)}: {reason}") from None
    return sock


def bind_relays(host: str, port: int, relays: int) -> list[socket.socket]:
    """One listening socket per relay on one port. Raises LaunchError.

    SO_REUSEPORT would also let a second replica of this user share the port unnoticed, so the port is tried without it
    first.
    """
    probe = bind(host, port, reuse_port=False)
    port = probe.getsockname()[1]
    probe.close()
    sockets: list[socket.socket] = []
    try:
        sockets.extend(bind(host, port, reuse_port=True) for _ in range(relays))
    except LaunchError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class Launcher:
    """Runs one replica until a stop signal. All work happens on the main thread, between two waits for a signal."""

    def __init__(self, settings: LauncherSettings) -> None:
        self._settings = settings
        self._sockets: list[socket.socket | None] = []
        self._admin: socket.socket | None = None
        self._replica: SharedReplica | None = None
        self._relays: list[Child] = []
        self._agent: Child | None = None
        self._exit_code = 0

    def run(self) -> int:
        """Set up, supervise, tear down.

        Returns the exit code: 0 after a stop signal, 1 when it cannot be set up, 2 when a child refuses its settings.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._set_up()
        except (LaunchError, SharedMemoryError, OSError) as error:
            sys.stderr.write(f"router: error: {error}\n")
            self._tear_down()
            return EXIT_FAILED
        try:
            self._supervise()
            self._stop()
        finally:
            self._kill_all()
            self._tear_down()
        return self._exit_code

    def _set_up(self) -> None:
        settings = self._settings
        state_dir = Path(settings.run_dir) / "routers" / settings.replica_id
        state_dir.mkdir(parents=True, exist_ok=True)
        self._replica = self._create_replica(state_dir)
        self._sockets = list(bind_relays(settings.host, settings.port, settings.relays))
        self._admin = bind(settings.admin_host, settings.admin_port, reuse_port=False)
        port, admin_port = self._port(), self._admin.getsockname()[1]
        serving_url = settings.serving_url or f"http://{_authority(settings.host, port)}"
        self._agent = Child("agent", self._agent_argv(state_dir, serving_url), pass_fds=[self._admin.fileno()])
        self._relays = [self._relay(index) for index in range(settings.relays)]
        extra = {"url": serving_url, "admin": _authority(settings.admin_host, admin_port), "relays": settings.relays}
        log.info("replica set up", extra={**extra, "shared": str(self._replica.directory)})
        sys.stdout.write(
            f"router {settings.replica_id}: listening on http://{_authority(settings.host, port)}, "
            f"admin on http://{_authority(settings.admin_host, admin_port)}\n"
        )
        sys.stdout.flush()

    def _create_replica(self, state_dir: Path) -> SharedReplica:
        settings = self._settings
        sizes = region_sizes(settings.slots)
        directory = shared_directory(settings.run_dir, settings.replica_id, settings.shm_dir)
        try:
            return SharedReplica.create(directory, relays=settings.relays, sizes=sizes)
        except ReplicaInUseError:
            raise LaunchError(f"replica {settings.replica_id} already runs in {settings.run_dir}") from None
        except SharedMemoryError as error:
            log.warning("no memory-backed directory, using the run directory", extra={"reason": str(error)})
            return SharedReplica.create(state_dir / "shm", relays=settings.relays, sizes=sizes)

    def _port(self) -> int:
        port: int = next(sock for sock in self._sockets if sock is not None).getsockname()[1]
        return port

    def _agent_argv(self, state_dir: Path, serving_url: str) -> list[str]:
        settings, replica, admin = self._settings, self._replica, self._admin
        assert replica is not None
        assert admin is not None
        argv = [
            *(sys.executable, "-m", "router.agent"),
            *("--replica-id", settings.replica_id),
            *("--replica-dir", str(replica.directory)),
            *("--state-dir", str(state_dir)),
            *("--serving-url", serving_url),
            *("--admin-fd", str(admin.fileno())),
            *("--log-level", settings.log_level),
        ]
        if settings.debug_profile:
            argv.append("--debug-profile")
        for address in settings.control_plane:
            argv += ["--control-plane", address]
        for name in ("token_file", "tls_ca_file", "tls_cert_file", "tls_key_file", "log_file"):
            value = getattr(settings, name)
            if value:
                argv += ["--" + name.replace("_", "-"), value]
        return argv

    def _relay(self, index: int) -> Child:
        settings, replica, sock = self._settings, self._replica, self._sockets[index]
        assert replica is not None
        assert sock is not None
        argv = [
            *(sys.executable, "-m", "router.relay"),
            *("--replica-dir", str(replica.directory)),
            *("--replica-id", settings.replica_id),
            *("--index", str(index)),
            *("--listen-fd", str(sock.fileno())),
            *("--grace-s", str(settings.grace_s)),
            *("--log-level", settings.log_level),
        ]
        if settings.log_file:
            argv += ["--log-file", settings.log_file]
        if settings.relay_config:
            argv += ["--config", settings.relay_config]
        return Child(f"relay-{index}", argv, pass_fds=[sock.fileno()])

    def _children(self) -> list[Child]:
        return [*self._relays, *([self._agent] if self._agent is not None else [])]

    def _supervise(self) -> None:
        """Start what is due and look after what runs, until a stop signal or a child that refuses its settings."""
        while True:
            now_s = time.monotonic()
            for child in self._children():
                code = child.reap(now_s)
                if code is not None and not self._on_exit(child, code):
                    return
            for child in self._children():
                if not child.running and child.start_at_s <= now_s:
                    self._start(child, now_s)
            self._kill_hung(now_s)
            received = signal.sigtimedwait(_SIGNALS, self._next_wait_s(now_s))
            if received is not None and received.si_signo in _STOP_SIGNALS:
                log.info("stopping", extra={"signal": signal.Signals(received.si_signo).name})
                return

    def _next_wait_s(self, now_s: float) -> float:
        due = [child.start_at_s - now_s for child in self._children() if not child.running]
        return max(0.0, min([TICK_S, *due]))

    def _on_exit(self, child: Child, code: int) -> bool:
        """Note the end of a child; False when starting it again is of no use."""
        extra = {"child": child.name, "exit": _exit_text(code), "starts": child.starts}
        if code == EXIT_USAGE and child.starts == 1:
            log.error("child refuses its settings", extra=extra)
            self._exit_code = EXIT_USAGE
            return False
        level = logging.ERROR if child.is_crash_looping else logging.WARNING
        restart_in_s = round(max(0.0, child.start_at_s - time.monotonic()), 2)
        log.log(level, "child ended, starting it again", extra={**extra, "restart_in_s": restart_in_s})
        self._forget(child)
        return True

    def _forget(self, child: Child) -> None:
        """Take a dead child's work off the accounts, and its share of connections to its siblings if it keeps dying."""
        replica = self._replica
        assert replica is not None
        now_s = time.monotonic()
        writer = self._writer(child)
        heartbeat = replica.heartbeat(writer)
        heartbeat.beat(now_s, ProcessState.STOPPED, heartbeat.read().snapshot_version, 0)
        if writer == AGENT:
            return
        clear_accounts(replica, writer, now_s)
        sock = self._sockets[writer]
        if child.is_crash_looping and sock is not None and any(relay.running for relay in self._relays):
            sock.close()
            self._sockets[writer] = None

    def _start(self, child: Child, now_s: float) -> None:
        if child is not self._agent:
            index = self._relays.index(child)
            if self._sockets[index] is None:
                try:
                    sock = self._sockets[index] = bind(self._settings.host, self._port(), reuse_port=True)
                except LaunchError as error:
                    log.error("cannot listen again", extra={"child": child.name, "reason": str(error)})
                    child.start_at_s = now_s + TICK_S
                    return
                fresh = self._relay(index)
                child.argv, child.pass_fds = fresh.argv, (sock.fileno(),)
        child.start(now_s)

    def _kill_hung(self, now_s: float) -> None:
        timeout_s = self._settings.hang_timeout_s
        replica = self._replica
        if not timeout_s or replica is None:
            return
        for child in self._children():
            beat = replica.heartbeat(self._writer(child)).read()
            silent_s = now_s - beat.beat_s
            if not child.running or beat.pid != child.pid or silent_s <= timeout_s:
                child.watch_no_more()
            elif silent_s > timeout_s * STARVED_PATIENCE or not child.starved(now_s):
                log.error("child hangs, killing it", extra={"child": child.name, "child_pid": child.pid})
                child.send(signal.SIGKILL)

    def _writer(self, child: Child) -> int:
        return AGENT if child is self._agent else self._relays.index(child)

    def _stop(self) -> None:
        """Relays drain within the grace period, then the agent ends. A second stop signal ends the patience."""
        self._close_sockets()
        for child in self._relays:
            child.send(signal.SIGTERM)
        self._wait(self._relays, self._settings.grace_s + KILL_AFTER_GRACE_S)
        if self._agent is not None:
            self._agent.send(signal.SIGTERM)
            self._wait([self._agent], AGENT_GRACE_S)

    def _wait(self, children: Sequence[Child], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            now_s = time.monotonic()
            for child in children:
                child.reap(now_s)
            alive = [child for child in children if child.running]
            if not alive:
                return
            received = signal.sigtimedwait(_SIGNALS, max(0.0, min(TICK_S, deadline_s - now_s)))
            impatient = received is not None and received.si_signo in _STOP_SIGNALS
            if impatient or time.monotonic() >= deadline_s:
                for child in alive:
                    log.warning("child did not stop in time, killing it", extra={"child": child.name})
                    child.send(signal.SIGKILL)
                deadline_s = time.monotonic() + TICK_S

    def _kill_all(self) -> None:
        for child in self._children():
            child.send(signal.SIGKILL)
        while any(child.running for child in self._children()):
            for child in self._children():
                child.reap(time.monotonic())
            signal.sigtimedwait(_SIGNALS, 0.05)

    def _close_sockets(self) -> None:
        for sock in (*self._sockets, self._admin):
            if sock is not None:
                sock.close()
        self._sockets, self._admin = [], None

    def _tear_down(self) -> None:
        self._close_sockets()
        if self._replica is not None:
            self._replica.remove()


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def raise_file_limit() -> int:
    """Let the children open as many files as this user may: each stream takes two. Returns that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of open files stays as it is", extra={"reason": str(error)})
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m router``."""
    settings = settings_loader.load(
        LauncherSettings,
        sys.argv[1:] if argv is None else argv,
        prog="router",
        description="Run one router replica: agent and relays behind one port.",
    )
    try:
        logs.configure(settings.replica_id, level=settings.log_level, file=settings.log_file or None)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"router: error: {error}\n")
        return EXIT_USAGE
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise_file_limit()
    return Launcher(settings).run()
