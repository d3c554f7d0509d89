"""Settings of a relay process. Sizes in bytes, times in seconds."""

from typing import Annotated

import msgspec

from router.http.limits import HttpLimits


def _help(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set on a relay; one flag, environment variable and YAML key each."""

    replica_dir: Annotated[str, _help("shared-memory directory of the replica")] = ""
    replica_id: Annotated[str, _help("name of the replica, for logs")] = "router-0"
    index: Annotated[int, _help("which relay of the replica this is")] = 0
    listen_fd: Annotated[int, _help("inherited listening socket")] = -1
    log_file: Annotated[str, _help("append JSON lines here instead of standard error")] = ""
    log_level: Annotated[str, _help("debug, info, warning or error")] = "info"

    max_head_bytes: Annotated[int, _help("largest request head")] = 32_768
    max_headers: Annotated[int, _help("most header fields of a request")] = 100
    max_body_bytes: Annotated[int, _help("largest request body")] = 33_554_432
    max_connections: Annotated[int, _help("most client connections")] = 20_000
    max_requests: Annotated[int, _help("most requests in progress; beyond it 429")] = 10_000
    max_pipelined_bytes: Annotated[int, _help("bytes of further requests kept while one is answered")] = 65_536
    max_buffered_bytes: Annotated[int, _help("request bodies and held events of all connections together")] = (
        536_870_912
    )
    max_event_bytes: Annotated[int, _help("largest server-sent event kept whole")] = 8_388_608
    max_response_head_bytes: Annotated[int, _help("largest response head of a worker")] = 65_536
    hold_response_bytes: Annotated[int, _help("an unstreamed response up to this size is sent only when complete")] = (
        262_144
    )

    head_timeout_s: Annotated[float, _help("to receive a request head")] = 10.0
    body_timeout_s: Annotated[float, _help("to receive a request body")] = 60.0
    keep_alive_s: Annotated[float, _help("idle client connections close after this")] = 75.0
    linger_s: Annotated[float, _help("after an early error, input is discarded this long")] = 2.0
    client_stall_s: Annotated[float, _help("a client that reads nothing for this long is cut")] = 120.0

    connect_timeout_s: Annotated[float, _help("to connect to a worker")] = 3.0
    first_byte_timeout_s: Annotated[float, _help("from sending a streamed request to its first event")] = 600.0
    response_timeout_s: Annotated[float, _help("from sending an unstreamed request to its response")] = 3600.0
    stall_timeout_s: Annotated[float, _help("longest silence inside a response before the worker counts as hung")] = (
        30.0
    )
    worker_connections: Annotated[int, _help("idle connections kept per worker")] = 256
    worker_idle_s: Annotated[float, _help("idle worker connections close after this")] = 4.0
    """Below uvicorn's keep-alive of 5 s, so that a kept connection is rarely closed under a request."""

    max_attempts: Annotated[int, _help("workers tried for one request before its first byte")] = 3
    retry_burst: Annotated[float, _help("retries that may be made at once beyond the policy's ratio")] = 10.0
    decisions_kept: Annotated[int, _help("decisions remembered for explain")] = 10_000
    worker_name_header: Annotated[bool, _help("name the worker in x-twofold-worker-name")] = False
    worker_id_key: Annotated[str, _help("key of the opaque worker ids in responses; the same on all replicas")] = (
        "twofold"
    )
    grace_s: Annotated[float, _help("streams may run on this long after SIGTERM")] = 30.0

    def http_limits(self) -> HttpLimits:
        """The part that the HTTP server enforces."""
        return HttpLimits(
            head_bytes=self.max_head_bytes,
            header_count=self.max_headers,
            body_bytes=self.max_body_bytes,
            connections=self.max_connections,
            pipelined_bytes=self.max_pipelined_bytes,
            buffered_bytes=self.max_buffered_bytes,
            head_timeout_s=self.head_timeout_s,
            body_timeout_s=self.body_timeout_s,
            keep_alive_s=self.keep_alive_s,
            linger_s=self.linger_s,
        )
