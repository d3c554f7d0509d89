"""What a workload is: sessions of steps, described by content keys and lengths; no text, no clock, no I/O."""

from array import array
from collections.abc import Iterator

import msgspec
import xxhash

MAX_TOKENS_PER_PROMPT = 4_000_000
MAX_OUTPUT_TOKENS = 1_000_000


class WorkloadError(ValueError):
    """A workload that cannot be read or makes no sense; the message is one line and names file and line where it
    can.
    """


class Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt given as content blocks: equal keys are equal text.

    ``keys`` are 64-bit content keys, one per ``block_tokens`` tokens, the last block cut at ``input_tokens``.
    """

    keys: "array[int]"
    block_tokens: int
    input_tokens: int


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One new message of a conversation: ``tokens`` words drawn from the content key."""

    role: str
    key: int
    tokens: int


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """Tool definitions sent with a conversation: ``functions`` of them with ``tokens`` words of description in all."""

    key: int
    functions: int
    tokens: int


class Dialogue(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that continues the session's conversation: everything said so far, with the answers received, and
    these.
    """

    messages: tuple[Message, ...]
    tools: Tools | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One request, sent ``think_s`` seconds after the previous answer of the session ended."""

    prompt: Blocks | Dialogue
    output_tokens: int
    think_s: float = 0.0


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """Sub-sessions that start together (plus their ``start_s``); the session goes on when all have ended."""

    sessions: "tuple[Session, ...]"


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Steps that follow one another. ``start_s`` is the open-loop arrival of the first, in seconds from the start."""

    session_id: str
    start_s: float
    items: tuple[Step | Fork, ...]
    label: str = ""
    """Kind of traffic, for the report."""

    def steps(self) -> Iterator[Step]:
        """All steps, those of forks included, in file order."""
        for item in self.items:
            if isinstance(item, Step):
                yield item
            else:
                for session in item.sessions:
                    yield from session.steps()


def content_key(*parts: object) -> int:
    """A 64-bit content key that names ``parts``."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode())


def check_lengths(input_tokens: int, output_tokens: int) -> None:
    """Raises WorkloadError unless both lengths are within bounds."""
    if not 1 <= input_tokens <= MAX_TOKENS_PER_PROMPT:
        raise WorkloadError(f"input length {input_tokens} is not within 1..{MAX_TOKENS_PER_PROMPT}")
    if not 1 <= output_tokens <= MAX_OUTPUT_TOKENS:
        raise WorkloadError(f"output length {output_tokens} is not within 1..{MAX_OUTPUT_TOKENS}")
