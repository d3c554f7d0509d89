"""``python -m controlplane``: the control plane of one fleet."""

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from controlplane.app import ControlPlane
from controlplane.discovery.fleet_file import FleetFile, FleetFileError, load_fleet_file, split_listen
from controlplane.metrics import MetricsPort
from controlplane.rpc.auth import listening_fault
from controlplane.server import ListenError, Server, TlsFiles
from controlplane.settings import Settings
from controlplane.store import FileStore, MemoryStore, Store
from twofold import log as logs
from twofold import settings

log = logging.getLogger(__name__)

MAX_TOKEN_BYTES = 4096


class StartError(Exception):
    """The control plane cannot start like this; the message is one line."""


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM or SIGINT. 0 after a graceful stop, 1 when it could not start, 2 for bad settings."""
    options = settings.load(Settings, argv, prog="controlplane", description="Control plane of a Twofold fleet.")
    try:
        logs.configure("controlplane", level=options.log_level, file=options.log_file or None)
        file = load_fleet_file(options.fleet)
        token = read_token(options.token_file, os.environ.get("TWOFOLD_TOKEN", ""))
        address = _address(options.listen or file.control_plane.listen, "listen")
        metrics = _address(options.metrics_listen or file.control_plane.metrics, "metrics-listen")
        tls = _tls(options)
        fault = listening_fault(
            address[0],
            token=token,
            tls=tls is not None,
            mutual=bool(options.tls_client_ca),
            insecure_plaintext=options.insecure_plaintext,
        )
        if fault:
            raise StartError(fault)
    except (StartError, FleetFileError, ValueError, OSError) as error:
        sys.stderr.write(f"controlplane: error: {error}\n")
        return 2
    try:
        run_dir = Path(options.run_dir or f".run/{file.name}").absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        with _locked(run_dir):
            return asyncio.run(
                _serve(options, file, Path(options.fleet).absolute(), run_dir, token, address, metrics, tls)
            )
    except (ListenError, OSError) as error:
        log.error("cannot start", extra={"reason": str(error)})
        sys.stderr.write(f"controlplane: error: {error}\n")
        return 1


async def _serve(
    options: Settings,
    file: FleetFile,
    fleet_path: Path,
    run_dir: Path,
    token: str,
    address: tuple[str, int],
    metrics_address: tuple[str, int],
    tls: TlsFiles | None,
) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    store: Store = MemoryStore() if options.memory_store else FileStore(run_dir / "controlplane.json")
    control_plane = ControlPlane(file, fleet_path, run_dir, store)
    server = Server(control_plane, token=token, tls=tls)
    port = MetricsPort(control_plane, debug_profile=options.debug_profile, token=token)
    # Sockets first: a second control plane on the same address must fail before it touches any engine.
    try:
        await server.start(*address)
        await port.start(*metrics_address)
    except BaseException:
        await server.stop()
        await port.stop()
        raise
    try:
        await control_plane.start()
        _calm_collector()
        loop.add_signal_handler(signal.SIGHUP, control_plane.watch.reload)
        await stop.wait()
        log.info("stopping")
    finally:
        await server.stop()
        await control_plane.stop()
        await port.stop()
    log.info("stopped")
    return 0


def _calm_collector() -> None:
    """Few cycles come to be here, and many values live long: collect rarely, and not what stands since the start."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory: two control planes must not manage the same engines. Raises ListenError."""
    descriptor = os.open(run_dir / "controlplane.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ListenError(f"another control plane runs in {run_dir}") from None
        yield
    finally:
        os.close(descriptor)


def read_token(path: str, environment: str) -> str:
    """The shared token from a file, else from the environment; "" for none. Raises StartError."""
    if not path:
        return environment.strip()
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise StartError(f"cannot read the token file {path}: {error.strerror}") from None
    try:
        token = raw[: MAX_TOKEN_BYTES + 1].decode("ascii").strip()
    except UnicodeDecodeError:
        raise StartError(f"the token in {path} is not ASCII") from None
    if not token or len(token) > MAX_TOKEN_BYTES or not token.isprintable():
        raise StartError(f"the token file {path} holds no usable token")
    return token


def _address(text: str, flag: str) -> tuple[str, int]:
    address = split_listen(text)
    if address is None:
        raise StartError(f"--{flag} {text!r} is not host:port")
    return address


def _tls(options: Settings) -> TlsFiles | None:
    if bool(options.tls_cert) != bool(options.tls_key):
        raise StartError("--tls-cert and --tls-key belong together")
    if options.tls_client_ca and not options.tls_cert:
        raise StartError("--tls-client-ca needs --tls-cert and --tls-key")
    if not options.tls_cert:
        return None
    return TlsFiles(cert=options.tls_cert, key=options.tls_key, client_ca=options.tls_client_ca)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
