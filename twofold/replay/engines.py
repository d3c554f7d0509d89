"""What engines say of themselves: prefix cache counters, KV capacity, step lateness; and planting a fault in one."""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

CALL_TIMEOUT_S = 5.0
MAX_METRICS_BYTES = 8 << 20


class EngineError(Exception):
    """An engine did not answer as expected; one line."""


class CacheCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over engines since they started, in tokens; capacity 0 where unknown."""

    queries_tokens: float = 0.0
    hits_tokens: float = 0.0
    kv_capacity_tokens: int = 0

    def hit_ratio_since(self, before: "CacheCounters") -> float | None:
        """Hit ratio between two readings; None when nothing was asked or a counter went back."""
        queries = self.queries_tokens - before.queries_tokens
        hits = self.hits_tokens - before.hits_tokens
        return hits / queries if queries > 0 and hits >= 0 else None


async def read_counters(urls: Sequence[str]) -> CacheCounters:
    """Prefix cache counters summed over the engines at ``urls``. Raises EngineError."""
    async with _session() as session:
        readings = await asyncio.gather(*(_counters(session, url) for url in urls))
    return CacheCounters(
        queries_tokens=sum(reading.queries_tokens for reading in readings),
        hits_tokens=sum(reading.hits_tokens for reading in readings),
        kv_capacity_tokens=sum(reading.kv_capacity_tokens for reading in readings),
    )


def parse_counters(text: str) -> CacheCounters:
    """Counters of one engine's metrics page (all its engine labels together). Raises ValueError for garbage."""
    sums = {"vllm:prefix_cache_queries_total": 0.0, "vllm:prefix_cache_hits_total": 0.0}
    capacity = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
            elif sample.name == "vllm:cache_config_info":
                blocks, size = sample.labels.get("num_gpu_blocks", ""), sample.labels.get("block_size", "")
                if blocks.isdigit() and size.isdigit():
                    capacity += int(blocks) * int(size)
    queries, hits = sums.values()
    return CacheCounters(queries_tokens=queries, hits_tokens=hits, kv_capacity_tokens=capacity)


async def engine_stats(admin_url: str) -> dict[str, Any]:
    """``GET /stats`` of an emulator process's admin port. Raises EngineError."""
    async with _session() as session:
        return await _json(session, "GET", f"{_base(admin_url)}/stats", None)


async def plant_fault(admin_url: str, fault: dict[str, Any]) -> dict[str, Any]:
    """``POST /faults`` of an emulator process's admin port. Raises EngineError."""
    async with _session() as session:
        return await _json(session, "POST", f"{_base(admin_url)}/faults", fault)


async def clear_faults(admin_url: str) -> None:
    """``DELETE /faults``. Raises EngineError."""
    async with _session() as session:
        await _json(session, "DELETE", f"{_base(admin_url)}/faults", None)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S))


def _base(url: str) -> str:
    return (url if "//" in url else f"http://{url}").rstrip("/")


async def _counters(session: aiohttp.ClientSession, url: str) -> CacheCounters:
    address = _base(url).removesuffix("/metrics") + "/metrics"
    try:
        async with session.get(address) as reply:
            if reply.status != 200:
                raise EngineError(f"{address}: status {reply.status}")
            body = bytearray()
            async for piece in reply.content.iter_any():
                body += piece
                if len(body) > MAX_METRICS_BYTES:
                    raise EngineError(f"{address}: larger than {MAX_METRICS_BYTES} bytes")
            return parse_counters(body.decode("utf-8", "replace"))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EngineError(f"{address}: {error or type(error).__name__}") from None
    except ValueError as error:
        raise EngineError(f"{address}: not a metrics page: {error}") from None


async def _json(session: aiohttp.ClientSession, method: str, url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    try:
        async with session.request(method, url, json=body) as reply:
            data = await reply.read()
            if reply.status >= 300:
                raise EngineError(f"{method} {url}: status {reply.status}: {data[:200].decode('utf-8', 'replace')}")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EngineError(f"{method} {url}: {error or type(error).__name__}") from None
    try:
        value = msgspec.json.decode(data) if data.strip() else {}
    except msgspec.DecodeError:
        raise EngineError(f"{method} {url}: the answer is not JSON") from None
    return value if isinstance(value, dict) else {"value": value}
