"""From content keys to prompts: token ids of the built-in tokenizer and the JSON that carries their text.

Every token of content is the word of four characters " abc", so that text and ids follow from one another without
tokenising. Words are drawn from a content key by a counter-based generator (splitmix64, Steele et al. 2014), which
makes any block reproducible by itself.
"""

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from emulator.tokens import FIRST_OUTPUT_ID, chat_prompt_ids, decode_bytes, encode
from twofold.replay.workload import Blocks, Dialogue, Message, Tools, content_key

WORDS = 26**3
WORD_BYTES = 4
Ids = npt.NDArray[np.uint32]

_WORD_TABLE: npt.NDArray[np.uint8] = np.frombuffer(
    decode_bytes(range(FIRST_OUTPUT_ID, FIRST_OUTPUT_ID + WORDS)), dtype=np.uint8
).reshape(WORDS, WORD_BYTES)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt ready to send: its ids for the checker, and ``fragment``, the JSON members that hold it."""

    path: str
    ids: "array[int]"
    fragment: bytes


class Conversation(Protocol):
    """The prompts of one session, each built on what was said before."""

    def prompt(self, step: Blocks | Dialogue) -> Prompt:
        """The prompt of the next step."""

    def answered(self, text: str) -> None:
        """The answer to the last prompt becomes part of the conversation."""


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64, element by element."""
    mixed = (values ^ (values >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def block_ids(keys: Sequence[int], block_tokens: int, tokens: int, *, salt: int = 0) -> Ids:
    """Word ids of the first ``tokens`` tokens of the blocks ``keys``, of ``block_tokens`` tokens each."""
    # The salt is mixed first: small salts and small keys would cancel out otherwise.
    starts = np.asarray(keys, dtype=np.uint64) ^ splitmix64(np.array([salt], dtype=np.uint64))
    draws = -(-block_tokens // 4)
    counters = np.arange(1, draws + 1, dtype=np.uint64) * _GAMMA
    mixed = splitmix64(splitmix64(starts)[:, None] + counters[None, :])
    words = mixed.astype("<u8").view("<u2").reshape(len(starts), draws * 4)[:, :block_tokens]
    ids = (words.astype(np.uint32) % np.uint32(WORDS)) + np.uint32(FIRST_OUTPUT_ID)
    return ids.reshape(-1)[:tokens]


def words_text(ids: Ids) -> bytes:
    """Text of word ids, four bytes each."""
    return bytes(_WORD_TABLE[ids - np.uint32(FIRST_OUTPUT_ID)].tobytes())


class CompletionConversation:
    """Plain prompts: the texts of the conversation one after the other, or the blocks of a step alone."""

    path = "/v1/completions"

    def __init__(self, salt: int) -> None:
        self._salt = salt
        self._ids = array("I")
        self._text = bytearray()

    def prompt(self, step: Blocks | Dialogue) -> Prompt:
        """See Conversation."""
        if isinstance(step, Blocks):
            ids, text = _blocks(step, self._salt)
            return Prompt(path=self.path, ids=ids, fragment=b'"prompt":"' + text + b'"')
        for message in step.messages:
            ids, text = _message_words(message, self._salt)
            self._ids += ids
            self._text += text
        return Prompt(path=self.path, ids=self._ids[:], fragment=b'"prompt":"' + bytes(self._text) + b'"')

    def answered(self, text: str) -> None:
        """See Conversation."""
        self._ids.extend(encode(text))
        self._text += msgspec.json.encode(text)[1:-1]


class ChatConversation:
    """Chat prompts. The ids of all turns so far are kept, so that a prompt costs only what is new in it."""

    path = "/v1/chat/completions"

    def __init__(self, salt: int) -> None:
        self._salt = salt
        self._ids = array("I")
        self._messages: list[bytes] = []
        self._tools = b""

    def prompt(self, step: Blocks | Dialogue) -> Prompt:
        """See Conversation."""
        if isinstance(step, Blocks):
            ids, text = _blocks(step, self._salt)
            all_ids = array("I", chat_prompt_ids([], add_generation_prompt=False)) + _turn_ids("user", ids)
            fragment = b'"messages":[{"role":"user","content":"' + text + b'"}]'
            return Prompt(path=self.path, ids=all_ids + _generation_ids(), fragment=fragment)
        if not self._ids:
            self._begin(step.tools)
        for message in step.messages:
            ids, text = _message_words(message, self._salt)
            self._ids += _turn_ids(message.role, ids)
            self._messages.append(
                b'{"role":"' + message.role.encode() + _call_id(message) + b'","content":"' + text + b'"}'
            )
        fragment = self._tools + b'"messages":[' + b",".join(self._messages) + b"]"
        return Prompt(path=self.path, ids=self._ids + _generation_ids(), fragment=fragment)

    def answered(self, text: str) -> None:
        """See Conversation."""
        self._ids += _turn_ids("assistant", array("I", encode(text)))
        self._messages.append(b'{"role":"assistant","content":' + msgspec.json.encode(text) + b"}")

    def _begin(self, tools: Tools | None) -> None:
        definitions = tool_definitions(tools, self._salt) if tools else None
        self._ids = array("I", chat_prompt_ids([], definitions, add_generation_prompt=False))
        if definitions:
            self._tools = b'"tools":' + msgspec.json.encode(definitions) + b","


def conversation(endpoint: str, salt: int) -> Conversation:
    """A new conversation for ``endpoint`` ("chat" or "completions"); ``salt`` changes every word of content."""
    return ChatConversation(salt) if endpoint == "chat" else CompletionConversation(salt)


def tool_definitions(tools: Tools, salt: int) -> list[dict[str, Any]]:
    """Function definitions in OpenAI's form, the same for the same tools and salt."""
    definitions = []
    for index in range(tools.functions):
        tokens = tools.tokens // tools.functions
        words = words_text(block_ids([content_key(tools.key, index)], max(tokens, 1), tokens, salt=salt)).decode()
        definitions.append(
            {
                "type": "function",
                "function": {
                    "name": f"tool_{index}",
                    "description": words.strip(),
                    "parameters": {"type": "object", "properties": {"argument": {"type": "string"}}},
                },
            }
        )
    return definitions


def _blocks(step: Blocks, salt: int) -> tuple["array[int]", bytes]:
    ids = block_ids(step.keys, step.block_tokens, step.input_tokens, salt=salt)
    return _as_array(ids), words_text(ids)


def _message_words(message: Message, salt: int) -> tuple["array[int]", bytes]:
    ids = block_ids([message.key], max(message.tokens, 1), message.tokens, salt=salt)
    return _as_array(ids), words_text(ids)


def _as_array(ids: Ids) -> "array[int]":
    result = array("I")
    result.frombytes(np.ascontiguousarray(ids).tobytes())
    return result


def _turn_ids(role: str, content: "array[int]") -> "array[int]":
    """One turn of the chat template around ids of content."""
    frame = _FRAMES.get(role)
    if frame is None:
        whole = chat_prompt_ids([{"role": role, "content": ""}], add_generation_prompt=False)
        head = whole[len(chat_prompt_ids([], add_generation_prompt=False)) : -1]
        frame = _FRAMES[role] = (array("I", head), array("I", whole[-1:]))
    return frame[0] + content + frame[1]


def _generation_ids() -> "array[int]":
    frame = _FRAMES.get("")
    if frame is None:
        opened = chat_prompt_ids([])
        frame = _FRAMES[""] = (array("I", opened[len(chat_prompt_ids([], add_generation_prompt=False)) :]), array("I"))
    return frame[0]


def _call_id(message: Message) -> bytes:
    return b'","tool_call_id":"call_%016x' % message.key if message.role == "tool" else b""


_FRAMES: dict[str, tuple["array[int]", "array[int]"]] = {}
"""Ids before and after the content of a turn, by role; the roles of a workload are few."""
