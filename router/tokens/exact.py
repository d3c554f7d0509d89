"""Exact prefixes: requests get the block hashes of their prompts before a worker is chosen for them.

Token ids are hashed on the spot where that is quick, else in slices between other work; texts and chats of pools with a
tokenizer are tokenised in a thread. Whatever is not ready by the deadline, or fails, is decided without.
"""

import asyncio
import contextlib
import logging
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec

from router.routing.kv_hash import BlockWork, PromptBlocks
from router.routing.kv_index import KvIndexReader
from router.routing.types import Endpoint, ParsedRequest, RequestFeatures, Resolved
from router.tokens.types import PromptTokenizer, TokenizerError, Unsupported
from twofold.model.block_hash import BlockHasher, is_supported
from twofold.model.fleet import FleetSnapshot, Pool

log = logging.getLogger(__name__)

INLINE_BLOCKS = 256
"""New blocks hashed on the spot; 0.4 ms at blocks of 16 tokens."""
SLICE_BLOCKS = 256
DEADLINE_S = 0.05
"""Longest that a request waits for its hashes."""
NOW_S = 1.0
TRIAL_S = 20.0
MAX_MISSES = 5
MAX_QUEUED = 64
"""Requests whose prompts wait to be tokenised; beyond it they are decided without."""
MAX_BODY_BYTES = 4 << 20
_CHAT = Endpoint.CHAT
OUTCOMES = ("inline", "sliced", "tokenized", "late", "failed", "refused")

_decode = msgspec.json.Decoder(dict[str, Any]).decode
Ready = Callable[[RequestFeatures], None]


class _Pool:
    """What exact prefixes of one pool need."""

    def __init__(self, pool: Pool, adapter_paths: Mapping[str, str]) -> None:
        self.pool = pool
        self.adapter_paths = adapter_paths
        self.blocks = PromptBlocks(BlockHasher(pool.block_size_tokens, pool.hash_algorithm, pool.hash_seed))
        self.tokenizer: PromptTokenizer | None = None
        self.broken = False
        """The tokenizer could not be loaded, or makes other ids than the engines."""
        self._trial: tuple[int, float] | None = None
        self._misses = 0

    def try_out(self, first_hash: int, reader: KvIndexReader, now_s: float) -> None:
        """See now and then whether a prompt that was tokenised here shows up among the engines' blocks some time after
        it was sent. Ids that are never theirs, for a template that differs say, are worse than none."""
        trial = self._trial
        if trial is None:
            self._trial = first_hash, now_s + TRIAL_S
        elif now_s >= trial[1]:
            self._trial = None
            self._misses = 0 if reader.is_held(trial[0]) else self._misses + 1
            if self._misses >= MAX_MISSES:
                self.broken = True
                log.error("prompts tokenised here are not the engines'", extra={"pool": self.pool.name})

    def adapter(self, name: str) -> tuple[str, str] | None:
        """(name, path) of an adapter. Raises Unsupported where the targets have not told its path, or differ."""
        if not name:
            return None
        path = self.adapter_paths.get(name)
        if not path:
            raise Unsupported("the adapter's path is not known")
        return name, path


class ExactPrefixes:
    """One per relay. ``count`` is told the outcome of every request of a pool with KV events."""

    def __init__(
        self,
        reader: Callable[[], KvIndexReader | None],
        count: Callable[[str, str], None],
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._reader = reader
        self._count = count
        self._deadline_s = deadline_s
        self._pools: dict[str, _Pool] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._queued = 0

    def __bool__(self) -> bool:
        return bool(self._pools)

    def install(self, snapshot: FleetSnapshot) -> None:
        """The fleet as it is now."""
        pools: dict[str, _Pool] = {}
        for pool in snapshot.pools:
            if not pool.kv_events or not pool.block_size_tokens or not is_supported(pool.hash_algorithm):
                continue
            paths = _adapter_paths(snapshot, pool.name)
            known = self._pools.get(pool.name)
            same = known is not None and known.pool == pool
            pools[pool.name] = known if known is not None and same else _Pool(pool, paths)
            pools[pool.name].adapter_paths = paths
            if pool.tokenizer and not same:
                self._start_thread().submit(_load, pools[pool.name])
        self._pools = pools

    def close(self) -> None:
        """Let go of the thread."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def prepare(
        self, features: RequestFeatures, parsed: ParsedRequest, resolved: Resolved, body: bytes
    ) -> "RequestFeatures | Preparation":
        """The features with block hashes, or the work that leads to them. Without a view of any cache, or for what
        cannot be told, the features as they are."""
        pool = self._pools.get(features.pool)
        reader = self._reader()
        if pool is None or reader is None or parsed.resumability.several_prompts:
            return features
        try:
            adapter = pool.adapter(resolved.adapter)
            if parsed.prompt_ids_count is not None:
                if parsed.endpoint is not Endpoint.COMPLETIONS:
                    return features
                return self._from_ids(pool, reader, features, parsed, adapter)
        except Unsupported:
            self._count(features.pool, "failed")
            return features
        if not pool.pool.tokenizer or parsed.endpoint not in (Endpoint.COMPLETIONS, _CHAT):
            return features
        if pool.broken:
            self._count(features.pool, "failed")
            return features
        if self._queued >= MAX_QUEUED or len(body) > MAX_BODY_BYTES:
            self._count(features.pool, "refused")
            return features
        return Preparation(self, pool, reader, features, parsed, adapter, body)

    def prepare_now(
        self, features: RequestFeatures, parsed: ParsedRequest, resolved: Resolved, body: bytes
    ) -> RequestFeatures:
        """The same at once, however long it takes (at most NOW_S to tokenise): for ``explain``."""
        prepared = self.prepare(features, parsed, resolved, body)
        return prepared.now() if isinstance(prepared, Preparation) else prepared

    def _from_ids(
        self,
        pool: _Pool,
        reader: KvIndexReader,
        features: RequestFeatures,
        parsed: ParsedRequest,
        adapter: tuple[str, str] | None,
    ) -> "RequestFeatures | Preparation":
        ids = array("I")
        ids.frombytes(parsed.prompt)
        work = pool.blocks.work(ids, cache_salt=parsed.cache_salt, adapter=adapter)
        if work.step(INLINE_BLOCKS, reader.is_held):
            self._count(features.pool, "inline")
            return with_blocks(features, work, pool.blocks, len(ids))
        return Preparation(self, pool, reader, features, parsed, adapter, b"", work=work, tokens=len(ids))

    def submit(self, pool: _Pool, body: bytes, *, chat: bool) -> "Future[array[int]]":
        """Tokenise a body in the thread."""
        self._queued += 1
        return self._start_thread().submit(_tokenize, pool, body, chat)

    def _start_thread(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        return self._threads

    def submitted_done(self) -> None:
        """A body left the thread's queue (event loop)."""
        self._queued -= 1

    def count(self, pool: str, outcome: str) -> None:
        """One more request with this outcome."""
        self._count(pool, outcome)

    @property
    def deadline_s(self) -> float:
        """Longest that a request waits."""
        return self._deadline_s


class Preparation:
    """The work of one request. ``start`` it; ``ready`` is called once, with or without hashes, unless cancelled."""

    __slots__ = (
        "_adapter",
        "_body",
        "_features",
        "_owner",
        "_parsed",
        "_pool",
        "_reader",
        "_ready",
        "_timer",
        "_tokens",
        "_work",
    )

    def __init__(
        self,
        owner: ExactPrefixes,
        pool: _Pool,
        reader: KvIndexReader,
        features: RequestFeatures,
        parsed: ParsedRequest,
        adapter: tuple[str, str] | None,
        body: bytes,
        *,
        work: BlockWork | None = None,
        tokens: int = 0,
    ) -> None:
        self._owner = owner
        self._pool = pool
        self._reader = reader
        self._features = features
        self._parsed = parsed
        self._adapter = adapter
        self._body = body
        self._work = work
        self._tokens = tokens
        self._ready: Ready | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, ready: Ready) -> None:
        """Begin."""
        self._ready = ready
        self._timer = loop.call_later(self._owner.deadline_s, self._late)
        if self._work is not None:
            loop.call_soon(self._slice, loop)
            return
        future = self._owner.submit(self._pool, self._body, chat=self._parsed.endpoint is _CHAT)

        def done(future: "Future[array[int]]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._tokenized, loop, future)

        future.add_done_callback(done)

    def now(self) -> RequestFeatures:
        """Do the work here and now."""
        work, tokens = self._work, self._tokens
        if work is None:
            future = self._owner.submit(self._pool, self._body, chat=self._parsed.endpoint is _CHAT)
            try:
                ids = future.result(NOW_S)
            except Exception:
                return self._features
            finally:
                self._owner.submitted_done()
            tokens = len(ids)
            work = self._pool.blocks.work(ids, cache_salt=self._parsed.cache_salt, adapter=self._adapter)
        while not work.step(1 << 20, self._reader.is_held):
            pass
        return with_blocks(self._features, work, self._pool.blocks, tokens)

    def cancel(self) -> None:
        """Nobody waits any more. Idempotent."""
        self._ready = None
        if self._timer is not None:
            self._timer.cancel()

    def _tokenized(self, loop: asyncio.AbstractEventLoop, future: "Future[array[int]]") -> None:
        self._owner.submitted_done()
        try:
            ids = future.result()
        except asyncio.CancelledError:
            return
        except Exception as error:
            if not isinstance(error, Unsupported):
                log.warning("cannot tokenise a prompt", extra={"pool": self._features.pool, "cause": repr(error)[:200]})
            self._finish("failed", self._features)
            return
        self._tokens = len(ids)
        # Hashed even where nobody waits any more: the next turn of the conversation finds it done.
        self._work = self._pool.blocks.work(ids, cache_salt=self._parsed.cache_salt, adapter=self._adapter)
        self._slice(loop)

    def _slice(self, loop: asyncio.AbstractEventLoop) -> None:
        work = self._work
        if work is None:
            return
        if not work.step(SLICE_BLOCKS, self._reader.is_held):
            loop.call_soon(self._slice, loop)
            return
        outcome = "tokenized" if self._body else "sliced"
        if self._body and work.hashes and self._ready is not None:
            self._pool.try_out(work.hashes[0], self._reader, loop.time())
        self._finish(outcome, with_blocks(self._features, work, self._pool.blocks, self._tokens))

    def _late(self) -> None:
        work, features = self._work, self._features
        if work is not None and work.hashes:
            # What is known so far bounds from below what is cached.
            features = with_blocks(features, work, self._pool.blocks, self._tokens)
        self._finish("late", features)

    def _finish(self, outcome: str, features: RequestFeatures) -> None:
        ready, self._ready = self._ready, None
        if self._timer is not None:
            self._timer.cancel()
        if ready is not None:
            self._owner.count(features.pool, outcome)
            ready(features)


def with_blocks(features: RequestFeatures, work: BlockWork, blocks: PromptBlocks, tokens: int) -> RequestFeatures:
    """The features with exact length and block hashes."""
    return msgspec.structs.replace(
        features,
        prompt_tokens=max(1, tokens),
        prompt_tokens_exact=True,
        block_hashes=tuple(work.hashes),
        block_tokens=blocks.hasher.block_size_tokens,
    )


def _load(pool: _Pool) -> None:
    # Vocabularies take memory that most relays need not spend.
    from router.tokens.tokenizers import load

    try:
        pool.tokenizer = load(pool.pool.tokenizer)
    except TokenizerError as error:
        pool.broken = True
        log.error("no tokenizer", extra={"pool": pool.pool.name, "cause": str(error)})


def _tokenize(pool: _Pool, body: bytes, chat: bool) -> "array[int]":
    from router.tokens.tokenizers import body_ids

    if pool.tokenizer is None:
        raise Unsupported("the pool's tokenizer could not be loaded")
    try:
        fields = _decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise Unsupported("not a JSON object") from None
    return body_ids(pool.tokenizer, fields, chat=chat)


def _adapter_paths(snapshot: FleetSnapshot, pool: str) -> dict[str, str]:
    """Path of each adapter that all targets of the pool agree on."""
    paths: dict[str, str] = {}
    for target in snapshot.targets:
        if target.pool != pool:
            continue
        for name, path in zip(target.facts.adapters, target.facts.adapter_paths, strict=False):
            paths[name] = path if paths.get(name, path) == path else ""
    return paths
