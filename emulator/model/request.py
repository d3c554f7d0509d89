"""One request inside the engine model."""

import enum
from array import array
from collections.abc import Sequence

import xxhash

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


class Request:
    """A request and its progress. The engine model alone changes it after ``EngineModel.add``.

    ``max_tokens`` bounds the output; with ``natural_end`` it may also end earlier, where the token chain says so.
    ``priority``: lower runs first (priority policy only). ``arrival_s`` is the clock of ``EngineModel.step``.
    ``cache_salt`` keeps the request's blocks apart from those of other salts.
    """

    __slots__ = (
        "arrival_s",
        "blocks",
        "cached_tokens",
        "chain",
        "computed_tokens",
        "finish_reason",
        "first_scheduled_s",
        "first_token_s",
        "hash_seed",
        "hashes",
        "ids",
        "ignore_eos",
        "last_token_s",
        "max_tokens",
        "min_tokens",
        "natural_end",
        "preemptions",
        "priority",
        "prompt_tokens",
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
        self.priority = priority
        self.min_tokens = min_tokens
        self.natural_end = natural_end
        self.ignore_eos = ignore_eos
        self.stop_token_ids = stop_token_ids
        self.chain = TokenChain(prompt_ids)
        self.hash_seed = xxhash.xxh3_64_intdigest(cache_salt.encode("utf-8", "replace")) if cache_salt else 0
        self.hashes: list[int] = []
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
