"""An engine that says what a test wants it to say."""

import asyncio
import json

from aiohttp import web

TOKENS = [1, 2, 3]


class StubEngine:
    """HTTP server with vLLM's probed paths. Change its fields while it runs."""

    def __init__(self, model: str = "m") -> None:
        self.health = 200
        self.scaling = False
        self.running = 0
        self.waiting = 0
        self.iterations = 0
        self.block_size = 16
        self.started_s = 1000.0
        self.models = [model]
        self.tokens = TOKENS
        self.delay_s = 0.0
        self.metrics_body: bytes | None = None
        self.models_body: bytes | None = None
        self.requests: dict[str, int] = {}
        self.in_flight = 0
        self.most_in_flight = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> "StubEngine":
        """Listen."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port or self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        """Stop listening; connections are closed."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path
        self.requests[path] = self.requests.get(path, 0) + 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.scaling:
                text = "The model is currently scaling. Please try again later."
                return web.json_response({"error": text}, status=503)
            return self._body(path)
        finally:
            self.in_flight -= 1

    def _body(self, path: str) -> web.Response:
        if path == "/health":
            return web.Response(status=self.health)
        if path == "/metrics":
            return web.Response(body=self.metrics_body if self.metrics_body is not None else self._metrics())
        if path == "/v1/models":
            data = [{"id": name, "parent": None, "max_model_len": 2048} for name in self.models]
            body = self.models_body if self.models_body is not None else json.dumps({"data": data}).encode()
            return web.Response(body=body, content_type="application/json")
        if path == "/version":
            return web.json_response({"version": "0.32.0"})
        if path == "/tokenize":
            return web.json_response({"tokens": self.tokens})
        return web.Response(status=404)

    def _metrics(self) -> bytes:
        return (
            f'vllm:num_requests_running{{engine="0"}} {self.running}\n'
            f'vllm:num_requests_waiting{{engine="0"}} {self.waiting}\n'
            f'vllm:iteration_tokens_total_count{{engine="0"}} {self.iterations}\n'
            f'vllm:cache_config_info{{block_size="{self.block_size}",engine="0",num_gpu_blocks="100",'
            f'prefix_caching_hash_algo="sha256"}} 1.0\n'
            f"process_start_time_seconds {self.started_s}\n"
        ).encode()
