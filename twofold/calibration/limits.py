"""The limits of an engine: from what it says, from what the caller says, else from how it behaves when flooded."""

import asyncio
from collections.abc import Mapping

from twofold.calibration.engine import Engine, EngineError
from twofold.calibration.profile_file import Limits
from twofold.calibration.values import EngineFacts, Gauges

DEFAULT_BATCHED_TOKENS = 2048
DEFAULT_SEQS = 256
DEFAULT_BLOCK_TOKENS = 16
"""vLLM's defaults for its API server on most GPUs."""
FLOOD_PROMPTS = 40
FLOOD_PROMPT_TOKENS = 500
"""vLLM counts a prompt, with its first token, in the step that ends it, however many steps it took. A little less than
512 tokens, and 40 prompts: of no power of two as budget does a step end more than fit into it."""
FLOOD_REQUESTS = 288
"""More than vLLM lets run by default on most devices (256), and few enough for a second of work."""
FLOOD_OUTPUT_TOKENS = 48
FLOOD_TIMEOUT_S = 60.0
_POLL_S = 0.02

FIELDS = ("kv_capacity_tokens", "block_size_tokens", "max_num_batched_tokens", "max_num_seqs", "max_model_len_tokens")
GIVEN, TOLD, SEEN, ASSUMED = "given", "told by the engine", "observed", "assumed"


def resolve(facts: EngineFacts, given: Mapping[str, int | None], seen: Mapping[str, int]) -> Limits:
    """The limits by order of trust: given, told by the engine, observed, vLLM's defaults."""
    assumed = {
        "block_size_tokens": DEFAULT_BLOCK_TOKENS,
        "max_num_batched_tokens": DEFAULT_BATCHED_TOKENS,
        "max_num_seqs": DEFAULT_SEQS,
        "max_model_len_tokens": 4096,
    }
    values: dict[str, int] = {}
    sources: dict[str, str] = {}
    for field in FIELDS:
        told = int(getattr(facts, field))
        for value, source in ((given.get(field), GIVEN), (told, TOLD), (seen.get(field), SEEN)):
            if value:
                values[field], sources[field] = value, source
                break
        else:
            if field not in assumed:
                raise EngineError("the engine does not tell the size of its KV cache: give --kv-capacity-tokens")
            values[field], sources[field] = assumed[field], ASSUMED
    return Limits(**values, prefix_caching=facts.prefix_caching, sources=sources)


async def observe(engine: Engine, facts: EngineFacts, unknown: frozenset[str]) -> dict[str, int]:
    """What flooding an idle engine shows of the fields in ``unknown``. Raises EngineError.

    The token budget of a step is the upper bound of the fullest step's bucket in ``vllm:iteration_tokens_total``: exact
    for powers of two from 512 to 16,384. The most sequences are those that ran while others waited although there was
    KV memory left.
    """
    seen: dict[str, int] = {}
    if not facts.has_metrics:
        return seen
    fits = not facts.max_model_len_tokens or facts.max_model_len_tokens > FLOOD_PROMPT_TOKENS
    if "max_num_batched_tokens" in unknown and fits:
        before = await engine.gauges()
        await _flood(engine, FLOOD_PROMPTS, FLOOD_PROMPT_TOKENS, 1)
        budget = fullest_step(before, await engine.gauges(), offered=FLOOD_PROMPTS * FLOOD_PROMPT_TOKENS)
        if budget:
            seen["max_num_batched_tokens"] = budget
    if "max_num_seqs" in unknown:
        flood = asyncio.ensure_future(_flood(engine, FLOOD_REQUESTS, 8, FLOOD_OUTPUT_TOKENS))
        most = 0
        try:
            while not flood.done():
                gauges = await engine.gauges()
                if gauges.waiting and gauges.kv_usage < 0.9:
                    most = max(most, gauges.running)
                await asyncio.sleep(_POLL_S)
        finally:
            await flood
        if most:
            seen["max_num_seqs"] = most
    return seen


def fullest_step(before: Gauges, after: Gauges, *, offered: int) -> int:
    """Upper bound of the fullest step between two pages; 0 where ``offered`` tokens at once did not fill a step."""
    then = dict(before.step_tokens)
    bound = below = 0.0
    for upper, count in after.step_tokens:
        steps = count - then.get(upper, 0)
        if steps > below:
            bound = upper
        below = max(below, steps)
    return int(bound) if 0 < bound < offered else 0


async def _flood(engine: Engine, requests: int, prompt_tokens: int, output_tokens: int) -> None:
    await asyncio.gather(
        *(engine.ask(engine.prompt(prompt_tokens), output_tokens, timeout_s=FLOOD_TIMEOUT_S) for _ in range(requests))
    )
