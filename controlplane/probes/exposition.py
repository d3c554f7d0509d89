"""The few series of an engine's ``/metrics`` that the control plane needs, found by byte search.

A body of vLLM is about 80 kB with some 900 lines, of which a dozen matter; parsing every line costs several times as
much. The search goes once through a body whose families come in the order of ``_FIELDS``, which is vLLM's.
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache

import msgspec

from controlplane.fleet.values import MAX_RANKS

_STARTED = b"process_start_time_seconds"
_FIELDS: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    ("running", (b"vllm:num_requests_running",)),
    ("waiting", (b"vllm:num_requests_waiting",)),
    ("kv_usage", (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc")),
    ("prefix_queries_tokens", (b"vllm:prefix_cache_queries_total", b"vllm:gpu_prefix_cache_queries_total")),
    ("prefix_hits_tokens", (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total")),
    ("preemptions", (b"vllm:num_preemptions_total",)),
    ("prompt_tokens", (b"vllm:prompt_tokens_total",)),
    ("generation_tokens", (b"vllm:generation_tokens_total",)),
    ("iterations", (b"vllm:iteration_tokens_total_count",)),
)
_CONFIG = b"vllm:cache_config_info"
NAMES = tuple(name.decode() for name in (_STARTED, *(name for _, names in _FIELDS for name in names), _CONFIG))
"""All series that are looked for, for engines that can answer named series alone."""

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
    scan = _Scan(body)
    started_s = next((value for _, value in scan.series(_STARTED)), 0.0)
    ranks: dict[int, dict[str, float]] = {}
    for field, names in _FIELDS:
        for name in names:
            found = False
            for labels, value in scan.series(name):
                rank = _rank(labels)
                if rank is not None and 0 <= value < _MAX_COUNT:
                    # Several series of one rank differ in the model's name (adapters): they add up.
                    values = ranks.setdefault(rank, {})
                    values[field] = values.get(field, 0.0) + value
                    found = True
            if found:
                break
    block_size, capacity, algorithm = _config(next((labels for labels, _ in scan.series(_CONFIG)), b""))
    return Readings(
        ranks=ranks,
        block_size_tokens=block_size,
        kv_capacity_tokens=capacity,
        hash_algorithm=algorithm,
        engine_started_s=started_s if 0 <= started_s < 1e11 else 0.0,
    )


@lru_cache(maxsize=1024)
def _config(labels: bytes) -> tuple[int, int, str]:
    """Block size and KV capacity (tokens), hash algorithm. An engine never changes them, so they are remembered."""
    config = dict(_LABEL.findall(labels))
    block_size = _whole(config.get(b"block_size"))
    capacity = _whole(config.get(b"kv_cache_size_tokens")) or block_size * _whole(config.get(b"num_gpu_blocks"))
    return block_size, capacity, config.get(b"prefix_caching_hash_algo", b"").decode("ascii", "replace")[:32]


class _Scan:
    """Searches a body for one metric after the other, each from where the last one was found."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def series(self, name: bytes) -> Iterator[tuple[bytes, float]]:
        """(labels, value) of each line of one metric; lines that end in no finite number are left out.

        The format has all lines of a metric in one group, between comments.
        """
        body, length = self._body, len(name)
        at = self._find(name)
        if at < 0:
            return
        end = body.find(b"\n#", at)
        end = len(body) if end < 0 else end
        self._at = end
        yielded = 0
        while 0 <= at < end and yielded < MAX_RANKS:
            stop = body.find(b"\n", at, end)
            stop = end if stop < 0 else stop
            if stop - at <= _MAX_LINE_BYTES:
                labels, value_text = b"", body[at + length : stop]
                if value_text[:1] == b"{":
                    close = value_text.rfind(b"}")
                    labels, value_text = value_text[1:close], value_text[close + 1 :] if close > 0 else b""
                value = _number(value_text)
                if value is not None:
                    yielded += 1
                    yield labels, value
            at = self._line(name, stop, end)

    def _find(self, name: bytes) -> int:
        """Where the first line of a metric begins; -1 for none."""
        at = self._line(name, self._at, len(self._body))
        if at < 0 and self._at:
            at = self._line(name, 0, self._at)
        return at

    def _line(self, name: bytes, begin: int, end: int) -> int:
        body = self._body
        at = body.find(name, begin, end)
        while at >= 0:
            if (at == 0 or body[at - 1] == 0x0A) and body[at + len(name) : at + len(name) + 1] in (b"{", b" "):
                return at
            at = body.find(name, at + 1, end)
        return -1


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
