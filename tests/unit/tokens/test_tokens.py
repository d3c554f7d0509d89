"""From prompts to block hashes: runs remembered, work in slices, tokenizers, what is not understood."""

import asyncio
import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing.features import parse_request, to_features
from router.routing.kv_hash import PromptBlocks
from router.routing.types import Endpoint, ParsedRequest, RequestFeatures, Resolved
from router.tokens import exact
from router.tokens.exact import ExactPrefixes, Preparation
from router.tokens.tokenizers import BuiltinTokenizer, HuggingFaceTokenizer, body_ids, load
from router.tokens.types import TokenizerError, Unsupported
from twofold import tokenizer as builtin
from twofold.model.block_hash import BlockHasher
from twofold.model.fleet import EngineFacts, FleetSnapshot, HashAlgorithm, Pool, Target

TINY_MODEL = Path(__file__).parents[2] / "assets" / "tiny-model"


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.integers(0, 900), min_size=1, max_size=6),
    st.text(max_size=3),
    st.none() | st.tuples(st.text(min_size=1, max_size=3), st.text(min_size=1, max_size=3)),
    st.integers(1, 50),
)
def test_slices_make_the_whole_chain(
    size: int, lengths: list[int], salt: str, adapter: tuple[str, str] | None, slice_blocks: int
) -> None:
    """Prompts that share beginnings, hashed slice by slice with runs remembered: always the engine's chain."""
    hasher = BlockHasher(size)
    blocks = PromptBlocks(hasher, max_runs=3)
    for number, length in enumerate(lengths):
        ids = array("I", [index % 97 if index < 600 else number for index in range(length)])
        for salted in (salt, ""):
            work = blocks.work(ids, cache_salt=salted, adapter=adapter)
            while not work.step(slice_blocks):
                assert work.left
            assert work.hashes == hasher.chain(ids, cache_salt=salted, adapter=adapter)
            assert len(blocks) <= 3


def test_a_prompt_that_nobody_holds_is_hashed_no_further_than_needed() -> None:
    blocks = PromptBlocks(BlockHasher(16))
    ids = array("I", range(16_000))
    cold = blocks.work(ids)
    assert cold.step(10_000, lambda value: False)
    assert len(cold.hashes) == blocks.run_blocks
    chain = BlockHasher(16).chain(ids)
    part = blocks.work(ids)
    held = set(chain[:100])
    assert part.step(10_000, held.__contains__)
    assert part.hashes == chain[: len(part.hashes)]
    assert 100 <= len(part.hashes) <= 100 + blocks.run_blocks


def test_what_was_met_before_costs_nothing_new() -> None:
    blocks = PromptBlocks(BlockHasher(16))
    ids = array("I", range(4096))
    assert not blocks.work(ids).step(64)
    again = blocks.work(ids)
    assert not again.step(0)
    assert len(again.hashes) == 64


CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]
}


def test_builtin_chats_are_the_emulators() -> None:
    made = BuiltinTokenizer()
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        for generate in (True, False):
            body = {**CHAT, "tools": tools, "add_generation_prompt": generate}
            wanted = builtin.chat_prompt_ids(CHAT["messages"], tools, add_generation_prompt=generate)
            for _ in range(2):
                assert body_ids(made, body, chat=True).tolist() == wanted
    assert body_ids(made, {"prompt": "some text"}, chat=False).tolist() == builtin.encode("some text")


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"messages": []}, True),
        ({"messages": "hello"}, True),
        ({"messages": ["hello"]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, True),
        ({**CHAT, "chat_template": "{{ x }}"}, True),
        ({"prompt": ["a", "b"]}, False),
        ({}, False),
    ],
)
def test_what_is_not_understood_is_said_so(body: dict[str, Any], chat: bool) -> None:
    for made in (BuiltinTokenizer(), HuggingFaceTokenizer(TINY_MODEL)):
        with pytest.raises(Unsupported):
            body_ids(made, body, chat=chat)


def test_a_tokenizer_on_disk() -> None:
    made = load(str(TINY_MODEL))
    body = {"messages": CHAT["messages"][:2]}
    ids = body_ids(made, body, chat=True)
    assert ids == body_ids(load(str(TINY_MODEL / "tokenizer.json")), body, chat=True)
    longer = {"messages": [*CHAT["messages"][:2], {"role": "user", "content": "more"}]}
    assert len(body_ids(made, longer, chat=True)) > len(ids)
    assert len(body_ids(made, {"prompt": "hello world"}, chat=False)) > 1


def test_pieces_between_special_tokens_are_tokenized_once(tmp_path: Path) -> None:
    """The same ids as of the whole text, with and without memory."""
    layout = json.loads((TINY_MODEL / "tokenizer.json").read_text())
    assert layout["pre_tokenizer"]["type"] == "ByteLevel"
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    special = [token["content"] for token in layout["added_tokens"] if token["special"]]
    assert special
    mark = special[0]
    template = "{% for m in messages %}" + mark + "{{ m['role'] }}\n{{ m['content'] }}{% endfor %}" + mark
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    made = HuggingFaceTokenizer(tmp_path)
    messages = [{"role": "user", "content": f"  turn {turn} naïve 東京\n"} for turn in range(5)]
    whole = "".join(f"{mark}user\n{message['content']}" for message in messages) + mark
    expected = made.text(whole, add_special_tokens=False)
    for _ in range(2):
        assert made.chat({"messages": messages}) == expected


def test_templates_get_texts_or_parts_as_they_want_them(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    parts = "{% for m in messages %}{% for c in m['content'] %}{{ c.text }}|{% endfor %}{% endfor %}"
    calls = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "found"}'}}]},
    ]
    (tmp_path / "tokenizer.json").write_text((TINY_MODEL / "tokenizer.json").read_text())
    for template, wanted in ((text, "user:a\nb;assistant:;"), (parts, "a|b|"), (calls, "found")):
        (tmp_path / "chat_template.jinja").write_text(template)
        made = HuggingFaceTokenizer(tmp_path)
        assert made.chat({"messages": messages}) == made.text(wanted, add_special_tokens=False)
    for bad in (
        {"role": "developer", "content": "x"},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]},
    ):
        with pytest.raises(Unsupported):
            made.chat({"messages": [bad]})


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_tokenizers_that_cannot_be_loaded(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    for name in (str(tmp_path), str(tmp_path / "missing.json")):
        with pytest.raises(TokenizerError):
            load(name)


class Index:
    """A reader that holds every block, or none."""

    def __init__(self, held: bool = True) -> None:
        self.held = held

    def is_held(self, block_hash: int) -> bool:
        return self.held


class Host:
    """ExactPrefixes as a relay has it."""

    def __init__(self, index: Index | None = None, **pool: Any) -> None:
        self.outcomes: list[str] = []
        self.index = index or Index()
        fields = {"kv_events": True, "block_size_tokens": 16, "hash_algorithm": HashAlgorithm.SHA256, **pool}
        self.pool = Pool(name="p", models=("m",), **fields)
        self.exact = ExactPrefixes(
            lambda: self.index,  # type: ignore[arg-type, return-value]
            lambda pool, outcome: self.outcomes.append(outcome),
            deadline_s=20.0,
        )
        self.install()

    def install(self, *targets: Target) -> None:
        self.exact.install(FleetSnapshot(epoch=1, version=1, pools=(self.pool,), targets=targets))

    def prepare(
        self, body: dict[str, Any], endpoint: Endpoint = Endpoint.COMPLETIONS, adapter: str = ""
    ) -> tuple[RequestFeatures | Preparation, RequestFeatures]:
        raw = msgspec.json.encode(body)
        parsed: ParsedRequest = parse_request(endpoint, {}, raw)
        resolved = Resolved(pool=self.pool, adapter=adapter)
        features = to_features(parsed, resolved, request_id="r", sequence=1, arrival_s=0.0)
        return self.exact.prepare(features, parsed, resolved, raw), features

    async def ready(self, *args: Any, **kwargs: Any) -> RequestFeatures:
        made, _ = self.prepare(*args, **kwargs)
        assert isinstance(made, Preparation)
        found: asyncio.Future[RequestFeatures] = asyncio.get_running_loop().create_future()
        made.start(asyncio.get_running_loop(), found.set_result)
        return await found


IDS = list(range(1000, 1100))


def test_short_prompts_of_ids_are_hashed_on_the_spot() -> None:
    host = Host()
    made, _ = host.prepare({"model": "m", "prompt": IDS, "cache_salt": "s"})
    assert isinstance(made, RequestFeatures)
    assert list(made.block_hashes) == BlockHasher(16).chain(IDS, cache_salt="s")
    assert (made.block_tokens, made.prompt_tokens, made.prompt_tokens_exact) == (16, 100, True)
    assert host.outcomes == ["inline"]


async def test_long_prompts_of_ids_are_hashed_in_slices() -> None:
    host = Host()
    ids = list(range(exact.INLINE_BLOCKS * 16 * 5))
    made = await host.ready({"model": "m", "prompt": ids})
    assert list(made.block_hashes) == BlockHasher(16).chain(ids)
    assert host.outcomes == ["sliced"]


async def test_texts_and_chats_are_tokenized_where_the_pool_has_a_tokenizer() -> None:
    host = Host(tokenizer="builtin")
    text = "a text of some length " * 20
    made = await host.ready({"model": "m", "prompt": text})
    assert list(made.block_hashes) == BlockHasher(16).chain(builtin.encode(text))
    assert made.prompt_tokens == len(builtin.encode(text))
    chat = await host.ready({"model": "m", **CHAT}, Endpoint.CHAT)
    assert list(chat.block_hashes) == BlockHasher(16).chain(builtin.chat_prompt_ids(CHAT["messages"]))
    assert host.outcomes == ["tokenized", "tokenized"]
    host.exact.close()


async def test_what_fails_is_decided_without() -> None:
    host = Host(tokenizer="builtin")
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    made = await host.ready(body, Endpoint.CHAT)
    assert made.block_hashes == ()
    broken = Host(tokenizer="/nowhere")
    first, features = broken.prepare({"model": "m", "prompt": "x"})
    if isinstance(first, Preparation):  # else it is known already
        first.start(asyncio.get_running_loop(), lambda features: None)
        while not broken.outcomes:
            await asyncio.sleep(0.01)
    assert host.outcomes == broken.outcomes == ["failed"]
    again, features = broken.prepare({"model": "m", "prompt": "x"})
    assert again is features, "a tokenizer that cannot be loaded is asked no more"
    for made_by in (host, broken):
        made_by.exact.close()


async def test_what_is_late_is_decided_without(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tokenizer="builtin")
    loop = asyncio.get_running_loop()
    calls: list[Callable[[], None]] = []
    monkeypatch.setattr(loop, "call_later", lambda delay, late: calls.append(late) or loop.call_soon(lambda: None))
    made, features = host.prepare({"model": "m", "prompt": "some text " * 30})
    assert isinstance(made, Preparation)
    got: list[RequestFeatures] = []
    made.start(loop, got.append)
    calls[0]()
    assert got == [features]
    assert host.outcomes == ["late"]
    host.exact.close()
    cancelled, _ = host.prepare({"model": "m", "prompt": list(range(100_000))})
    assert isinstance(cancelled, Preparation)
    cancelled.start(loop, got.append)
    cancelled.cancel()
    await asyncio.sleep(0)
    assert len(got) == 1


async def test_a_tokenizer_that_makes_other_ids_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "TRIAL_S", 0.0)
    for held in (True, False):
        host = Host(Index(held), tokenizer="builtin")
        for number in range(2 * exact.MAX_MISSES):
            made = await host.ready({"model": "m", "prompt": f"prompt {number} " * 30})
            assert made.block_hashes
        made_now, features = host.prepare({"model": "m", "prompt": "text " * 30})
        assert (made_now is features) is not held
        host.exact.close()


async def test_too_many_at_once_are_decided_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_QUEUED", 0)
    host = Host(tokenizer="builtin")
    made, features = host.prepare({"model": "m", "prompt": "text"})
    assert made is features
    assert host.outcomes == ["refused"]
    host.exact.close()


def test_nothing_is_done_for_nothing() -> None:
    """No view, several prompts, other endpoints, pools without events or with hashes that nobody can compute."""
    host = Host()
    for body, endpoint in (
        ({"model": "m", "prompt": [IDS, IDS]}, Endpoint.COMPLETIONS),
        ({"model": "m", "input": IDS}, Endpoint.EMBEDDINGS),
        ({"model": "m", "prompt": "text without a tokenizer"}, Endpoint.COMPLETIONS),
    ):
        made, features = host.prepare(body, endpoint)
        assert made is features
    host.index = None  # type: ignore[assignment]
    made, features = host.prepare({"model": "m", "prompt": IDS})
    assert made is features
    for fields in ({"kv_events": False}, {"block_size_tokens": 0}, {"hash_algorithm": HashAlgorithm.XXHASH}):
        assert not Host(**fields).exact
    assert host.exact


def test_adapters_need_a_path_that_all_targets_agree_on() -> None:
    def target(name: str, path: str) -> Target:
        return Target(
            target_id=name,
            worker_id=name,
            pool="p",
            url="http://h:1",
            profile="x",
            ordinal=0,
            weight_tokens_s=1.0,
            facts=EngineFacts(adapters=("ad",), adapter_paths=(path,)),
        )

    host = Host()
    host.install(target("a", "/ad"), target("b", "/ad"))
    made, _ = host.prepare({"model": "ad", "prompt": IDS}, adapter="ad")
    assert isinstance(made, RequestFeatures)
    assert list(made.block_hashes) == BlockHasher(16).chain(IDS, adapter=("ad", "/ad"))
    host.install(target("a", "/ad"), target("b", "/other"))
    made, features = host.prepare({"model": "ad", "prompt": IDS}, adapter="ad")
    assert made is features
    assert host.outcomes == ["inline", "failed"]
