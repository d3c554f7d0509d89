"""A control plane that answers what a test tells it to, and a way to run routerctl against it."""

import concurrent.futures
from collections.abc import Iterator

import grpc
import pytest
from unit.routerctl.fakes import Ctl, FakeControlPlane, Ran

from routerctl.main import main


@pytest.fixture
def control_plane() -> Iterator[FakeControlPlane]:
    fake = FakeControlPlane()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), handlers=(fake,))
    fake.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield fake
    fake.released.set()
    server.stop(None).wait(5)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONTROL_PLANE", "TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME"):
        monkeypatch.delenv(f"TWOFOLD_{name}", raising=False)


@pytest.fixture
def ctl(control_plane: FakeControlPlane, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ctl:
    """Runs one command line in this process against the fake control plane."""
    monkeypatch.setenv("TWOFOLD_CONTROL_PLANE", control_plane.address)

    def run(*argv: str) -> Ran:
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Ran(int(code), captured.out, captured.err)

    return run
