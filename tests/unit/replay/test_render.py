"""Prompts: text, ids and JSON say the same."""

from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.tokens import chat_prompt_ids, encode
from twofold.replay.render import block_ids, conversation, words_text
from twofold.replay.workload import Blocks, Dialogue, Message, Tools


def body(fragment: bytes) -> dict[str, object]:
    decoded: dict[str, object] = msgspec.json.decode(b"{" + fragment + b"}")
    return decoded


@given(
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    block_tokens=st.integers(1, 70),
    cut=st.integers(0, 69),
)
def test_the_text_of_blocks_encodes_to_their_ids(keys: list[int], block_tokens: int, cut: int) -> None:
    tokens = max(1, len(keys) * block_tokens - cut % block_tokens)
    ids = block_ids(keys, block_tokens, tokens)
    text = words_text(ids).decode()
    assert encode(text) == ids.tolist()
    assert len(ids) == tokens
    assert len(text) == 4 * tokens


@given(key=st.integers(0, 2**64 - 1), block_tokens=st.integers(1, 70), other=st.integers(0, 2**64 - 1))
def test_a_block_is_the_same_wherever_it_stands(key: int, block_tokens: int, other: int) -> None:
    alone = block_ids([key], block_tokens, block_tokens).tolist()
    assert block_ids([other, key], block_tokens, 2 * block_tokens).tolist()[block_tokens:] == alone


def test_different_keys_and_salts_are_different_texts() -> None:
    texts = {block_ids([key], 64, 64, salt=salt).tobytes() for key in range(200) for salt in range(3)}
    assert len(texts) == 600


def test_completion_prompts_carry_the_ids_they_say() -> None:
    talk = conversation("completions", 0)
    prompt = talk.prompt(Blocks(keys=array("Q", [1, 2]), block_tokens=16, input_tokens=20))
    assert encode(str(body(prompt.fragment)["prompt"])) == list(prompt.ids)


@pytest.mark.parametrize("answer", [" abc def", 'with "quotes",\nä and \\', ""])
def test_chat_ids_are_those_of_the_whole_conversation(answer: str) -> None:
    tools = Tools(key=3, functions=2, tokens=20)
    talk = conversation("chat", 5)
    opening = (Message(role="system", key=1, tokens=9), Message(role="user", key=2, tokens=4))
    first = talk.prompt(Dialogue(messages=opening, tools=tools))
    sent = body(first.fragment)
    assert list(first.ids) == chat_prompt_ids(sent["messages"], sent["tools"])  # type: ignore[arg-type]
    talk.answered(answer)
    second = talk.prompt(Dialogue(messages=(Message(role="tool", key=4, tokens=6),), tools=tools))
    sent = body(second.fragment)
    assert list(second.ids) == chat_prompt_ids(sent["messages"], sent["tools"])  # type: ignore[arg-type]
    messages = sent["messages"]
    assert isinstance(messages, list)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[2]["content"] == answer
    assert messages[3]["tool_call_id"]


def test_blocks_in_a_chat_are_one_user_message() -> None:
    prompt = conversation("chat", 0).prompt(Blocks(keys=array("Q", [1]), block_tokens=16, input_tokens=7))
    assert list(prompt.ids) == chat_prompt_ids(body(prompt.fragment)["messages"])  # type: ignore[arg-type]


def test_completion_conversations_continue_their_text() -> None:
    talk = conversation("completions", 0)
    talk.prompt(Dialogue(messages=(Message(role="user", key=1, tokens=3),)))
    talk.answered(' abc "x"')
    prompt = talk.prompt(Dialogue(messages=(Message(role="user", key=2, tokens=3),)))
    text = str(body(prompt.fragment)["prompt"])
    assert ' abc "x"' in text
    assert encode(text) == list(prompt.ids)
