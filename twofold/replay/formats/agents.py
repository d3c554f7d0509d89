"""Recorded coding-agent sessions in the format of kv-cache-tester: one JSON object per session and line.

The ids name the full blocks of a prompt; the tokens behind the last full block are unique to the request. Closed
loop: a step follows the answer before it by the recorded ``think_time``. Sub-agents run as forks of their session.
Hash ids mean nothing across sessions; what sessions do share, tools and system prompt, is modelled by giving
sessions with equal (``tool_tokens``, ``system_tokens``) a common prefix of that many tokens. Sessions have no
common clock: they start ``session_gap_s`` apart on average (exponential), or all at once with 0.
"""

import random
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec

from twofold.replay.formats.lines import at_line, read_lines
from twofold.replay.workload import Blocks, Fork, Session, Step, WorkloadError, check_lengths, content_key

MAX_AGENT_DEPTH = 8


class _Request(msgspec.Struct, frozen=True):
    type: str
    t: float = 0.0
    in_: int = msgspec.field(default=0, name="in")
    out: int = 0
    hash_ids: list[int] = []
    think_time: float = 0.0
    requests: list[Any] = []
    tool_tokens: int = 0
    system_tokens: int = 0


class _Session(msgspec.Struct, frozen=True):
    id: str
    requests: list[_Request]
    block_size: int = 64
    tool_tokens: int = 0
    system_tokens: int = 0


def load(
    path: str, *, session_gap_s: float = 0.0, max_think_s: float = float("inf"), seed: int = 0
) -> Iterator[Session]:
    """Sessions in file order. ``max_think_s`` cuts long pauses (a person at lunch). Raises WorkloadError."""
    decoder = msgspec.json.Decoder(_Session)
    random_source = random.Random(f"agents-{seed}")
    start_s = 0.0
    for number, line in read_lines(path):
        try:
            recorded = decoder.decode(line)
            yield _session(recorded, start_s, max_think_s)
        except (msgspec.DecodeError, msgspec.ValidationError, WorkloadError, UnicodeDecodeError) as error:
            raise at_line(path, number, error) from None
        start_s += random_source.expovariate(1.0 / session_gap_s) if session_gap_s > 0 else 0.0


class _Keys:
    """Content keys of one session's block ids; the leading blocks of an agent are shared with like agents."""

    def __init__(self, session_id: str, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._session_id = session_id
        self._tails = 0
        self._keys: dict[int, int] = {}

    def share(self, hash_ids: list[int], tool_tokens: int, system_tokens: int) -> None:
        """Let the blocks that lie wholly within tools and system prompt be those of all like agents."""
        shared = (tool_tokens + system_tokens) // self.block_tokens
        for index, hash_id in enumerate(hash_ids[:shared]):
            self._keys.setdefault(hash_id, content_key("agents", tool_tokens, system_tokens, self.block_tokens, index))

    def unshared(self, count: int) -> "array[int]":
        """Keys for the tokens behind the last recorded (full) block."""
        self._tails += max(count, 0)
        return array("Q", (content_key("agents-tail", self._session_id, self._tails - i) for i in range(count)))

    def of(self, hash_ids: list[int]) -> "array[int]":
        """Content keys of recorded block ids."""
        keys = self._keys
        for hash_id in hash_ids:
            if hash_id not in keys:
                keys[hash_id] = content_key("agents", self._session_id, hash_id)
        return array("Q", (keys[hash_id] for hash_id in hash_ids))


def _session(recorded: _Session, start_s: float, max_think_s: float) -> Session:
    if not 1 <= recorded.block_size <= 4096:
        raise WorkloadError(f"block_size {recorded.block_size} is not within 1..4096")
    keys = _Keys(recorded.id, recorded.block_size)
    items = _items(recorded.requests, recorded, recorded.id, keys, max_think_s, depth=0)
    return Session(session_id=recorded.id, start_s=start_s, items=items, label="agent")


def _items(
    requests: list[_Request],
    owner: _Session | _Request,
    name: str,
    keys: _Keys,
    max_think_s: float,
    *,
    depth: int,
) -> tuple[Step | Fork, ...]:
    if depth > MAX_AGENT_DEPTH:
        raise WorkloadError(f"sub-agents nested deeper than {MAX_AGENT_DEPTH}")
    items: list[Step | Fork] = []
    children: list[tuple[float, Session]] = []
    shared = False
    for index, request in enumerate(requests):
        if request.type == "subagent":
            children.append((request.t, _child(request, f"{name}/sub{index}", keys, max_think_s, depth)))
            continue
        _flush(children, items)
        if not shared:
            keys.share(request.hash_ids, owner.tool_tokens, owner.system_tokens)
            shared = True
        items.append(_step(request, index, keys, max_think_s))
    _flush(children, items)
    return tuple(items)


def _child(request: _Request, name: str, keys: _Keys, max_think_s: float, depth: int) -> Session:
    nested = msgspec.convert(request.requests, list[_Request])
    items = _items(nested, request, name, keys, max_think_s, depth=depth + 1)
    return Session(session_id=name, start_s=0.0, items=items, label="subagent")


def _flush(children: list[tuple[float, Session]], items: list[Step | Fork]) -> None:
    """Neighbouring sub-agents become one fork, each starting as much after the first as it was recorded to."""
    if not children:
        return
    first_s = min(start_s for start_s, _ in children)
    items.append(
        Fork(
            sessions=tuple(
                msgspec.structs.replace(session, start_s=start_s - first_s)
                for start_s, session in sorted(children, key=lambda child: child[0])
                if session.items
            )
        )
    )
    children.clear()


def _step(request: _Request, index: int, keys: _Keys, max_think_s: float) -> Step:
    size = keys.block_tokens
    try:
        check_lengths(request.in_, max(1, request.out))
    except WorkloadError as error:
        raise WorkloadError(f"request {index}: {error}") from None
    if not request.hash_ids:
        raise WorkloadError(f"request {index}: no hash_ids")
    if request.think_time < 0:
        raise WorkloadError(f"request {index}: think_time {request.think_time:g} is negative")
    blocks = -(-request.in_ // size)
    prompt = Blocks(
        keys=keys.of(request.hash_ids[:blocks]) + keys.unshared(blocks - len(request.hash_ids)),
        block_tokens=size,
        input_tokens=request.in_,
    )
    return Step(prompt=prompt, output_tokens=max(1, request.out), think_s=min(request.think_time, max_think_s))
