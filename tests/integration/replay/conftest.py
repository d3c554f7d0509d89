"""An OpenAI-compatible server of the built-in tokenizer, in this process, with faults to order."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from emulator.tokens import TokenChain, chat_prompt_ids, decode, encode

Mangle = Callable[[int, list[str]], list[str]]


class FakeOpenAI:
    """Answers at once. ``mangle(request number, tokens)`` may change what is delivered; ``status`` breaks it."""

    def __init__(self) -> None:
        self.url = ""
        self.mangle: Mangle = lambda _number, tokens: tokens
        self.status = 200
        self.cut_after: int | None = None
        self.usage_extra = 0
        self.finish_reason = "length"
        self.error_event = False
        self.cached_tokens: int | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.requests: list[dict[str, Any]] = []
        self.request_ids: list[str] = []
        self.authorizations: list[str] = []
        self.prompts: list[list[int]] = []
        self.metrics = ""
        self.stats: dict[str, Any] = {}
        self.faults: list[dict[str, Any]] = []

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/stats", self._stats)
        app.router.add_post("/faults", self._faults)
        app.router.add_delete("/faults", self._faults)
        return app

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _stats(self, _request: web.Request) -> web.Response:
        return web.json_response(self.stats)

    async def _faults(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            self.faults.append(await request.json())
        return web.json_response({})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self._answer(request, body, encode(body["prompt"]), lambda text: {"text": text})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        ids = chat_prompt_ids(body["messages"], body.get("tools"))
        return await self._answer(request, body, ids, lambda text: {"delta": {"content": text}})

    async def _answer(
        self, request: web.Request, body: dict[str, Any], ids: list[int], choice: Callable[[str], dict[str, Any]]
    ) -> web.StreamResponse:
        number = len(self.requests)
        self.requests.append(body)
        self.authorizations.append(request.headers.get("authorization", ""))
        self.request_ids.append(request.headers.get("x-request-id", ""))
        self.prompts.append(ids)
        await self.hold.wait()
        if self.status != 200:
            headers = {"x-twofold-reason": "rejected-saturated"}
            return web.json_response({"error": {"message": "no"}}, status=self.status, headers=headers)
        chain = TokenChain(ids)
        tokens = self.mangle(number, [decode([chain.next()]) for _ in range(body["max_tokens"])])
        usage: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": len(tokens) + self.usage_extra}
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        if not body.get("stream"):
            message = {"finish_reason": self.finish_reason, "index": 0} | choice("".join(tokens))
            if "delta" in message:
                message["message"] = message.pop("delta")
            return web.json_response({"choices": [message], "usage": usage})
        response = web.StreamResponse(
            headers={"content-type": "text/event-stream", "x-twofold-worker": f"w{number % 2}"}
        )
        await response.prepare(request)

        async def event(value: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")

        if "messages" in body:
            await event(
                {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
            )
        for index, token in enumerate(tokens):
            if self.cut_after is not None and index >= self.cut_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            last = index == len(tokens) - 1
            await event(
                {"choices": [choice(token) | {"index": 0, "finish_reason": self.finish_reason if last else None}]}
            )
        if self.error_event:
            await event({"error": {"message": "engine died", "code": 500}})
        await event({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAI]:
    """A running server; ``fake.url`` is its base URL."""
    server = FakeOpenAI()
    runner = web.AppRunner(server.app(), shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    server.hold.set()
    await runner.cleanup()
