"""Taking the measurements of a plan from an engine, within a time limit."""

import asyncio
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
_POLL_S = 0.02
_TRIM = 0.1


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
            await asyncio.sleep(_POLL_S)
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
        cold = await self._first_token(prompt)
        if cold is None:
            return
        if cold.cached_tokens:
            self.cold_hits += 1
        self._first_tokens.append(cold)
        block = self._facts.block_size_tokens or 16
        if not self._facts.prefix_caching or point.tokens <= block:
            return
        warm = await self._first_token(prompt)
        if warm is None:
            return
        if not warm.cached_tokens:
            # An engine that does not report its hits keeps all full blocks but that of the last token.
            warm = msgspec.structs.replace(warm, cached_tokens=(point.tokens - 1) // block * block)
        self._first_tokens.append(warm)

    async def _first_token(self, prompt: list[int]) -> FirstToken | None:
        before = await self._engine.gauges()
        timing = await self._ask(prompt, 1)
        after = await self._settled(before)
        prefill_s = None
        if after.prefill_count == before.prefill_count + 1:
            prefill_s = after.prefill_total_s - before.prefill_total_s
        if after.prefill_count > before.prefill_count + 1:
            return None
        return FirstToken(
            prompt_tokens=len(prompt),
            cached_tokens=timing.cached_tokens,
            ttft_s=timing.ttft_s,
            prefill_s=prefill_s if prefill_s is None or 0 < prefill_s <= timing.ttft_s else None,
        )

    async def _settled(self, before: Gauges) -> Gauges:
        """The counters once the request that was just answered is in them."""
        after = await self._engine.gauges()
        for _ in range(10 if self._facts.has_metrics else 0):
            if after.prefill_count > before.prefill_count:
                break
            await asyncio.sleep(_POLL_S)
            after = await self._engine.gauges()
        return after

    async def _measure_decodes(self, point: DecodePoint) -> None:
        prompts = [self._engine.prompt(point.context_tokens) for _ in range(point.sequences)]
        # Longer prompts are computed one after another: the first streams run on until the last has begun.
        timings = await asyncio.gather(*(self._ask(prompt, OUTPUT_TOKENS) for prompt in prompts))
        sample = decode_sample(timings, point)
        if sample is not None:
            self._decodes.append(sample)

    async def _measure_mixed(self, point: MixedPoint) -> None:
        background = [
            asyncio.ensure_future(self._ask(BACKGROUND_CONTEXT_TOKENS, BACKGROUND_TOKENS))
            for _ in range(point.sequences)
        ]
        prompts: list[Timing] = []
        try:
            # Every stream has to decode: one lone prompt takes longer than theirs, which came before it.
            await self._ask(16, 4)
            while len(prompts) < MIXED_PROMPTS and not any(task.done() for task in background):
                prompts.append(await self._ask(point.tokens, 1))
                await self._ask(1, 4)
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


def decode_sample(timings: Sequence[Timing], point: DecodePoint) -> Decode | None:
    """Seconds of one step: the mean gap, without its largest and smallest tenth, while all streams decode.

    None where the streams did not overlap for at least four steps.
    """
    begin_s = max(timing.events_s[0] for timing in timings)
    end_s = min(timing.events_s[-1] for timing in timings)
    gaps: list[float] = []
    contexts: list[float] = []
    for timing in timings:
        events = timing.events_s
        tokens_an_event = max(1.0, timing.tokens / len(events))
        for index in range(1, len(events)):
            if events[index - 1] >= begin_s and events[index] <= end_s:
                gaps.append((events[index] - events[index - 1]) / tokens_an_event)
                contexts.append(point.context_tokens + index * tokens_an_event)
    if len(gaps) < 4 * len(timings):
        return None
    return Decode(
        sequences=len(timings), context_tokens=sum(contexts) / len(contexts), step_s=trimmed_mean(gaps, _TRIM)
    )


def mixed_samples(timings: Sequence[Timing], prompts: Sequence[Timing], point: MixedPoint) -> list[Mixed]:
    """The step that computed each prompt, as the streams beside it saw it: their widest gap while it waited."""
    samples: list[Mixed] = []
    for prompt in prompts:
        widest: list[float] = []
        seen: list[float] = []
        for timing in timings:
            events = timing.events_s
            gaps = [
                (later - earlier, index)
                for index, (earlier, later) in enumerate(itertools.pairwise(events))
                if later > prompt.sent_s and earlier < prompt.events_s[0]
            ]
            if gaps:
                gap_s, index = max(gaps)
                widest.append(gap_s)
                seen.append(BACKGROUND_CONTEXT_TOKENS + index + 1)
        if len(widest) == len(timings):
            widest.sort()
            samples.append(
                Mixed(
                    sequences=point.sequences,
                    context_tokens=sum(seen) / len(seen),
                    new_tokens=point.tokens,
                    step_s=widest[len(widest) // 2],
                )
            )
    return samples


def trimmed_mean(values: Sequence[float], share: float) -> float:
    """The mean without the ``share`` smallest and the ``share`` largest values."""
    ordered = sorted(values)
    cut = int(len(ordered) * share)
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)
