"""routerctl profile: whom it asks, what it sends, how it ends."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from unit.routerctl.fakes import UNAVAILABLE, Ctl, FakeControlPlane

from twofold.v1 import admin_pb2, router_pb2


class AdminPort:
    """Answers every request with ``status`` and ``body``; remembers the last one."""

    def __init__(self) -> None:
        self.status, self.body = 200, b"a profile\n"
        self.path = self.token = ""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.path, owner.token = self.path, self.headers.get("authorization", "")
                self.send_response(owner.status)
                self.send_header("content-length", str(len(owner.body)))
                self.end_headers()
                self.wfile.write(owner.body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}


@pytest.fixture
def port() -> Iterator[AdminPort]:
    made = AdminPort()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def routers(port: AdminPort) -> admin_pb2.ListRoutersResponse:
    hello = router_pb2.RouterHello(replica_id="router-0", admin_address=port.address)
    return admin_pb2.ListRoutersResponse(routers=[admin_pb2.RouterInfo(hello=hello, connected=True)])


def test_asks_the_admin_port_that_the_control_plane_names(
    ctl: Ctl, control_plane: FakeControlPlane, port: AdminPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOFOLD_TOKEN", "secret")
    control_plane.answers["ListRouters"] = routers(port)
    ran = ctl("profile", "router-0/relay-1", "--seconds", "0.5", "--clock", "cpu", "--format", "collapsed")
    assert (ran.code, ran.out) == (0, "a profile\n")
    assert port.path.startswith("/debug/profile?")
    assert port.query == {"process": "relay-1", "seconds": "0.5", "hz": "200", "clock": "cpu", "format": "collapsed"}
    assert port.token == "Bearer secret"


def test_control_plane_by_url_and_to_a_file(ctl: Ctl, port: AdminPort, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    ran = ctl("profile", "controlplane", "--url", f"http://{port.address}/", "--write", str(file))
    assert (ran.code, ran.out) == (0, "")
    assert file.read_bytes() == port.body
    assert port.query["process"] == "controlplane"
    assert port.token == ""


def test_unknown_replica(ctl: Ctl, control_plane: FakeControlPlane, port: AdminPort) -> None:
    control_plane.answers["ListRouters"] = routers(port)
    ran = ctl("profile", "router-9/agent")
    assert ran.code == 1
    assert "there are: router-0" in ran.err


def test_refusal_is_told(ctl: Ctl, port: AdminPort) -> None:
    port.status, port.body = 403, b'{"error": {"message": "profiling is switched off"}}'
    ran = ctl("profile", "controlplane", "--url", f"http://{port.address}")
    assert ran.code == 1
    assert "403: profiling is switched off" in ran.err
    port.status, port.body = 500, b"<html>"
    assert "<html>" in ctl("profile", "controlplane", "--url", f"http://{port.address}").err


def test_unreachable(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers["ListRouters"] = UNAVAILABLE
    control_plane.answers["GetPolicy"] = UNAVAILABLE
    assert ctl("profile", "router-0/agent", "--timeout", "0.2").code == 3
    assert ctl("profile", "controlplane", "--url", "http://127.0.0.1:1").code == 3


@pytest.mark.parametrize(
    "argv",
    [
        ("relay-0",),
        ("router-0/",),
        ("controlplane", "--seconds", "61"),
        ("controlplane", "--hz", "0"),
        ("controlplane", "--url", "ftp://x"),
        ("controlplane", "--url", "http://x:y"),
        ("controlplane", "--format", "svg"),
    ],
)
def test_wrong_usage(ctl: Ctl, argv: tuple[str, ...]) -> None:
    assert ctl("profile", *argv).code == 2
