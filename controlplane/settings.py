"""Settings of the control plane process."""

from typing import Annotated

import msgspec


def _doc(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Flags of ``python -m controlplane``."""

    fleet: Annotated[str, _doc("fleet file; changes are taken over while running")] = "fleet.yaml"
    listen: Annotated[str, _doc("host:port of the gRPC server; default: the fleet file's control_plane.listen")] = ""
    metrics_listen: Annotated[str, _doc("host:port of /metrics and /healthz; default: control_plane.metrics")] = ""
    run_dir: Annotated[str, _doc("directory for state and engine logs; default .run/<fleet name>")] = ""
    memory_store: Annotated[bool, _doc("keep cordons, policy and plans in memory only")] = False
    token_file: Annotated[str, _doc("file with the shared token; TWOFOLD_TOKEN does the same")] = ""
    tls_cert: Annotated[str, _doc("PEM certificate chain of the gRPC server")] = ""
    tls_key: Annotated[str, _doc("PEM key of the certificate")] = ""
    tls_client_ca: Annotated[str, _doc("PEM authority that client certificates must come from (mTLS)")] = ""
    insecure_plaintext: Annotated[bool, _doc("allow plaintext on addresses beyond loopback")] = False
    debug_profile: Annotated[bool, _doc("answer GET /debug/profile on the metrics port")] = False
    log_file: Annotated[str, _doc("append JSON log lines here instead of writing to stderr")] = ""
    log_level: Annotated[str, _doc("debug, info, warning or error")] = "info"
