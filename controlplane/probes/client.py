"""One probe of one worker: what is asked, within which bounds, and what it means."""

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import msgspec

from controlplane.fleet.values import ProbeOutcome, RankSample
from controlplane.probes.exposition import NAMES, Readings, parse
from controlplane.probes.http import HttpClient, HttpError, Reply, TooLarge
from twofold.model.fleet import EngineFacts, HashAlgorithm

MAX_METRICS_BYTES = 4 << 20
MAX_SMALL_BYTES = 256 << 10
MAX_NAMES = 1024
MAX_REMEMBERED = 16_384
NAMED_METRICS = "/metrics/?" + urlencode([("name[]", name) for name in NAMES])
CONNECT_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 3.0
PROBE_TIMEOUT_S = 6.0
_SCALING = re.compile(rb"currently scaling", re.IGNORECASE)

TOKENIZER_PROBE = "Tokenizers differ: naïve café, 12345678, 東京 \U0001f680\n\tend."
"""Text whose token ids tell tokenizers apart: accents, digits, CJK, an emoji, white space."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe found; ``facts`` None when they were not asked or could not be had."""

    outcome: ProbeOutcome
    message: str = ""
    readings: Readings | None = None
    facts: EngineFacts | None = None


class ProbeError(Exception):
    """The worker did not answer as a healthy engine does; the message says how."""


class _Scaling(Exception):
    """The worker answers 503 because it changes its size."""


class ProbeClient:
    """Probes over one HTTP session. Close with ``close``."""

    def __init__(
        self, *, request_timeout_s: float = REQUEST_TIMEOUT_S, probe_timeout_s: float = PROBE_TIMEOUT_S
    ) -> None:
        self._probe_timeout_s = probe_timeout_s
        self._http = HttpClient(connect_timeout_s=CONNECT_TIMEOUT_S, request_timeout_s=request_timeout_s)
        self._whole: dict[str, None] = {}
        """Workers that do not answer named series alone; asked again after a failed probe."""

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()

    async def probe(self, url: str, known: EngineFacts | None, model: str) -> Finding:
        """Health and metrics of the worker at ``url``, and its facts when ``known`` is None. Never raises."""
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                await self._get(url, "/health", MAX_SMALL_BYTES)
                readings = await self._scrape(url)
                facts = await self._facts(url, readings, model) if known is None else None
        except _Scaling:
            return Finding(outcome=ProbeOutcome.RECONFIGURING, message="the engine is scaling (503 on every path)")
        except (ProbeError, HttpError) as error:
            return self._failed(url, str(error))
        except TimeoutError:
            return self._failed(url, "no answer in time")
        except (OSError, ValueError) as error:
            return self._failed(url, _cause(error))
        return Finding(outcome=ProbeOutcome.OK, readings=readings, facts=facts)

    def _failed(self, url: str, message: str) -> Finding:
        self._whole.pop(url, None)
        return Finding(outcome=ProbeOutcome.FAILED, message=message[:300])

    async def _scrape(self, url: str) -> Readings:
        """The needed series; by name where the engine can (vLLM: below ``/metrics/``), else out of all of them."""
        if url not in self._whole:
            with contextlib.suppress(ProbeError):
                readings = parse(await self._get(url, NAMED_METRICS, MAX_METRICS_BYTES))
                if readings.ranks:
                    return readings
        readings = parse(await self._get(url, "/metrics", MAX_METRICS_BYTES))
        while len(self._whole) >= MAX_REMEMBERED:
            del self._whole[next(iter(self._whole))]
        self._whole[url] = None
        return readings

    async def _facts(self, url: str, readings: Readings, model: str) -> EngineFacts:
        models, adapters, paths, length = _models(_json(await self._get(url, "/v1/models", MAX_SMALL_BYTES)))
        version = await self._optional(lambda: self._version(url))
        digest = await self._optional(lambda: self._tokenizer_digest(url, model or (models[0] if models else "")))
        return EngineFacts(
            version=version,
            block_size_tokens=readings.block_size_tokens,
            kv_capacity_tokens=readings.kv_capacity_tokens,
            max_model_len_tokens=length,
            hash_algorithm=_algorithm(readings.hash_algorithm),
            tokenizer_digest=digest,
            served_models=models,
            adapters=adapters,
            adapter_paths=paths,
        )

    async def _optional(self, ask: Callable[[], Any]) -> str:
        """The answer to a question that an engine may not know; "" when it does not."""
        try:
            return str(await ask())
        except (ProbeError, HttpError, OSError, TimeoutError, ValueError):
            return ""

    async def _version(self, url: str) -> str:
        answer = _json(await self._get(url, "/version", MAX_SMALL_BYTES))
        version = answer.get("version") if isinstance(answer, dict) else None
        return version[:64] if isinstance(version, str) else ""

    async def _tokenizer_digest(self, url: str, model: str) -> str:
        body = {"model": model, "prompt": TOKENIZER_PROBE, "add_special_tokens": False}
        reply = await self._http.post_json(url, "/tokenize", msgspec.json.encode(body), MAX_SMALL_BYTES)
        answer = _json(_checked(reply, "/tokenize"))
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and 0 <= i < 1 << 32 for i in ids):
            return ""
        return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids)).hexdigest()[:32]

    async def _get(self, url: str, path: str, limit: int) -> bytes:
        try:
            reply = await self._http.get(url, path, limit)
        except TooLarge as error:
            raise ProbeError(f"{_shown(path)} answered {error}") from None
        return _checked(reply, path)


def _checked(reply: Reply, path: str) -> bytes:
    if reply.status == 503 and _SCALING.search(reply.body[:4096]):
        raise _Scaling
    if reply.status != 200:
        raise ProbeError(f"{_shown(path)} answered {reply.status}")
    return reply.body


def _shown(path: str) -> str:
    return path.partition("?")[0]


def samples(readings: Readings, inflight: Callable[[int], tuple[int, int]]) -> tuple[RankSample, ...]:
    """Samples of each rank; ``inflight`` gives (in flight, unanswered) as the routers see a rank."""
    found = []
    for rank, values in sorted(readings.ranks.items()):
        sent, unanswered = inflight(rank)
        numbers = {name: int(value) for name, value in values.items() if name != "kv_usage"}
        found.append(
            RankSample(
                rank=rank,
                kv_usage=min(1.0, values.get("kv_usage", 0.0)),
                router_inflight=sent,
                router_unanswered=unanswered,
                **numbers,
            )
        )
    return tuple(found)


def _models(answer: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], int]:
    """Served names, adapters, their paths and model length out of /v1/models. Raises ProbeError when it is none."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise ProbeError("/v1/models answered no list of models")
    bases: list[str] = []
    adapters: list[str] = []
    paths: list[str] = []
    length = 0
    for entry in data[:MAX_NAMES]:
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= 256:
            continue
        if isinstance(entry.get("parent"), str):
            adapters.append(name)
            root = entry.get("root")
            paths.append(root if isinstance(root, str) and len(root) <= 4096 else "")
            continue
        bases.append(name)
        own = entry.get("max_model_len")
        if isinstance(own, int) and not isinstance(own, bool) and 0 < own < 1 << 31:
            length = own
    return tuple(bases), tuple(adapters), tuple(paths), length


def _json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        raise ProbeError("an answer that is no JSON") from None


def _algorithm(text: str) -> HashAlgorithm:
    try:
        return HashAlgorithm(text)
    except ValueError:
        return HashAlgorithm.UNKNOWN


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return f"cannot connect: {os.strerror(error.errno)}"
    return f"{type(error).__name__}: {error}"
