"""The connection: refusals are 1, silence is 3, each one line; the token and TLS go where they should."""

import concurrent.futures
import datetime
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from unit.routerctl import samples
from unit.routerctl.fakes import Ctl, FakeControlPlane, Status

from twofold.v1 import admin_pb2

COMMANDS = [
    ("get", "workers"),
    ("get", "models"),
    ("get", "pools"),
    ("get", "routers"),
    ("describe", "worker", "w0"),
    ("explain", "--request-id", "a"),
    ("explain", "--model", "m", "--prompt", "p"),
    ("cordon", "w0"),
    ("uncordon", "w0"),
    ("drain", "w0"),
    ("drain", "w0", "--wait"),
    ("policy", "get"),
    ("policy", "set", "alpha=0.1"),
    ("top",),
    ("top", "--once"),
]
METHODS = [method.name for method in admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods]


def one_line(text: str) -> str:
    assert text.startswith("routerctl: ")
    assert len(text.splitlines()) == 1
    assert "Traceback" not in text
    return text


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as held:  # bound and not listening: refuses, and nobody else gets it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_nobody_there_is_3(ctl: Ctl, closed_port: int, command: tuple[str, ...]) -> None:
    ran = ctl(*command, "--control-plane", f"127.0.0.1:{closed_port}")
    assert (ran.code, ran.out) == (3, "")
    assert f"control plane 127.0.0.1:{closed_port} is unreachable" in one_line(ran.err)


def test_a_name_that_does_not_resolve_is_3(ctl: Ctl) -> None:
    ran = ctl("get", "workers", "--control-plane", "nosuch.invalid:7700")
    assert ran.code == 3
    one_line(ran.err)


def test_a_socket_that_accepts_and_says_nothing_is_3(ctl: Ctl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        ran = ctl("policy", "get", "--control-plane", f"127.0.0.1:{port}", "--timeout", "0.3")
    assert (ran.code, ran.out) == (3, "")
    one_line(ran.err)


def test_a_control_plane_that_hangs_is_3(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    def hang(request: object) -> bytes:
        control_plane.released.wait(30)
        return b""

    control_plane.answers["GetFleet"] = hang
    ran = ctl("get", "workers", "--timeout", "0.3")
    assert (ran.code, ran.out) == (3, "")
    assert one_line(ran.err).endswith("did not answer within 0.3 s\n")


def test_a_standby_that_refuses_everything_as_unavailable_is_3(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    control_plane.answers |= {method: Status(grpc.StatusCode.UNAVAILABLE, "not the leader") for method in METHODS}
    ran = ctl("top")
    assert ran.code == 3
    assert "not the leader" in one_line(ran.err)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_bytes_that_are_no_message_are_1(ctl: Ctl, control_plane: FakeControlPlane, command: tuple[str, ...]) -> None:
    control_plane.answers |= dict.fromkeys(METHODS, b"\xff\xff\xffgarbage")
    ran = ctl(*command)
    assert (ran.code, ran.out) == (1, "")
    assert all(line.startswith("routerctl: ") for line in ran.err.splitlines())
    assert ran.err


@pytest.mark.parametrize("output", ["table", "wide", "json", "yaml"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_empty_messages_are_no_failure(
    ctl: Ctl, control_plane: FakeControlPlane, command: tuple[str, ...], output: str
) -> None:
    control_plane.answers |= dict.fromkeys(METHODS, b"")
    control_plane.answers["Drain"] = admin_pb2.DrainResponse(safe_to_delete=True)
    ran = ctl(*command, "-o", output)
    if command[0] == "explain":
        assert (ran.code, ran.err) == (1, "routerctl: error: no router gave a decision\n")
    else:
        assert (ran.code, ran.err) == (0, "")
        assert ran.out


def test_a_server_that_speaks_http_1_is_3(ctl: Ctl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as threads:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

        served = threads.submit(answer)
        ran = ctl("policy", "get", "--control-plane", f"127.0.0.1:{server.getsockname()[1]}", "--timeout", "2")
        served.result(5)
    assert ran.code == 3
    one_line(ran.err)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status(grpc.StatusCode.UNAUTHENTICATED, "token needed"), "token needed (give a token with --token-file"),
        (Status(grpc.StatusCode.PERMISSION_DENIED, "read only"), "read only"),
        (Status(grpc.StatusCode.FAILED_PRECONDITION, "not now"), "not now"),
        (Status(grpc.StatusCode.UNKNOWN, "Exception calling application: boom"), "failed: Exception calling"),
        (Status(grpc.StatusCode.RESOURCE_EXHAUSTED), "RESOURCE_EXHAUSTED"),
        (Status(grpc.StatusCode.INTERNAL, "two\nlines \x1b[31mred"), "two lines \\x1b[31mred"),
    ],
)
def test_refusals_are_1_and_one_line(ctl: Ctl, control_plane: FakeControlPlane, status: Status, expected: str) -> None:
    control_plane.answers["GetFleet"] = status
    ran = ctl("get", "workers")
    assert (ran.code, ran.out) == (1, "")
    assert expected in one_line(ran.err)
    assert "\x1b" not in ran.err


def test_a_control_plane_without_the_method_is_1(ctl: Ctl) -> None:
    ran = ctl("top")
    assert ran.code == 1
    assert "does not know this command" in one_line(ran.err)


def test_an_answer_beyond_the_default_grpc_limit_is_read(ctl: Ctl, control_plane: FakeControlPlane) -> None:
    snapshot = samples.fleet()
    snapshot.targets.extend(samples.target(f"x{i}", node="n" * 2000) for i in range(3000))
    assert snapshot.ByteSize() > 4 << 20
    control_plane.answers["GetFleet"] = snapshot
    assert len(ctl("get", "workers").out.splitlines()) == 3005


@pytest.fixture
def sent_token(ctl: Ctl, control_plane: FakeControlPlane) -> Iterator[object]:
    control_plane.answers["GetPolicy"] = b""

    def ask(*argv: str) -> str | None:
        assert ctl("policy", "get", *argv).code == 0
        return control_plane.metadata[-1].get("authorization")

    return ask


def test_the_token_comes_from_flag_then_environment(
    sent_token: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(sent_token)
    for name in ("flag", "env"):
        (tmp_path / name).write_text(f"  token-of-{name}\n")
    assert sent_token() is None
    monkeypatch.setenv("TWOFOLD_TOKEN_FILE", str(tmp_path / "env"))
    assert sent_token() == "Bearer token-of-env"
    monkeypatch.setenv("TWOFOLD_TOKEN", "direct")
    assert sent_token() == "Bearer direct"
    assert sent_token("--token-file", str(tmp_path / "flag")) == "Bearer token-of-flag"


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"\xff\xfe", b"x" * 5000, None])
def test_a_bad_token_file_is_2_and_shows_no_token(
    ctl: Ctl, control_plane: FakeControlPlane, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    ran = ctl("policy", "get", "--token-file", str(file))
    assert (ran.code, ran.out) == (2, "")
    assert str(file) in one_line(ran.err)
    assert "two words" not in ran.err
    assert control_plane.requests == []


@pytest.mark.parametrize("address", ["10.1.2.3:7700", "control-plane.example:7700", "[2001:db8::1]:7700"])
def test_the_token_is_not_sent_in_clear_to_another_machine(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("TWOFOLD_TOKEN", "abc123")
    ran = ctl("policy", "get", "--control-plane", address)
    assert (ran.code, ran.out) == (2, "")
    assert "refusing to send the token in clear" in one_line(ran.err)
    assert "abc123" not in ran.err


def certificate(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and control-plane.test, and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("control-plane.test")]
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
    cert_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_file.write_bytes(pem)
    return cert_file, key_file


def test_mutual_tls(ctl: Ctl, control_plane: FakeControlPlane, tmp_path: Path) -> None:
    server_cert, server_key = certificate(tmp_path, "server")
    client_cert, client_key = certificate(tmp_path, "client")
    stranger_cert, _ = certificate(tmp_path, "stranger")
    control_plane.answers["GetPolicy"] = b""
    credentials = grpc.ssl_server_credentials(
        [(server_key.read_bytes(), server_cert.read_bytes())],
        root_certificates=client_cert.read_bytes(),
        require_client_auth=True,
    )
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), handlers=(control_plane,))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        command = ("policy", "get", "--control-plane", f"127.0.0.1:{port}", "--timeout", "5")
        ours = ("--tls-cert", str(client_cert), "--tls-key", str(client_key))
        assert ctl(*command, "--tls-ca", str(server_cert), *ours).code == 0
        named = ("--tls-server-name", "control-plane.test")
        assert ctl(*command, "--tls-ca", str(server_cert), *ours, *named).code == 0
        answered = len(control_plane.requests)
        for wrong in (
            ("--tls-ca", str(stranger_cert), *ours),
            ("--tls-ca", str(server_cert), *ours, "--tls-server-name", "elsewhere.test"),
            ("--tls-ca", str(server_cert)),
            (),
        ):
            ran = ctl(*command, *wrong)
            assert (ran.code, ran.out) == (3, "")
            one_line(ran.err)
        assert len(control_plane.requests) == answered
    finally:
        server.stop(None).wait(5)


@pytest.mark.parametrize(
    "flags",
    [
        ("--tls-cert", "a.pem"),
        ("--tls-key", "a.pem"),
        ("--tls-ca", "/nonexistent/ca.pem"),
        ("--control-plane", "nonsense"),
        ("--control-plane", "host:0"),
        ("--control-plane", "host:65536"),
        ("--control-plane", "http://host:1"),
    ],
)
def test_bad_connection_options_are_2(ctl: Ctl, flags: tuple[str, ...]) -> None:
    ran = ctl("policy", "get", *flags)
    assert (ran.code, ran.out) == (2, "")
    one_line(ran.err)
