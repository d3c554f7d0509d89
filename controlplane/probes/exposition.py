"""The few series of an engine's ``/metrics`` that the control plane needs, found by byte search.

A body of vLLM is about 80 kB with some 900 lines, of which 11 names matter; parsing every line costs several times as
much.
"""

import math
import re
from collections.abc import Iterator

import msgspec

from controlplane.fleet.values import MAX_RANKS

_GAUGES_AND_COUNTERS: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    ("running", (b"vllm:num_requests_running",)),
    ("waiting", (b"vllm:num_requests_waiting",)),
    ("kv_usage", (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc")),
    ("prefix_queries_tokens", (b"vllm:prefix_cache_queries_total", b"vllm:gpu_prefix_cache_queries_total")),
    ("prefix_hits_tokens", (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total")),
    ("prompt_tokens", (b"vllm:prompt_tokens_total",)),
    ("generation_tokens", (b"vllm:generation_tokens_total",)),
    ("preemptions", (b"vllm:num_preemptions_total",)),
    ("iterations", (b"vllm:iteration_tokens_total_count",)),
)
_CONFIG = b"vllm:cache_config_info"
_STARTED = b"process_start_time_seconds"
_LABEL = re.compile(rb'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_MAX_LINE_BYTES = 16_384
_MAX_COUNT = float(1 << 62)


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """What a metrics body said. ``ranks`` maps a data-parallel rank to its values by field name of RankSample."""

    ranks: dict[int, dict[str, float]]
    block_size_tokens: int = 0
    kv_capacity_tokens: int = 0
    hash_algorithm: str = ""
    engine_started_s: float = 0.0


def parse(body: bytes) -> Readings:
    """The needed series of a metrics body; anything malformed is left out, never an error."""
    ranks: dict[int, dict[str, float]] = {}
    for field, names in _GAUGES_AND_COUNTERS:
        for name in names:
            found = False
            for labels, value in _series(body, name):
                rank = _rank(labels)
                if rank is not None and 0 <= value < _MAX_COUNT:
                    # Several series of one rank differ in the model's name (adapters): they add up.
                    values = ranks.setdefault(rank, {})
                    values[field] = values.get(field, 0.0) + value
                    found = True
            if found:
                break
    config: dict[bytes, bytes] = {}
    for labels, _ in _series(body, _CONFIG):
        config = dict(_LABEL.findall(labels))
        break
    block_size = _whole(config.get(b"block_size"))
    capacity = _whole(config.get(b"kv_cache_size_tokens")) or block_size * _whole(config.get(b"num_gpu_blocks"))
    started_s = next((value for _, value in _series(body, _STARTED)), 0.0)
    return Readings(
        ranks=ranks,
        block_size_tokens=block_size,
        kv_capacity_tokens=capacity,
        hash_algorithm=config.get(b"prefix_caching_hash_algo", b"").decode("ascii", "replace")[:32],
        engine_started_s=started_s if 0 <= started_s < 1e11 else 0.0,
    )


def _series(body: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """(labels, value) of each line of one metric; lines that end in no finite number are left out."""
    at, yielded = -1, 0
    while yielded < MAX_RANKS:
        at = body.find(name, at + 1)
        if at < 0:
            return
        if at > 0 and body[at - 1] != 0x0A:
            continue
        end = body.find(b"\n", at)
        line = body[at : end if end >= 0 else len(body)]
        rest = line[len(name) :]
        if len(line) > _MAX_LINE_BYTES or rest[:1] not in (b"{", b" "):
            continue
        labels, value_text = b"", rest
        if rest[:1] == b"{":
            close = rest.rfind(b"}")
            if close < 0:
                continue
            labels, value_text = rest[1:close], rest[close + 1 :]
        value = _number(value_text)
        if value is not None:
            yielded += 1
            yield labels, value


def _number(text: bytes) -> float | None:
    parts = text.split()
    try:
        value = float(parts[0])
    except (IndexError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _rank(labels: bytes) -> int | None:
    at = labels.find(b'engine="')
    if at < 0:
        return 0
    text = labels[at + 8 : labels.find(b'"', at + 8)]
    return int(text) if text.isdigit() and len(text) <= 4 and int(text) < MAX_RANKS else None


def _whole(text: bytes | None) -> int:
    return int(text) if text and text.isdigit() and len(text) <= 15 else 0
