"""One request inside the engine model."""

import enum
from array import array
from collections.abc import Sequence

import msgspec
import xxhash

from emulator.outputs import OutputSource
from emulator.tokens import EOS_ID, TokenChain


class Status(enum.IntEnum):
    """Where a request stands."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3


class FinishReason(enum.StrEnum):
    """Why the engine ended a request, with vLLM's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter. ``adapter_id`` counts from 1 in the order of loading, as vLLM's ``lora_int_id``."""

    adapter_id: int
    name: str
    path: str


class Request:
    """A request and its progress. The engine model alone changes it after ``EngineModel.add``.

    ``max_tokens`` bounds the output; with ``natural_end`` it may also end earlier, where the token chain says so.
    ``priority``: lower runs first (priority policy only). ``arrival_s`` is the clock of ``EngineModel.step``; no step
    that begins before ``ready_s`` admits the request: until then it is on its way through the API server.
    ``cache_salt`` keeps the request's blocks apart from those of other salts, ``adapter`` from those of other adapters
    and of the base model. ``read_cache=False`` computes the whole prompt, as vLLM does where prompt logprobs are asked
    for; its blocks are stored all the same. ``source``: where the output comes from, the plain chain if None.
    ``remote_tokens``, to be set before ``EngineModel.add``: leading tokens whose KV another engine hands over.
    ``last_blocks``: the blocks held at the end.
    """

    __slots__ = (
        "adapter",
        "arrival_s",
        "blocks",
        "cache_salt",
        "cached_tokens",
        "chain",
        "computed_tokens",
        "deferred",
        "finish_reason",
        "first_scheduled_s",
        "first_token_s",
        "hash_seed",
        "hash_tail",
        "hashes",
        "ids",
        "ignore_eos",
        "last_blocks",
        "last_token_s",
        "max_tokens",
        "min_tokens",
        "natural_end",
        "preemptions",
        "priority",
        "prompt_tokens",
        "read_cache",
        "ready_s",
        "remote_tokens",
        "request_id",
        "scheduled_tokens",
        "status",
        "stop_reason",
        "stop_token_ids",
        "stored_blocks",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        arrival_s: float = 0.0,
        priority: int = 0,
        min_tokens: int = 0,
        natural_end: bool = False,
        ignore_eos: bool = False,
        stop_token_ids: frozenset[int] = frozenset(),
        cache_salt: str = "",
        source: OutputSource | None = None,
        adapter: Adapter | None = None,
        read_cache: bool = True,
    ) -> None:
        if not prompt_ids:
            raise ValueError("a request needs at least one prompt token")
        if max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        self.request_id = request_id
        self.ids = array("I", prompt_ids)
        self.prompt_tokens = len(prompt_ids)
        self.max_tokens = max_tokens
        self.arrival_s = arrival_s
        self.ready_s = 0.0
        self.remote_tokens = 0
        self.last_blocks: list[int] = []
        self.priority = priority
        self.min_tokens = min_tokens
        self.natural_end = natural_end
        self.ignore_eos = ignore_eos
        self.stop_token_ids = stop_token_ids
        self.chain: OutputSource = source or TokenChain(prompt_ids)
        self.cache_salt = cache_salt
        self.read_cache = read_cache
        self.deferred = False
        self.use_adapter(adapter)
        self.hashes: list[int] = []
        self.hash_tail = b""
        self.blocks: list[int] = []
        self.stored_blocks = 0
        self.computed_tokens = 0
        self.scheduled_tokens = 0
        self.cached_tokens: int | None = None
        self.preemptions = 0
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Run with this adapter, None for the base model. To be called before ``EngineModel.add`` alone."""
        self.adapter = adapter
        apart = self.cache_salt if adapter is None else f"{adapter.name}\0{adapter.path}\0{self.cache_salt}"
        self.hash_seed = xxhash.xxh3_64_intdigest(apart.encode("utf-8", "replace")) if apart else 0

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, a natural end included."""
        return len(self.ids) - self.prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        """Ids generated so far."""
        return self.ids[self.prompt_tokens :].tolist()

    def produce(self, max_model_len_tokens: int) -> int:
        """Sample the next token, append it and set ``finish_reason`` if it is the last."""
        produced = len(self.ids) - self.prompt_tokens + 1
        if self.natural_end and not self.ignore_eos and produced > self.min_tokens and self.chain.ends_here():
            token = EOS_ID
            self.finish_reason = FinishReason.STOP
        else:
            token = self.chain.next()
        self.ids.append(token)
        if self.finish_reason is None:
            if token in self.stop_token_ids and produced >= self.min_tokens:
                self.finish_reason = FinishReason.STOP
                self.stop_reason = token
            elif produced >= self.max_tokens or len(self.ids) >= max_model_len_tokens:
                self.finish_reason = FinishReason.LENGTH
        return token
