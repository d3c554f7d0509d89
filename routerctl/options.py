"""Options that every command takes, from flags and ``TWOFOLD_*`` environment variables."""

import argparse
import enum
import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import shtab

from routerctl.errors import UsageError

DEFAULT_CONTROL_PLANE = "127.0.0.1:7700"
DEFAULT_TIMEOUT_S = 5.0
TIMEOUT_MAX_S = 86_400.0
MAX_TOKEN_BYTES = 4096

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")


class Output(enum.StrEnum):
    """Form of the answer."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    WIDE = "wide"
    """The table with more columns."""


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of a TLS connection; "" where the default is used (system roots, no client certificate)."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options common to all commands. ``token`` is "" for none; ``tls`` is None for a plaintext connection."""

    control_plane: str = DEFAULT_CONTROL_PLANE
    token: str = ""
    timeout_s: float = DEFAULT_TIMEOUT_S
    output: Output = Output.TABLE
    tls: TlsFiles | None = None


def seconds(low: float, high: float) -> Callable[[str], float]:
    """Argument type: seconds within ``low``..``high``."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected seconds in {low:g}..{high:g}, got {text!r}")
        return value

    return convert


def common_parser(*, timeout: bool = True) -> argparse.ArgumentParser:
    """Parent parser with the common options, valid before and after the verb.

    Absent options leave no attribute, so that a verb's parser does not undo what stood before the verb. Without
    ``timeout`` for a verb that has a ``--timeout`` of its own.
    """
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--control-plane",
        metavar="HOST:PORT",
        help=f"gRPC address of the control plane (TWOFOLD_CONTROL_PLANE; default: {DEFAULT_CONTROL_PLANE})",
    )
    _file(
        group, "--token-file", "file with the shared token (TWOFOLD_TOKEN_FILE, or the token itself in TWOFOLD_TOKEN)"
    )
    if timeout:
        group.add_argument(
            "--timeout",
            dest="timeout_s",
            type=seconds(0.1, TIMEOUT_MAX_S),
            metavar="SECONDS",
            help=f"longest wait for an answer (default: {DEFAULT_TIMEOUT_S:g})",
        )
    group.add_argument(
        "-o",
        "--output",
        choices=[output.value for output in Output],
        help="form of the answer (default: table)",
    )
    group.add_argument("--tls", action="store_true", help="use TLS, with the system's roots unless --tls-ca is given")
    _file(group, "--tls-ca", "PEM file of the authority that signed the server's certificate (TWOFOLD_TLS_CA)")
    _file(group, "--tls-cert", "PEM file of the client certificate, for mutual TLS (TWOFOLD_TLS_CERT)")
    _file(group, "--tls-key", "PEM file of the client certificate's key (TWOFOLD_TLS_KEY)")
    group.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help="name expected in the server's certificate, when it is not the host (TWOFOLD_TLS_SERVER_NAME)",
    )
    group.add_argument(
        "--plaintext",
        action="store_true",
        help="send the token without TLS to a control plane that is not on this machine",
    )
    return parser


def resolve(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Options:
    """Common options in force: flags before environment before defaults. Raises UsageError with one line."""

    def pick(name: str, default: str = "") -> str:
        value: str = getattr(arguments, name, "") or environ.get(f"TWOFOLD_{name.upper()}", "") or default
        return value

    control_plane = pick("control_plane", DEFAULT_CONTROL_PLANE)
    host = _host_of(control_plane)
    tls = TlsFiles(ca=pick("tls_ca"), cert=pick("tls_cert"), key=pick("tls_key"), server_name=pick("tls_server_name"))
    if bool(tls.cert) != bool(tls.key):
        raise UsageError("--tls-cert and --tls-key go together")
    use_tls = getattr(arguments, "tls", False) or tls != TlsFiles()
    token = _token(arguments, environ)
    if token and not use_tls and not _is_loopback(host) and not getattr(arguments, "plaintext", False):
        raise UsageError(
            f"refusing to send the token in clear to {control_plane}: use --tls (or --tls-ca FILE), or --plaintext"
        )
    return Options(
        control_plane=control_plane,
        token=token,
        timeout_s=getattr(arguments, "timeout_s", DEFAULT_TIMEOUT_S),
        output=Output(getattr(arguments, "output", Output.TABLE)),
        tls=tls if use_tls else None,
    )


def read_bytes(path: str, limit: int) -> bytes:
    """Content of a file of at most ``limit`` bytes. Raises UsageError naming the file."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit:
        raise UsageError(f"{path} is larger than {limit} bytes")
    return data


def _file(group: Any, flag: str, help_text: str) -> None:
    group.add_argument(flag, metavar="FILE", help=help_text).complete = shtab.FILE


def _host_of(address: str) -> str:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise UsageError(f"control plane address {address!r} is not HOST:PORT")
    return match["host"].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(arguments: argparse.Namespace, environ: Mapping[str, str]) -> str:
    path = getattr(arguments, "token_file", "")
    if not path and environ.get("TWOFOLD_TOKEN"):
        origin, raw = "TWOFOLD_TOKEN", environ["TWOFOLD_TOKEN"].encode("utf-8", "surrogateescape")
    else:
        path = path or environ.get("TWOFOLD_TOKEN_FILE", "")
        if not path:
            return ""
        origin, raw = path, read_bytes(path, MAX_TOKEN_BYTES)
    token = raw.strip()
    if not token:
        raise UsageError(f"{origin} holds no token")
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise UsageError(f"{origin}: a token is printable ASCII without spaces")
    return token.decode("ascii")
