"""The load generator: sends sessions when they are due, whatever became of the others, and records what comes back."""

import asyncio
import gc
import itertools
from collections.abc import Callable, Iterator

import msgspec

from emulator.tokens import ChainChecker, ChainViolation, encode
from twofold.replay.answer import Answer
from twofold.replay.cache import CacheLog, Hashes
from twofold.replay.client import Client, ExchangeError, parse_url
from twofold.replay.measures import LogHistogram, Record
from twofold.replay.render import Conversation, Prompt, conversation
from twofold.replay.source import SessionSource
from twofold.replay.workload import Blocks, Dialogue, Fork, Session, Step

AHEAD_S = 0.05
"""How long before it is due a session is taken up, so that its prompt is ready in time."""
STOP_POLL_S = 0.25
MAX_REQUESTS = 1_000_000
MAX_SESSIONS = 4096


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a workload is sent. Times are wall seconds; ``speed`` divides arrivals and pauses of the workload."""

    urls: tuple[str, ...]
    model: str
    endpoint: str = "completions"
    speed: float = 1.0
    limit: int = 0
    """Requests to send; 0 for all, bounded by MAX_REQUESTS."""
    duration_s: float = 0.0
    """Seconds after which nothing new is sent; 0 for no bound."""
    concurrency_limit: int = 1024
    """Requests in flight; one that must wait for its turn is late, and the report says so."""
    sessions_limit: int = MAX_SESSIONS
    """Sessions under way; in a closed loop this is the number of users."""
    timeout_s: float = 600.0
    stream: bool = True
    verify: bool = True
    """Check the answers against the token chain of emulated engines."""
    force_length: bool = True
    """Ask for exactly the recorded output length (ignore_eos, min_tokens)."""
    max_input_tokens: int = 0
    """Cut longer recorded prompts; end a conversation that would grow longer. 0 for no bound."""
    block_tokens: int = 16
    """Block size of the engines' prefix caches, for the ideal hit ratio."""
    salt: int = 0
    """Changes every word of the prompts and nothing else."""
    name: str = "replay"
    """Beginning of request ids."""
    api_key: str = ""


class LoadGenerator:
    """One run. ``clock`` is a monotonic clock in seconds; records count from its value at the start of ``run``."""

    def __init__(self, options: RunOptions, clock: Callable[[], float]) -> None:
        self.options = options
        self.records: list[Record] = []
        self.gaps = LogHistogram()
        self.cache = CacheLog(options.block_tokens)
        self.inflight = 0
        self.errors = 0
        self.skipped_steps = 0
        self.prompts_cut = 0
        self.interrupted = False
        self.first_error = ""
        self._absolute = clock
        self._zero_s = 0.0
        self._stopping = False
        self._begun = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[None]] = set()
        """Tasks that sleep before a request and may be cancelled at no loss."""
        headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        self._clients = [Client(parse_url(url), self._clock, headers=headers) for url in options.urls]
        self._turn = itertools.cycle(self._clients)
        self._slots = asyncio.Semaphore(options.concurrency_limit)
        self._session_slots = asyncio.Semaphore(options.sessions_limit)
        self._limit = min(options.limit or MAX_REQUESTS, MAX_REQUESTS)
        self._tail = _body_tail(options)

    @property
    def begun(self) -> int:
        """Requests sent or about to be."""
        return self._begun

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of the run."""
        return max(0.0, self._clock())

    async def run(self, sessions: Iterator[Session]) -> None:
        """Send the workload; returns when every answer has come or failed. Raises WorkloadError."""
        source = SessionSource(sessions)
        watch: asyncio.Task[None] | None = None
        try:
            await source.filled()
            gc.collect()
            gc.freeze()
            self._zero_s = self._absolute() + AHEAD_S
            if self.options.duration_s > 0:
                watch = asyncio.create_task(self._stop_after(self.options.duration_s))
            await self._dispatch(source)
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            if watch is not None:
                watch.cancel()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            source.close()
            for client in self._clients:
                await client.close()
            gc.unfreeze()

    def stop(self) -> None:
        """Send nothing new; requests in flight go on."""
        self._stopping = True
        for task in list(self._idle):
            task.cancel()

    def interrupt(self) -> None:
        """The user asked to end: first call as ``stop``, the second one gives up the requests in flight too."""
        if self.interrupted:
            for task in list(self._tasks):
                task.cancel()
        self.interrupted = True
        self.stop()

    async def _stop_after(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
        self.stop()

    async def _dispatch(self, source: SessionSource) -> None:
        while not self._stopping:
            session = await source.next()
            if session is None:
                return
            due_s = session.start_s / self.options.speed
            await self._pause_until(due_s - AHEAD_S)
            if not self._stopping:
                await self._session_slots.acquire()
            if self._stopping:
                return
            task = asyncio.create_task(self._run_session(session, due_s))
            self._tasks.add(task)
            task.add_done_callback(self._session_ended)

    def _session_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._idle.discard(task)
        self._session_slots.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._stopping = True
            self.first_error = self.first_error or f"internal error: {error!r}"

    async def _pause_until(self, due_s: float) -> None:
        """Sleep of the dispatcher, cut into pieces so that a stop is seen."""
        while not self._stopping and (left_s := due_s - self._clock()) > 0:
            await asyncio.sleep(min(left_s, STOP_POLL_S))

    async def _run_session(self, session: Session, due_s: float) -> None:
        talk = conversation(self.options.endpoint, self.options.salt)
        items = session.items
        for index, item in enumerate(items):
            if isinstance(item, Fork):
                now_s = self._clock()
                await asyncio.gather(
                    *(self._run_session(child, now_s + child.start_s / self.options.speed) for child in item.sessions)
                )
                due_s = self._clock()
                continue
            if index:
                due_s = self._clock() + item.think_s / self.options.speed
            if not await self._step(item, talk, session.label, due_s):
                if not self._stopping:
                    self.skipped_steps += sum(1 for rest in items[index + 1 :] if isinstance(rest, Step))
                return

    async def _step(self, step: Step, talk: Conversation, label: str, due_s: float) -> bool:
        """Send one request. False when the session cannot go on."""
        prompt = self._prompt(step, talk)
        if prompt is None or self._stopping or self._begun >= self._limit:
            return False
        hashes = self.cache.hashes(prompt.ids)
        checker = ChainChecker(prompt.ids) if self.options.verify else None
        if not await self._wait_for(due_s) or self._begun >= self._limit:
            return False
        self._begun += 1
        if self._begun == self._limit:
            self.stop()
        record = Record(
            request_id=f"{self.options.name}-{self._begun}", label=label, due_s=due_s, prompt_tokens=len(prompt.ids)
        )
        answer = Answer(
            checker,
            keep_text=isinstance(step.prompt, Dialogue),
            streamed=self.options.stream,
            on_gap=self.gaps.add,
        )
        async with self._slots:
            await self._exchange(step, prompt, hashes, record, answer)
        if record.error:
            return False
        if isinstance(step.prompt, Dialogue):
            talk.answered(answer.text)
            prompt.ids.extend(encode(answer.text))
            self.cache.answered(self.cache.hashes(prompt.ids))
        else:
            self.cache.answered_unseen(record.output_tokens)
        return True

    def _prompt(self, step: Step, talk: Conversation) -> Prompt | None:
        most = self.options.max_input_tokens
        wanted = step.prompt
        if most and isinstance(wanted, Blocks) and wanted.input_tokens > most:
            keys = wanted.keys[: -(-most // wanted.block_tokens)]
            wanted = Blocks(keys=keys, block_tokens=wanted.block_tokens, input_tokens=most)
            self.prompts_cut += 1
        prompt = talk.prompt(wanted)
        return None if most and isinstance(wanted, Dialogue) and len(prompt.ids) > most else prompt

    async def _wait_for(self, due_s: float) -> bool:
        """Sleep until a request is due. False when the run stops meanwhile."""
        left_s = due_s - self._clock()
        if left_s > 0:
            task = asyncio.current_task()
            assert task is not None
            self._idle.add(task)
            try:
                await asyncio.sleep(left_s)
            finally:
                self._idle.discard(task)
        return not self._stopping

    async def _exchange(self, step: Step, prompt: Prompt, hashes: Hashes, record: Record, answer: Answer) -> None:
        body = b"{" + prompt.fragment + self._tail
        if self.options.force_length:
            body += b',"max_tokens":%d,"min_tokens":%d}' % (step.output_tokens, step.output_tokens)
        else:
            body += b',"max_tokens":%d}' % step.output_tokens

        def sent() -> None:
            if not record.sent_s:
                record.sent_s = self._clock()
                self.cache.sent(hashes, len(prompt.ids))

        self.records.append(record)
        self.inflight += 1
        try:
            await next(self._turn).send(
                answer,
                prompt.path,
                body,
                timeout_s=self.options.timeout_s,
                headers=f"x-request-id: {record.request_id}\r\n",
                on_sent=sent,
            )
        except ExchangeError as error:
            self._failed(record, error.kind, str(error))
        except asyncio.CancelledError:
            self._failed(record, "cancelled", "given up at the user's request")
            raise
        finally:
            self.inflight -= 1
            self._finish(record, answer, step.output_tokens if self.options.force_length else None)

    def _finish(self, record: Record, answer: Answer, expected_tokens: int | None) -> None:
        record.end_s = self._clock()
        record.first_s, record.last_s = answer.first_s, answer.last_s
        if not self.options.stream:
            record.first_s = record.last_s = record.end_s
        record.output_tokens = answer.tokens
        record.usage_prompt_tokens = answer.prompt_tokens
        record.target = answer.headers.get("x-twofold-worker", "")
        if answer.cached_tokens is not None:
            record.cached_tokens = answer.cached_tokens
        if answer.failure and not record.error:
            kind = answer.failure
            if kind == "http":
                reason = answer.headers.get("x-twofold-reason", "")
                kind = f"http-{answer.status}" + (f":{reason}" if reason else "")
            self._failed(record, kind, answer.error_message or kind)
        if answer.checker is not None:
            record.verified_tokens = answer.checker.verified
            record.violation = _violation(answer, complete=not record.error, expected_tokens=expected_tokens)

    def _failed(self, record: Record, kind: str, message: str) -> None:
        record.error = kind
        self.errors += 1
        if not self.first_error:
            self.first_error = f"{record.request_id}: {kind}: {message[:300]}"

    def _clock(self) -> float:
        return self._absolute() - self._zero_s


def _body_tail(options: RunOptions) -> bytes:
    """The members of a request body that are the same for all requests, after the prompt."""
    members: dict[str, object] = {"model": options.model, "temperature": 0}
    if options.stream:
        members |= {"stream": True, "stream_options": {"include_usage": True}}
    if options.force_length:
        members["ignore_eos"] = True
    return b"," + msgspec.json.encode(members)[1:-1]


def _violation(answer: Answer, *, complete: bool, expected_tokens: int | None) -> str:
    """What is wrong with the tokens of an answer, "" when nothing is; of a broken answer only what came is judged."""
    checker = answer.checker
    assert checker is not None
    if not complete:
        return str(checker.violation) if checker.violation is not None else ""
    try:
        checker.finish(expected_tokens)
    except ChainViolation as violation:
        return str(violation)
    if answer.completion_tokens is not None and answer.completion_tokens != checker.delivered:
        return f"usage says {answer.completion_tokens} output tokens, {checker.delivered} were delivered"
    if expected_tokens is not None and answer.finish_reason != "length":
        return f"finish_reason {answer.finish_reason!r}, expected 'length'"
    return ""
