"""What to measure on an engine of given limits. Pure."""

import msgspec

from twofold.calibration.values import EngineFacts

LONGEST_PROMPT_TOKENS = 16_384
"""Longer prompts tell nothing new about a quadratic, and take seconds each."""
DEFAULT_MODEL_LEN_TOKENS = 4096
OUTPUT_TOKENS = 48
"""Tokens of each stream of a decode point: enough for a mean, few enough for the context to stay about the same."""
BACKGROUND_TOKENS = 192
"""Tokens of each stream that runs while the prompts of a mixed point come in."""
MIXED_PROMPTS = 4
"""Prompts of one mixed point."""
CONTEXT_TOKENS = 32_768
"""Most tokens of context of a decode point, all streams together: their prompts have to be computed first."""
_KV_SHARE = 0.7
"""Share of the KV cache that a point may fill: beyond it the engine begins to preempt."""


class PromptPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt sent twice: cold, and then from the prefix cache."""

    tokens: int


class DecodePoint(msgspec.Struct, frozen=True, kw_only=True):
    """``sequences`` streams side by side, each behind a prompt of ``context_tokens``."""

    sequences: int
    context_tokens: int


class MixedPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of ``tokens``, one after another, while ``sequences`` streams decode."""

    sequences: int
    tokens: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The points of one round."""

    prompts: tuple[PromptPoint, ...]
    decodes: tuple[DecodePoint, ...]
    mixed: tuple[MixedPoint, ...]
    rounds: int

    @property
    def points(self) -> tuple[PromptPoint | DecodePoint | MixedPoint, ...]:
        """All points of a round."""
        return (*self.prompts, *self.decodes, *self.mixed)


def make_plan(facts: EngineFacts, *, quick: bool) -> Plan:
    """The points for an engine: prompt lengths and batch sizes that grow geometrically up to its limits."""
    model_len = facts.max_model_len_tokens or DEFAULT_MODEL_LEN_TOKENS
    longest = min(model_len - OUTPUT_TOKENS - 1, LONGEST_PROMPT_TOKENS)
    budget = facts.max_num_batched_tokens or 2048
    lengths = _lengths(longest, 5 if quick else 9)
    contexts = sorted({min(64, longest), *([] if quick else [longest // 2]), longest})
    batches = (1, 4, 16, 32) if quick else (1, 2, 4, 8, 16, 32, 64)
    most = facts.max_num_seqs or 256
    room = (facts.kv_capacity_tokens or 1 << 62) * _KV_SHARE
    most_context = min(room, CONTEXT_TOKENS + max(batches) * OUTPUT_TOKENS)
    decodes = [
        DecodePoint(sequences=batch, context_tokens=context)
        for context in contexts
        for batch in batches
        if batch <= most
        and batch * (context + OUTPUT_TOKENS) <= most_context
        and (context == contexts[0] or batch <= 32)
    ]
    mixed = [
        MixedPoint(sequences=batch, tokens=length)
        for batch in ((4,) if quick else (1, 4, 12))
        for length in sorted({min(longest, budget - batch) // 4, min(longest, budget - batch) * 3 // 4})
        if batch + 1 <= most and length >= 1 and batch * (64 + BACKGROUND_TOKENS) + length <= room
    ]
    return Plan(
        prompts=tuple(PromptPoint(tokens=length) for length in lengths),
        decodes=tuple(decodes),
        mixed=tuple(mixed),
        rounds=2 if quick else 5,
    )


def _lengths(longest: int, count: int) -> list[int]:
    """``count`` lengths from 16 tokens up, denser at the long end, where the quadratic part shows."""
    if longest <= 16:
        return [max(1, longest)]
    steps = [16 * (longest / 16) ** (index / (count - 1)) for index in range(count)]
    return sorted({round(step) for step in steps} | {longest * 3 // 4})
