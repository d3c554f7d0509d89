"""Settings of the agent process. Times in seconds."""

from pathlib import Path
from typing import Annotated

import msgspec

from router.kvevents.limits import DEFAULT_BLOCKS_PER_S, DEFAULT_INDEX_BLOCKS


def _help(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set on an agent; the launcher sets all of it."""

    replica_id: Annotated[str, _help("name of the replica")] = "router-0"
    replica_dir: Annotated[str, _help("shared-memory directory of the replica")] = ""
    state_dir: Annotated[str, _help("directory that keeps the last snapshot on disk; empty keeps none")] = ""
    serving_url: Annotated[str, _help("URL that clients use, as told to the control plane")] = ""
    control_plane: Annotated[tuple[str, ...], _help("host:port of the control plane; repeat for standbys")] = ()
    token_file: Annotated[str, _help("file with the shared token (or TWOFOLD_TOKEN)")] = ""
    tls_ca_file: Annotated[str, _help("certificates to check the control plane by; switches TLS on")] = ""
    tls_cert_file: Annotated[str, _help("client certificate for mutual TLS")] = ""
    tls_key_file: Annotated[str, _help("key of the client certificate")] = ""
    admin_fd: Annotated[int, _help("inherited listening socket of the admin port")] = -1
    admin_host: Annotated[str, _help("address of the admin port when no socket is inherited")] = "127.0.0.1"
    admin_port: Annotated[int, _help("admin port when no socket is inherited")] = 8100
    debug_profile: Annotated[bool, _help("answer GET /debug/profile on the admin port")] = False
    log_file: Annotated[str, _help("append JSON lines here instead of standard error")] = ""
    log_level: Annotated[str, _help("debug, info, warning or error")] = "info"

    connect_timeout_s: Annotated[float, _help("to connect to the control plane")] = 5.0
    silence_timeout_s: Annotated[float, _help("a watch without any message for this long is opened again")] = 15.0
    tick_s: Annotated[float, _help("between two reports of load")] = 0.02
    demand_interval_s: Annotated[float, _help("between two reports of demand")] = 1.0
    peer_timeout_s: Annotated[float, _help("load of a replica that is silent for this long is forgotten")] = 2.0
    slot_quarantine_s: Annotated[float, _help("a slot rests this long before another target gets it")] = 60.0
    kv_index_blocks: Annotated[int, _help("cached blocks known from KV events, over all targets, at most")] = (
        DEFAULT_INDEX_BLOCKS
    )
    kv_events_per_s: Annotated[float, _help("blocks stored and removed a second that KV events may tell of")] = (
        DEFAULT_BLOCKS_PER_S
    )
    settle_s: Annotated[float, _help("a control plane that just started may take this long to find the workers")] = 15.0
    disk_snapshot_after_s: Annotated[float, _help("wait this long for the control plane before serving from disk")] = (
        2.0
    )


class TokenError(ValueError):
    """The token file cannot be used."""


def read_token(token_file: str, environment_token: str) -> str:
    """The shared token: the file's first line, else ``environment_token``; "" for none. Raises TokenError."""
    if not token_file:
        return environment_token.strip()
    try:
        token = Path(token_file).read_text(encoding="ascii").strip()
    except OSError as error:
        raise TokenError(f"cannot read token file {token_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TokenError(f"token file {token_file} is not ASCII text") from None
    if not token or not token.isprintable() or "\n" in token:
        raise TokenError(f"token file {token_file} must hold one line")
    return token
