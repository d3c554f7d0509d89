"""Real clients, unchanged, against the service: the openai and anthropic SDKs, vLLM's benchmark, aiperf.

Everything here speaks to `service_url` and asks for `model_name`; `served_requests` shows that real engines did the
work. Decoding is greedy unless a test says otherwise, so the same prompt must give the same text by every way.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import TextBlock
from openai.types.chat import ChatCompletionMessageParam

from .client_process import offline_env, put_in_hub_cache, run_client
from .vllm_engine import BLOCK_TOKENS, TINY_MODEL

OUTPUT_TOKENS = 24
CLIENT_TIMEOUT_S = 240
UNKNOWN_MODEL = "no-such-model"
IGNORE_EOS = {"ignore_eos": True}
GREEDY = {"temperature": 0}
"""In the body by hand where the SDK has no such argument (anthropic)."""
GREEDY_TO_THE_END = {**GREEDY, **IGNORE_EOS}

CHAT: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "import os"},
    {"role": "assistant", "content": "def main(argv):"},
    {"role": "user", "content": "return sorted(os.listdir(argv[1]))"},
]
PROMPT = "def main(argv):\n    import os, sys\n"
WEATHER_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"metric": {"type": "boolean"}},
    "required": ["metric"],
    "additionalProperties": False,
}


@pytest.fixture
def openai_client(service_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service_url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def openai_async_client(service_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{service_url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def anthropic_client(service_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=service_url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def anthropic_async_client(service_url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=service_url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


class TestOpenAI:
    def test_models_lists_the_model(self, openai_client: openai.OpenAI, model_name: str) -> None:
        assert model_name in [model.id for model in openai_client.models.list()]

    def test_chat_stream_and_whole_answer_agree(
        self, openai_client: openai.OpenAI, model_name: str, served_requests: Callable[[], int]
    ) -> None:
        before = served_requests()
        whole = openai_client.chat.completions.create(
            model=model_name,
            messages=CHAT,
            max_completion_tokens=OUTPUT_TOKENS,
            temperature=0,
            extra_body=IGNORE_EOS,
        )
        assert whole.model == model_name
        assert whole.object == "chat.completion"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == OUTPUT_TOKENS
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + OUTPUT_TOKENS
        assert whole.choices[0].finish_reason == "length"
        assert whole.choices[0].message.role == "assistant"
        assert whole.choices[0].message.content

        pieces: list[str] = []
        finish: list[str] = []
        usages = []
        ids = set()
        with openai_client.chat.completions.create(
            model=model_name,
            messages=CHAT,
            max_completion_tokens=OUTPUT_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=IGNORE_EOS,
        ) as stream:
            for chunk in stream:
                ids.add(chunk.id)
                if chunk.usage is not None:
                    usages.append(chunk.usage)
                for choice in chunk.choices:
                    pieces.append(choice.delta.content or "")
                    if choice.finish_reason:
                        finish.append(choice.finish_reason)
        assert "".join(pieces) == whole.choices[0].message.content
        assert len([piece for piece in pieces if piece]) > OUTPUT_TOKENS // 3, "the answer came in few pieces"
        assert finish == ["length"]
        assert len(ids) == 1
        assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [
            (whole.usage.prompt_tokens, OUTPUT_TOKENS)
        ]
        assert served_requests() == before + 2

    def test_completion_stream_and_whole_answer_agree(self, openai_client: openai.OpenAI, model_name: str) -> None:
        whole = openai_client.completions.create(
            model=model_name,
            prompt=PROMPT,
            max_tokens=OUTPUT_TOKENS,
            temperature=0,
            logprobs=1,
            extra_body=IGNORE_EOS,
        )
        assert whole.usage is not None
        assert whole.usage.completion_tokens == OUTPUT_TOKENS
        assert whole.choices[0].logprobs is not None
        assert len(whole.choices[0].logprobs.token_logprobs or []) == OUTPUT_TOKENS
        with openai_client.completions.create(
            model=model_name,
            prompt=PROMPT,
            max_tokens=OUTPUT_TOKENS,
            temperature=0,
            stream=True,
            extra_body=IGNORE_EOS,
        ) as stream:
            text = "".join(chunk.choices[0].text for chunk in stream)
        assert text == whole.choices[0].text

    def test_repeated_long_prompt_is_cached(self, openai_client: openai.OpenAI, model_name: str) -> None:
        """The second turn of a conversation finds the blocks of the first: both reached the same engine."""
        messages: list[ChatCompletionMessageParam] = [
            {"role": "user", "content": f"{uuid.uuid4()} " + "import os, sys\n" * 100}
        ]
        cached_tokens: list[int] = []
        prompt_tokens: list[int] = []
        for _turn in range(2):
            answer = openai_client.chat.completions.create(
                model=model_name, messages=messages, max_completion_tokens=4, temperature=0
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached_tokens.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
            prompt_tokens.append(answer.usage.prompt_tokens)
        assert prompt_tokens[0] > 2 * BLOCK_TOKENS
        assert cached_tokens == [0, (prompt_tokens[0] - 1) // BLOCK_TOKENS * BLOCK_TOKENS]

    def test_structured_output(self, openai_client: openai.OpenAI, model_name: str) -> None:
        answer = openai_client.chat.completions.create(
            model=model_name,
            messages=CHAT,
            max_completion_tokens=32,
            temperature=0,
            extra_body={"structured_outputs": {"choice": ["alpha", "beta"]}},
        )
        assert answer.choices[0].message.content in ("alpha", "beta")

    def test_named_tool_call(self, openai_client: openai.OpenAI, model_name: str) -> None:
        """vLLM forces the call and JSON as its arguments (not their schema: a tiny model answers anything)."""
        answer = openai_client.chat.completions.create(
            model=model_name,
            messages=[{"role": "user", "content": "import os"}],
            max_completion_tokens=128,
            temperature=0,
            tools=[{"type": "function", "function": {"name": "weather", "parameters": WEATHER_PARAMETERS}}],
            tool_choice={"type": "function", "function": {"name": "weather"}},
        )
        calls = answer.choices[0].message.tool_calls
        assert calls
        assert calls[0].type == "function"
        assert calls[0].function.name == "weather"
        json.loads(calls[0].function.arguments)

    def test_responses(self, openai_client: openai.OpenAI, model_name: str) -> None:
        answer = openai_client.responses.create(
            model=model_name, input="import os", max_output_tokens=OUTPUT_TOKENS, temperature=0
        )
        assert answer.model == model_name
        assert answer.output_text
        assert answer.usage is not None
        assert 0 < answer.usage.output_tokens <= OUTPUT_TOKENS
        with openai_client.responses.stream(
            model=model_name, input="import os", max_output_tokens=OUTPUT_TOKENS, temperature=0
        ) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == answer.output_text

    def test_errors_are_the_sdks_own(self, openai_client: openai.OpenAI, model_name: str) -> None:
        with pytest.raises(openai.NotFoundError) as unknown:
            openai_client.chat.completions.create(model=UNKNOWN_MODEL, messages=CHAT)
        assert UNKNOWN_MODEL in unknown.value.message
        with pytest.raises(openai.BadRequestError) as bad:
            openai_client.chat.completions.create(model=model_name, messages=CHAT, temperature=-1)
        assert "temperature" in bad.value.message
        with (
            pytest.raises(openai.BadRequestError),
            openai_client.completions.create(model=model_name, prompt="x " * 4000, stream=True) as stream,
        ):
            list(stream)

    async def test_async_requests_side_by_side(self, openai_async_client: openai.AsyncOpenAI, model_name: str) -> None:
        async def whole(prompt: str) -> str:
            answer = await openai_async_client.completions.create(
                model=model_name, prompt=prompt, max_tokens=OUTPUT_TOKENS, temperature=0, extra_body=IGNORE_EOS
            )
            return answer.choices[0].text

        async def streamed(prompt: str) -> str:
            async with await openai_async_client.completions.create(
                model=model_name,
                prompt=prompt,
                max_tokens=OUTPUT_TOKENS,
                temperature=0,
                stream=True,
                extra_body=IGNORE_EOS,
            ) as stream:
                return "".join([chunk.choices[0].text async for chunk in stream])

        prompts = [f"{PROMPT}    print({i})\n" for i in range(8)]
        one_by_one = [await whole(prompt) for prompt in prompts]
        assert len(set(one_by_one)) > 1, "the prompts cannot be told apart by their answers"
        assert await asyncio.gather(*map(streamed, prompts)) == one_by_one
        assert await asyncio.gather(*map(whole, prompts)) == one_by_one

    async def test_async_client_may_leave_a_stream(
        self, openai_async_client: openai.AsyncOpenAI, model_name: str
    ) -> None:
        stream = await openai_async_client.chat.completions.create(
            model=model_name, messages=CHAT, max_completion_tokens=1500, stream=True, extra_body=IGNORE_EOS
        )
        async with stream:
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    break
        answer = await openai_async_client.chat.completions.create(
            model=model_name, messages=CHAT, max_completion_tokens=4
        )
        assert answer.choices[0].finish_reason in ("length", "stop")


class TestAnthropic:
    MESSAGES: list[anthropic.types.MessageParam] = [{"role": "user", "content": "import os"}]  # noqa: RUF012

    def test_message_stream_and_whole_answer_agree(
        self, anthropic_client: anthropic.Anthropic, model_name: str, served_requests: Callable[[], int]
    ) -> None:
        before = served_requests()
        whole = anthropic_client.messages.create(
            model=model_name,
            messages=self.MESSAGES,
            max_tokens=OUTPUT_TOKENS,
            extra_body=GREEDY_TO_THE_END,
        )
        assert (whole.type, whole.role, whole.model) == ("message", "assistant", model_name)
        assert whole.stop_reason == "max_tokens"
        assert whole.usage.output_tokens == OUTPUT_TOKENS
        text = _text(whole)
        assert text

        with anthropic_client.messages.stream(
            model=model_name,
            messages=self.MESSAGES,
            max_tokens=OUTPUT_TOKENS,
            extra_body=GREEDY_TO_THE_END,
        ) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        assert "".join(pieces) == text == _text(final)
        assert len(pieces) > OUTPUT_TOKENS // 3, "the answer came in few pieces"
        assert final.stop_reason == "max_tokens"
        assert final.usage.output_tokens == OUTPUT_TOKENS
        assert served_requests() == before + 2

    def test_raw_event_order(self, anthropic_client: anthropic.Anthropic, model_name: str) -> None:
        with anthropic_client.messages.create(
            model=model_name, messages=self.MESSAGES, max_tokens=8, stream=True, extra_body=IGNORE_EOS
        ) as stream:
            kinds = [event.type for event in stream]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert set(kinds[2:-3]) == {"content_block_delta"}
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]

    def test_system_prompt_and_counted_tokens(self, anthropic_client: anthropic.Anthropic, model_name: str) -> None:
        counted = anthropic_client.messages.count_tokens(model=model_name, messages=self.MESSAGES)
        answer = anthropic_client.messages.create(model=model_name, messages=self.MESSAGES, max_tokens=2)
        assert answer.usage.input_tokens == counted.input_tokens
        longer = anthropic_client.messages.create(
            model=model_name, system="import sys", messages=self.MESSAGES, max_tokens=2
        )
        assert longer.usage.input_tokens > counted.input_tokens

    def test_errors_are_the_sdks_own(self, anthropic_client: anthropic.Anthropic, model_name: str) -> None:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            anthropic_client.messages.create(model=UNKNOWN_MODEL, messages=self.MESSAGES, max_tokens=4)
        body = unknown.value.body
        assert isinstance(body, dict)
        assert body["type"] == "error"
        assert UNKNOWN_MODEL in body["error"]["message"]
        with pytest.raises(anthropic.BadRequestError):
            anthropic_client.messages.create(
                model=model_name, messages=self.MESSAGES, max_tokens=4, extra_body={"temperature": -1}
            )

    async def test_async_messages_side_by_side(
        self, anthropic_async_client: anthropic.AsyncAnthropic, model_name: str
    ) -> None:
        async def whole() -> str:
            return _text(
                await anthropic_async_client.messages.create(
                    model=model_name, messages=self.MESSAGES, max_tokens=OUTPUT_TOKENS, extra_body=GREEDY
                )
            )

        async def streamed() -> str:
            async with anthropic_async_client.messages.stream(
                model=model_name, messages=self.MESSAGES, max_tokens=OUTPUT_TOKENS, extra_body=GREEDY
            ) as stream:
                return "".join([piece async for piece in stream.text_stream])

        answers = await asyncio.gather(*(make() for make in (whole, streamed) for _ in range(4)))
        assert len(answers) == 8
        assert len(set(answers)) == 1


@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")]
)
def test_vllm_benchmark(
    backend: str,
    endpoint: str,
    vllm_venv: Path,
    service_url: str,
    model_name: str,
    served_requests: Callable[[], int],
    tmp_path: Path,
) -> None:
    """`vllm bench serve` with streams of fixed length, as its documentation has it."""
    requests, output_tokens = 8, 16
    before = served_requests()
    run_client(
        [
            *(vllm_venv / "bin" / "python", Path(__file__).with_name("bench_serve.py")),
            *("--backend", backend, "--base-url", service_url, "--endpoint", endpoint),
            *("--model", model_name, "--tokenizer", TINY_MODEL),
            *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", str(output_tokens)),
            *("--num-prompts", str(requests), "--max-concurrency", "2", "--ignore-eos", "--seed", "1"),
            *("--save-result", "--save-detailed", "--result-dir", tmp_path, "--result-filename", "result.json"),
        ],
        folder=tmp_path,
        env=offline_env(tmp_path),
        timeout_s=CLIENT_TIMEOUT_S,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (requests, 0)
    assert not any(result["errors"])
    assert result["output_lens"] == [output_tokens] * requests
    assert all(result["generated_texts"])
    assert served_requests() == before + requests


def test_aiperf(
    clients_venv: Path,
    service_url: str,
    model_name: str,
    served_requests: Callable[[], int],
    tmp_path: Path,
) -> None:
    """aiperf, streaming chat, with the model's own tokenizer."""
    requests, output_tokens = 8, 16
    put_in_hub_cache(tmp_path, "twofold/tiny", TINY_MODEL)
    artifacts = tmp_path / "artifacts"
    before = served_requests()
    run_client(
        [
            *(clients_venv / "bin" / "aiperf", "profile", "--ui", "none"),
            *("--url", service_url, "--endpoint-type", "chat", "--streaming"),
            *("--model", model_name, "--tokenizer", "twofold/tiny"),
            *("--request-count", str(requests), "--concurrency", "2", "--random-seed", "1"),
            *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", str(output_tokens)),
            *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"),
            *("--no-gpu-telemetry", "--artifact-dir", artifacts),
        ],
        folder=tmp_path,
        env=offline_env(tmp_path),
        timeout_s=CLIENT_TIMEOUT_S,
    )
    result = json.loads((artifacts / "profile_export_aiperf.json").read_text())
    assert result["request_count"]["avg"] == requests
    assert result["error_summary"] == []
    assert result["was_cancelled"] is False
    completion_tokens = result["usage_completion_tokens"]
    assert (completion_tokens["min"], completion_tokens["max"]) == (output_tokens, output_tokens)
    assert result["time_to_first_token"]["count"] == requests
    assert result["inter_token_latency"]["count"] == requests
    assert served_requests() == before + requests


def _text(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if isinstance(block, TextBlock))
