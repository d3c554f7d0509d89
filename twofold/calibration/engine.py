"""The engine under measurement: its facts, its counters, and streamed answers with the time of every event."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from twofold.calibration.values import EngineFacts, Gauges, Timing
from twofold.replay.client import Client, ExchangeError, Receiver, parse_url

MAX_BODY_BYTES = 8 << 20
QUESTION_TIMEOUT_S = 20.0
FALLBACK_IDS = tuple(range(300, 900))
"""Token ids that about every vocabulary has, for engines without ``/tokenize``."""
_MIN_IDS = 32
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class EngineError(Exception):
    """The engine could not be reached or answered with something else; one line."""


class Unreachable(EngineError):
    """Nothing that serves a model listens at the URL."""


class _Body(Receiver):
    __slots__ = ("data",)

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def on_body(self, data: bytes, now_s: float) -> None:
        """See Receiver."""
        if len(self.data) < MAX_BODY_BYTES:
            self.data += data


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[Any] = []
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class _Tokens(msgspec.Struct):
    tokens: list[int] = []


class _Scheduler(msgspec.Struct):
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None


class _Config(msgspec.Struct):
    scheduler_config: _Scheduler | None = None


class _ServerInfo(msgspec.Struct):
    vllm_config: _Config | None = None


class _Version(msgspec.Struct):
    version: str = ""


class _Stream(Receiver):
    """A streamed answer. Events are decoded when all have come: decoding would delay the events after it."""

    __slots__ = ("body", "events_s", "pending", "raw")

    def __init__(self) -> None:
        super().__init__()
        self.events_s: list[float] = []
        self.raw: list[bytes] = []
        self.pending = b""
        self.body = b""

    def on_body(self, data: bytes, now_s: float) -> None:
        """See Receiver."""
        if self.status != 200:
            self.body = (self.body + data)[:4096]
            return
        *events, self.pending = (self.pending + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                self.events_s.append(now_s)
                self.raw.append(event)

    def timing(self, sent_s: float) -> Timing:
        """The answer as times. Raises EngineError for anything but a complete stream of tokens."""
        if self.status != 200:
            text = " ".join(self.body.decode("utf-8", "replace").split())
            raise EngineError(f"the engine answered a completion with status {self.status}: {text[:300]}")
        times: list[float] = []
        usage: _Usage | None = None
        for at_s, raw in zip(self.events_s, self.raw, strict=True):
            try:
                event = msgspec.json.decode(raw[6:], type=_Event)
            except msgspec.DecodeError as error:
                raise EngineError(f"an event of the answer is no completion chunk: {error}") from None
            if event.error is not None:
                raise EngineError(f"the engine ended a stream with an error: {str(event.error)[:300]}")
            if event.choices:
                times.append(at_s)
            usage = event.usage or usage
        if not times:
            raise EngineError("the engine streamed no token")
        details = usage.prompt_tokens_details if usage else None
        return Timing(
            sent_s=sent_s,
            events_s=tuple(times),
            tokens=usage.completion_tokens if usage else len(times),
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )


class Engine:
    """One engine behind a base URL. ``clock`` stamps what arrives. Close it after use."""

    def __init__(self, url: str, *, api_key: str = "", clock: Callable[[], float], seed: int = 0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url
        self._client = Client(parse_url(url), clock, headers=headers)
        self._clock = clock
        self._random = random.Random(seed)
        self._model = ""
        self._headers = ""
        self._ids: Sequence[int] = FALLBACK_IDS

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def facts(self, model: str = "") -> EngineFacts:
        """What the engine says about itself; ``model`` "" takes the first it lists. Raises EngineError."""
        body = await self._question("/v1/models")
        models = _decode(body, _Models).data if body is not None else None
        if models is None:
            raise Unreachable(f"{self.url}: GET /v1/models did not answer 200: is it an OpenAI-compatible engine?")
        if not models:
            raise Unreachable(f"{self.url}: serves no model; name one with --model")
        chosen = next((item for item in models if item.id == model), None) if model else models[0]
        if chosen is None:
            raise Unreachable(f"{self.url}: does not serve {model!r}; it serves {', '.join(m.id for m in models)}")
        self._model = chosen.id
        page = await self._question("/metrics")
        version = await self._question("/version")
        server_info = await self._question("/server_info?config_format=json")
        found = facts_of_metrics((page or b"").decode("utf-8", "replace"))
        scheduler = _scheduler(server_info)
        # Ranks share nothing: one of them is measured, and stands for all.
        self._headers = "x-data-parallel-rank: 0\r\n" if found.engines > 1 else ""
        await self._learn_ids()
        return msgspec.structs.replace(
            found,
            model=chosen.id,
            version=_decode(version, _Version).version if version else "",
            max_model_len_tokens=chosen.max_model_len or 0,
            max_num_batched_tokens=scheduler.max_num_batched_tokens or 0,
            max_num_seqs=scheduler.max_num_seqs or 0,
        )

    async def gauges(self) -> Gauges:
        """The present counters. Raises EngineError."""
        body = await self._question("/metrics")
        return gauges_of_metrics(body.decode("utf-8", "replace")) if body is not None else Gauges()

    def prompt(self, tokens: int) -> list[int]:
        """Random token ids: a prompt that no cache has seen."""
        return self._random.choices(self._ids, k=tokens)

    async def ask(self, prompt: Sequence[int], output_tokens: int, *, timeout_s: float) -> Timing:
        """Stream exactly ``output_tokens``. Raises EngineError."""
        stream = _Stream()
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent: list[float] = []
        try:
            await self._client.send(
                stream,
                "/v1/completions",
                msgspec.json.encode(body),
                timeout_s=timeout_s,
                headers=self._headers,
                on_sent=lambda: sent.append(self._clock()),
            )
        except ExchangeError as error:
            raise EngineError(f"{self.url}: {error}") from None
        return stream.timing(sent[-1])

    async def _learn_ids(self) -> None:
        """Ids that the engine's own tokenizer makes of text, so that none is outside its vocabulary."""
        words = ["".join(self._random.choices(_ALPHABET, k=self._random.randint(2, 7))) for _ in range(400)]
        question = msgspec.json.encode({"model": self._model, "prompt": " ".join(words), "add_special_tokens": False})
        body = await self._question("/tokenize", question)
        ids = sorted(set(_decode(body, _Tokens).tokens)) if body is not None else []
        self._ids = ids if len(ids) >= _MIN_IDS else FALLBACK_IDS

    async def _question(self, path: str, body: bytes = b"") -> bytes | None:
        receiver = _Body()
        try:
            await self._client.send(
                receiver, path, body, method="POST" if body else "GET", timeout_s=QUESTION_TIMEOUT_S
            )
        except ExchangeError as error:
            raise Unreachable(f"{self.url}: {error}") from None
        return receiver.data if receiver.status == 200 else None


def _decode(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError:
        return kind()


def _scheduler(body: bytes | None) -> _Scheduler:
    info: _ServerInfo = _decode(body, _ServerInfo) if body else _ServerInfo()
    config = info.vllm_config
    return (config.scheduler_config if config else None) or _Scheduler()


_FACT_SERIES = ("vllm:cache_config_info{",)
_GAUGE_SERIES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting{",
    "vllm:kv_cache_usage_perc",
    "vllm:request_success_total",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_decode_time_seconds_count",
    "vllm:num_preemptions_total",
    "vllm:iteration_tokens_total_bucket",
)


def _samples(text: str, prefixes: tuple[str, ...]) -> Iterable[tuple[str, dict[str, str], float]]:
    """The samples that begin with one of ``prefixes``; the rest of a page of a thousand lines is not parsed."""
    wanted = "\n".join(line for line in text.splitlines() if line.startswith(prefixes))
    try:
        for family in text_string_to_metric_families(wanted + "\n"):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except ValueError as error:
        raise EngineError(f"the engine's /metrics page is malformed: {' '.join(str(error).split())}") from None


def facts_of_metrics(text: str) -> EngineFacts:
    """The facts of a ``/metrics`` page; a page without vLLM's cache configuration gives no facts."""
    labels = [labels for _, labels, _ in _samples(text, _FACT_SERIES)]
    if not labels:
        return EngineFacts(model="", has_metrics="vllm:num_requests_running" in text)
    first = labels[0]
    block = _whole(first.get("block_size"))
    size = _whole(first.get("kv_cache_size_tokens")) or block * _whole(first.get("num_gpu_blocks"))
    return EngineFacts(
        model="",
        block_size_tokens=block,
        kv_capacity_tokens=size,
        prefix_caching=first.get("enable_prefix_caching") != "False",
        has_metrics=True,
        engines=len({item.get("engine", "0") for item in labels}),
    )


def _whole(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except ValueError:
        return 0


def gauges_of_metrics(text: str) -> Gauges:
    """The counters of a ``/metrics`` page."""
    totals: dict[str, float] = {}
    steps: dict[float, int] = {}
    for name, labels, value in _samples(text, _GAUGE_SERIES):
        if name == "vllm:iteration_tokens_total_bucket":
            bound = float(labels["le"])
            steps[bound] = steps.get(bound, 0) + int(value)
        else:
            totals[name] = totals.get(name, 0.0) + value
    return Gauges(
        running=int(totals.get("vllm:num_requests_running", 0)),
        waiting=int(totals.get("vllm:num_requests_waiting", 0)),
        kv_usage=totals.get("vllm:kv_cache_usage_perc", 0.0),
        finished=int(totals.get("vllm:request_success_total", 0)),
        prefill_total_s=totals.get("vllm:request_prefill_time_seconds_sum", 0.0),
        prefill_count=int(totals.get("vllm:request_prefill_time_seconds_count", 0)),
        decode_total_s=totals.get("vllm:request_decode_time_seconds_sum", 0.0),
        decode_count=int(totals.get("vllm:request_decode_time_seconds_count", 0)),
        preemptions=int(totals.get("vllm:num_preemptions_total", 0)),
        step_tokens=tuple(sorted(steps.items())),
    )
