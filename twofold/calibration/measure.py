"""Taking the measurements of a plan from an engine, within a time limit."""

import asyncio
import bisect
import itertools
import random
from collections.abc import Callable, Sequence

import msgspec

from twofold.calibration.engine import Engine, EngineError
from twofold.calibration.plan import (
    BACKGROUND_TOKENS,
    MIXED_PROMPTS,
    OUTPUT_TOKENS,
    DecodePoint,
    MixedPoint,
    Plan,
    PromptPoint,
)
from twofold.calibration.values import Decode, EngineFacts, FirstToken, Gauges, Measurements, Mixed, Timing

WARM_UP_REQUESTS = 8
WARM_UP_ROUNDS_S = 2.0
BACKGROUND_CONTEXT_TOKENS = 32
IDLE_WAIT_S = 5.0
_IDLE_POLL_S = 0.2
_POLL_S = 0.02
_SETTLE_POLLS = 10
_PHASE_S = 0.03
_ENOUGH_GAPS = 10


class Busy(EngineError):
    """The engine works for others too: figures would say little, and measuring would disturb them."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run is: ``done`` of ``total`` points, and what comes next."""

    done: int
    total: int
    what: str


class Measurer:
    """Measures one engine. ``clock`` gives seconds; no round begins that would end after ``deadline_s``.

    ``force``: go on where the engine serves others too.
    """

    def __init__(
        self,
        engine: Engine,
        facts: EngineFacts,
        *,
        clock: Callable[[], float],
        deadline_s: float,
        force: bool = False,
        seed: int = 0,
    ) -> None:
        self._engine = engine
        self._facts = facts
        self._clock = clock
        self._deadline_s = deadline_s
        self._force = force
        self._random = random.Random(seed)
        self._finished = 0
        self._first_tokens: list[FirstToken] = []
        self._decodes: list[Decode] = []
        self._mixed: list[Mixed] = []
        self.merged_answers = 0
        """Answers of which some events carried several tokens."""
        self.cold_hits = 0
        """Prompts that should have been new and were in the cache."""
        self.rounds = 0
        self.foreign_requests = 0
        """Requests of others that the engine finished meanwhile."""

    async def run(self, plan: Plan, on_progress: Callable[[Progress], None] = lambda progress: None) -> Measurements:
        """All rounds of the plan, or those that fit before the deadline; points of a round come in random order.

        ``on_progress`` hears of every point before it is measured.

        Raises Busy where the engine serves others (unless ``force``) and EngineError where it fails or answers nothing
        in time.
        """
        await self.check_idle()
        await self._warm_up()
        total = plan.rounds * len(plan.points)
        longest_round_s = 0.0
        for number in range(plan.rounds):
            before, begun_s = await self._engine.gauges(), self._clock()
            if number and begun_s + longest_round_s > self._deadline_s:
                break
            self._finished = 0
            points = list(plan.points)
            self._random.shuffle(points)
            for index, point in enumerate(points):
                if number and self._clock() > self._deadline_s:
                    break
                on_progress(Progress(done=number * len(points) + index, total=total, what=describe(point)))
                await self._measure(point)
            self.rounds += 1
            longest_round_s = max(longest_round_s, self._clock() - begun_s)
            await self._check_alone(before)
        on_progress(Progress(done=total, total=total, what="done"))
        return Measurements(
            first_tokens=tuple(self._first_tokens), decodes=tuple(self._decodes), mixed=tuple(self._mixed)
        )

    async def check_idle(self) -> Gauges:
        """Wait shortly for an engine without work. Raises Busy."""
        until_s = self._clock() + (0.0 if self._force else IDLE_WAIT_S)
        while True:
            gauges = await self._engine.gauges()
            if not gauges.running and not gauges.waiting:
                return gauges
            if self._clock() >= until_s:
                break
            await asyncio.sleep(_IDLE_POLL_S)
        if self._force:
            return gauges
        raise Busy(
            f"{self._engine.url} serves {gauges.running} requests and {gauges.waiting} wait: take it out of traffic "
            "first (routerctl cordon), or measure anyway with --force"
        )

    async def _check_alone(self, before: Gauges) -> None:
        if not self._facts.has_metrics:
            return
        # The engine counts an answer a moment after its last byte.
        after = await self.check_idle()
        foreign = after.finished - before.finished - self._finished
        self.foreign_requests += max(0, foreign)
        if foreign > 0 and not self._force:
            raise Busy(
                f"{self._engine.url} finished {foreign} requests of others meanwhile: take it out of traffic first, "
                "or measure anyway with --force"
            )

    async def _warm_up(self) -> None:
        """The first passes of an engine compile and allocate: they are not counted."""
        until_s = self._clock() + WARM_UP_ROUNDS_S
        longest = max(1, min(512, (self._facts.max_model_len_tokens or 1024) // 2))
        for index in range(WARM_UP_REQUESTS):
            await self._ask(longest if index % 2 else 16, 8)
            if self._clock() > until_s:
                break
        await asyncio.gather(*(self._ask(16, 16) for _ in range(WARM_UP_REQUESTS)))

    async def _ask(self, prompt: int | Sequence[int], output_tokens: int) -> Timing:
        timeout_s = max(30.0, self._deadline_s - self._clock())
        ids = self._engine.prompt(prompt) if isinstance(prompt, int) else prompt
        timing = await self._engine.ask(ids, output_tokens, timeout_s=timeout_s)
        self._finished += 1
        self.merged_answers += timing.merged
        return timing

    async def _measure(self, point: PromptPoint | DecodePoint | MixedPoint) -> None:
        if isinstance(point, PromptPoint):
            await self._measure_prompt(point)
        elif isinstance(point, DecodePoint):
            await self._measure_decodes(point)
        else:
            await self._measure_mixed(point)

    async def _measure_prompt(self, point: PromptPoint) -> None:
        prompt = self._engine.prompt(point.tokens)
        timing, prefill_s = await self._told(prompt)
        if timing.cached_tokens:
            self.cold_hits += 1
        self._first_tokens.append(_first_token(point, timing, timing.cached_tokens, prefill_s))
        block = self._facts.block_size_tokens or 16
        if not self._facts.prefix_caching or point.tokens <= block:
            return
        timing, prefill_s = await self._told(prompt)
        # An engine that does not report its hits keeps all full blocks but that of the last token.
        cached = timing.cached_tokens or (point.tokens - 1) // block * block
        self._first_tokens.append(_first_token(point, timing, cached, prefill_s))

    async def _told(self, prompt: list[int]) -> tuple[Timing, float | None]:
        """One token of a prompt, and what the engine says its prefill took; None where others finished meanwhile."""
        before = await self._engine.gauges()
        timing = await self._ask(prompt, 1)
        after = await self._settled(before, 1)
        prefill_s = after.prefill_total_s - before.prefill_total_s
        exact = after.prefill_count - before.prefill_count == 1 and 0 < prefill_s <= timing.ttft_s
        return timing, prefill_s if exact else None

    async def _settled(self, before: Gauges, answers: int) -> Gauges:
        """The counters once the answers that have just come are in them."""
        after = await self._engine.gauges()
        for _ in range(_SETTLE_POLLS if self._facts.has_metrics else 0):
            if after.prefill_count - before.prefill_count >= answers:
                break
            await asyncio.sleep(_POLL_S)
            after = await self._engine.gauges()
        return after

    async def _measure_decodes(self, point: DecodePoint) -> None:
        prompts = [self._engine.prompt(point.context_tokens) for _ in range(point.sequences)]
        block = self._facts.block_size_tokens or 16
        cached = (point.context_tokens - 1) // block * block if self._facts.prefix_caching else 0
        if cached:
            # Else the streams would begin one prompt after another, and hardly overlap behind long ones.
            await asyncio.gather(*(self._ask(prompt, 1) for prompt in prompts))
        before = await self._engine.gauges()
        timings = await asyncio.gather(*(self._ask(prompt, OUTPUT_TOKENS) for prompt in prompts))
        after = await self._settled(before, len(prompts))
        told_s = after.decode_total_s - before.decode_total_s
        exact = after.decode_count - before.decode_count == len(prompts) and told_s > 0
        self._decodes.append(decode_sample(timings, point, cached, told_s if exact else None))

    async def _measure_mixed(self, point: MixedPoint) -> None:
        background = [
            asyncio.ensure_future(self._ask(BACKGROUND_CONTEXT_TOKENS, BACKGROUND_TOKENS))
            for _ in range(point.sequences)
        ]
        prompts: list[tuple[Timing, float | None]] = []
        try:
            # Every stream has to decode: one lone prompt takes longer than theirs, which came before it.
            await self._ask(16, 4)
            while len(prompts) < MIXED_PROMPTS and not any(task.done() for task in background):
                # Prompts come at any moment of a step.
                await asyncio.sleep(self._random.uniform(0.0, _PHASE_S))
                timing, prefill_s = await self._told(self._engine.prompt(point.tokens))
                prompts.append((timing, prefill_s))
        finally:
            timings = await asyncio.gather(*background)
        self._mixed += mixed_samples(timings, prompts, point)


def describe(point: PromptPoint | DecodePoint | MixedPoint) -> str:
    """A point in words."""
    if isinstance(point, PromptPoint):
        return f"prompt of {point.tokens} tokens"
    if isinstance(point, DecodePoint):
        return f"{point.sequences} streams behind {point.context_tokens} tokens"
    return f"prompts of {point.tokens} tokens beside {point.sequences} streams"


def _first_token(point: PromptPoint, timing: Timing, cached: int, prefill_s: float | None) -> FirstToken:
    return FirstToken(prompt_tokens=point.tokens, cached_tokens=cached, ttft_s=timing.ttft_s, prefill_s=prefill_s)


def decode_sample(timings: Sequence[Timing], point: DecodePoint, cached: int, told_s: float | None) -> Decode:
    """The mean step of streams side by side, and what these steps held on average, prompts of later streams included.

    ``cached``: tokens of each prompt that came from the prefix cache. ``told_s``: seconds between first and last token,
    summed over the streams, as the engine counts them; None takes the client's.
    """
    firsts = sorted(timing.events_s[0] for timing in timings)
    lasts = sorted(timing.events_s[-1] for timing in timings)
    seen_s = sum(timing.events_s[-1] - timing.events_s[0] for timing in timings)
    steps = sum(timing.tokens - 1 for timing in timings)
    step_s = seen_s / steps
    active = kv_tokens = gaps = prompts = 0.0
    together: list[float] = []
    for timing in timings:
        for index, (earlier, later) in enumerate(itertools.pairwise(timing.events_s), start=1):
            middle = (earlier + later) / 2
            running = bisect.bisect_left(firsts, middle) - bisect.bisect_left(lasts, middle)
            active += running
            kv_tokens += running * (point.context_tokens + index)
            gaps += 1
            if earlier >= firsts[-1] and later <= lasts[0]:
                together.append(later - earlier)
        # First tokens of one step reach the client one after another.
        behind = bisect.bisect_left(firsts, timing.events_s[0] + step_s / 2)
        prompts += bisect.bisect_right(firsts, timing.events_s[-1]) - behind
    new = point.context_tokens - cached
    together.sort()
    enough = len(together) >= _ENOUGH_GAPS * len(timings)
    return Decode(
        sequences=point.sequences,
        context_tokens=point.context_tokens,
        step_s=(seen_s if told_s is None else told_s) / steps,
        decodes=active / gaps,
        kv_tokens=kv_tokens / gaps,
        gap_p50_s=together[len(together) // 2] if enough else 0.0,
        gap_p90_s=together[len(together) * 9 // 10] if enough else 0.0,
        prompts=prompts / steps,
        prompt_tokens=prompts / steps * new,
        attention=prompts / steps * new * (cached + new / 2),
    )


def mixed_samples(
    streams: Sequence[Timing], prompts: Sequence[tuple[Timing, float | None]], point: MixedPoint
) -> list[Mixed]:
    """The steps that computed prompts beside ``streams``: (the prompt's answer, what the engine says its prefill took).

    Where the engine does not say it, the streams do: their widest gap while the prompt waited, the middle one of them.
    A prompt beside which a stream had ended is left out.
    """
    samples: list[Mixed] = []
    for prompt, prefill_s in prompts:
        widest: list[float] = []
        context = 0.0
        for stream in streams:
            around = [
                (later - earlier, index)
                for index, (earlier, later) in enumerate(itertools.pairwise(stream.events_s), start=1)
                if later > prompt.sent_s and earlier < prompt.events_s[0]
            ]
            if stream.events_s[0] < prompt.sent_s and stream.events_s[-1] > prompt.events_s[0] and around:
                widest.append(max(around)[0])
                context += (BACKGROUND_CONTEXT_TOKENS + max(around)[1]) / len(streams)
        if len(widest) == len(streams):
            samples.append(
                Mixed(
                    sequences=point.sequences,
                    context_tokens=context,
                    new_tokens=point.tokens,
                    step_s=prefill_s or sorted(widest)[len(widest) // 2],
                    ttft_s=prompt.ttft_s if prefill_s else None,
                )
            )
    return samples
