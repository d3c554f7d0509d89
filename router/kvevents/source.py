"""Where a worker publishes its KV events, from its own answer to ``GET /kv_event_sources``.

Only ports are taken from the answer: the host is the worker's own, so that no worker can point routers elsewhere.
"""

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

MAX_TOPIC_CHARS = 256
_LOOPBACK_NAMES = frozenset({"localhost"})


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Sockets of one engine (data-parallel rank). ``replay_endpoint`` is "" where there is none within reach."""

    endpoint: str
    replay_endpoint: str = ""
    topic: str = ""


class SourceError(ValueError):
    """The worker's answer names no usable source."""


class _Config(msgspec.Struct):
    endpoint: str
    enable_kv_cache_events: bool = True
    replay_endpoint: str | None = None
    buffer_steps: int = 0
    topic: str = ""


_decode = msgspec.json.Decoder(dict[str, _Config]).decode


def parse_sources(body: bytes, worker_url: str) -> Mapping[int, Source]:
    """Sources by data-parallel rank; empty for an engine that publishes none. Raises SourceError."""
    try:
        found = _decode(body)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise SourceError(f"/kv_event_sources: {str(error)[:200]}") from None
    host = urlsplit(worker_url).hostname or ""
    sources = {}
    for rank, config in found.items():
        if not rank.isdigit() or len(rank) > 5 or not config.enable_kv_cache_events:
            continue
        sources[int(rank)] = Source(
            endpoint=_reachable(config.endpoint, host),
            # Without a buffer nothing is ever replayed, and a replay that brings nothing proves nothing.
            replay_endpoint=_replay(config, host),
            topic=config.topic[:MAX_TOPIC_CHARS],
        )
    return sources


def _replay(config: _Config, host: str) -> str:
    if not config.replay_endpoint or config.buffer_steps < 1:
        return ""
    bound, _ = _split(config.replay_endpoint)
    if _is_loopback(bound) and not _is_loopback(host):
        return ""
    return _reachable(config.replay_endpoint, host)


def _reachable(endpoint: str, host: str) -> str:
    _, port = _split(endpoint)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _split(endpoint: str) -> tuple[str, int]:
    scheme, _, rest = endpoint.partition("://")
    bound, _, port = rest.rpartition(":")
    if scheme != "tcp" or not port.isdigit() or not 0 < int(port) < 65_536:
        raise SourceError(f"/kv_event_sources: {endpoint[:100]!r} is not tcp://host:port")
    return bound.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in _LOOPBACK_NAMES


def as_json(source: Source) -> dict[str, Any]:
    """For people."""
    return msgspec.structs.asdict(source)
