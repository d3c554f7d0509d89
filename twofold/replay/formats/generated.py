"""A generated workload: chat sessions of several turns and agents with tools, over shared system prompts; seeded.

Arrivals are Poisson, the popularity of system prompts follows Zipf's law, lengths are log-normal around a median,
the number of turns and agent steps is geometric, pauses are exponential. The defaults are round numbers near public
chat traces scaled down to small fleets, not a fit to any of them.
"""

import math
import random
from collections.abc import Iterator
from typing import Annotated

import msgspec

from twofold.replay.workload import Dialogue, Message, Session, Step, Tools, WorkloadError, content_key

Count = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Sigma = Annotated[float, msgspec.Meta(ge=0, le=3)]


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the generator. Tokens are medians, ``sigma`` is the spread of the logarithm."""

    sessions: Positive = 200
    rate: Rate = 4.0
    """Sessions that arrive per second."""
    agents: Share = 0.3
    """Share of sessions that are agents; the others are chats."""
    sigma: Sigma = 0.6
    max_tokens: Positive = 8192
    """Bound of any single drawn length."""

    prompts: Positive = 8
    """Distinct system prompts."""
    zipf: Sigma = 1.0
    """Exponent of their popularity."""
    system_tokens: Count = 1000

    turns: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 4.0
    """Mean turns of a chat."""
    max_turns: Positive = 16
    user_tokens: Positive = 120
    output_tokens: Positive = 120
    think_s: Seconds = 2.0
    """Mean pause of a person before the next turn."""

    toolsets: Positive = 3
    """Distinct sets of tool definitions."""
    functions: Positive = 8
    """Functions in a tool set."""
    tool_tokens: Count = 1500
    """Tokens of description in a tool set."""
    steps: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 8.0
    """Mean calls of an agent."""
    max_steps: Positive = 40
    task_tokens: Positive = 300
    result_tokens: Positive = 400
    """Median tokens of a tool's result."""
    call_tokens: Positive = 60
    """Median output tokens of an agent's step."""
    tool_s: Seconds = 0.5
    """Mean run time of a tool."""


def parse_parameters(text: str) -> Parameters:
    """``"sessions=50,rate=2"`` -> Parameters. Raises WorkloadError naming the key that is unknown or ill-valued."""
    values: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise WorkloadError(f"generate: expected key=value, got {item!r}")
        values[key.strip()] = value.strip()
    unknown = sorted(set(values) - set(Parameters.__struct_fields__))
    if unknown:
        known = ", ".join(Parameters.__struct_fields__)
        raise WorkloadError(f"generate: unknown parameter {unknown[0]!r}; known: {known}")
    try:
        return msgspec.convert(values, Parameters, strict=False)
    except msgspec.ValidationError as error:
        raise WorkloadError(f"generate: {error}") from None


def load(parameters: Parameters, *, seed: int = 0) -> Iterator[Session]:
    """Sessions in order of arrival; the same for the same parameters and seed, on every machine."""
    random_source = random.Random(f"generated-{seed}")
    weights = [1.0 / (rank + 1) ** parameters.zipf for rank in range(parameters.prompts)]
    start_s = 0.0
    for index in range(parameters.sessions):
        draw = _Draw(random.Random(f"generated-{seed}-{index}"), parameters, f"{seed}/{index}")
        system = random_source.choices(range(parameters.prompts), weights)[0]
        agent = random_source.random() < parameters.agents
        items = draw.agent(seed, system) if agent else draw.chat(seed, system)
        label = "agent" if agent else "chat"
        yield Session(session_id=f"{label}-{index}", start_s=start_s, items=items, label=label)
        start_s += random_source.expovariate(parameters.rate)


class _Draw:
    """Draws one session."""

    def __init__(self, source: random.Random, parameters: Parameters, name: str) -> None:
        self._source = source
        self._parameters = parameters
        self._name = name
        self._messages = 0

    def chat(self, seed: int, system: int) -> tuple[Step, ...]:
        p = self._parameters
        turns = self._geometric(p.turns, p.max_turns)
        steps = []
        for turn in range(turns):
            user = self._message("user", p.user_tokens)
            messages = (*self._system(seed, system), user) if turn == 0 else (user,)
            steps.append(self._step(messages, None, p.output_tokens, p.think_s if turn else 0.0))
        return tuple(steps)

    def agent(self, seed: int, system: int) -> tuple[Step, ...]:
        p = self._parameters
        key = content_key("generated-tools", seed, system % p.toolsets)
        tools = Tools(key=key, functions=p.functions, tokens=p.tool_tokens)
        steps = []
        for step in range(self._geometric(p.steps, p.max_steps)):
            if step == 0:
                messages = (*self._system(seed, system), self._message("user", p.task_tokens))
            else:
                messages = (self._message("tool", p.result_tokens),)
            steps.append(self._step(messages, tools, p.call_tokens, p.tool_s if step else 0.0))
        return tuple(steps)

    def _step(self, messages: tuple[Message, ...], tools: Tools | None, output_tokens: int, pause_s: float) -> Step:
        think_s = self._source.expovariate(1.0 / pause_s) if pause_s > 0 else 0.0
        prompt = Dialogue(messages=messages, tools=tools)
        return Step(prompt=prompt, output_tokens=self._tokens(output_tokens), think_s=think_s)

    def _system(self, seed: int, system: int) -> tuple[Message, ...]:
        tokens = self._parameters.system_tokens
        return (
            (Message(role="system", key=content_key("generated-system", seed, system), tokens=tokens),)
            if tokens
            else ()
        )

    def _message(self, role: str, median_tokens: int) -> Message:
        self._messages += 1
        key = content_key("generated", self._name, self._messages)
        return Message(role=role, key=key, tokens=self._tokens(median_tokens))

    def _tokens(self, median_tokens: int) -> int:
        drawn = median_tokens * math.exp(self._source.gauss(0.0, self._parameters.sigma))
        return max(1, min(self._parameters.max_tokens, round(drawn)))

    def _geometric(self, mean: float, most: int) -> int:
        if mean <= 1.0:
            return 1
        drawn = 1 + int(math.log(1.0 - self._source.random()) / math.log(1.0 - 1.0 / mean))
        return min(most, drawn)
