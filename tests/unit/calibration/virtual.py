"""An emulated engine and the measuring of it in virtual time: seconds pass when nobody has anything left to do."""

import asyncio
import selectors
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from emulator.model import EngineModel, Request
from emulator.server.engine import RealTimeEngine
from emulator.server.metrics import EngineMetrics
from emulator.server.page import PortMetrics
from twofold.calibration.engine import facts_of_metrics, gauges_of_metrics
from twofold.calibration.values import EngineFacts, Gauges, Timing
from twofold.model.profile import EngineProfile

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Lets time jump to the next timer instead of waiting for it."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for something that no timer will bring"
            self.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        # Two times that differ by less count as one: the default lets timers fire early by so much.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._virtual.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class _Timer:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def call_at(self, when_s: float, callback: Any) -> None:
        self._loop.call_at(when_s, callback)


class _Sink:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.events_s: list[float] = []
        self.done: asyncio.Future[None] = loop.create_future()

    def token(self, token_id: int, request: Request) -> None:
        self.events_s.append(self._loop.time())
        if request.finish_reason is not None:
            self.done.set_result(None)

    def died(self) -> None:
        raise AssertionError("the engine died")


class VirtualEngine:
    """What ``twofold.calibration.engine.Engine`` offers, without sockets and without an API server."""

    url = "virtual"

    def __init__(self, profile: EngineProfile) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._profile = profile
        self._model = EngineModel(profile)
        metrics = EngineMetrics(self._model, "tiny")
        self._engine = RealTimeEngine(self._model, metrics, _Timer(loop), loop.time, loop.call_soon)
        self._port = PortMetrics("tiny", [metrics], loop.time)
        self._asked = 0
        self._salt = 0

    async def facts(self) -> EngineFacts:
        return facts_of_metrics(self._page())

    async def gauges(self) -> Gauges:
        return gauges_of_metrics(self._page())

    def prompt(self, tokens: int) -> list[int]:
        self._salt += 1
        return [self._salt % 30_000, *range(1, tokens)][:tokens]

    async def ask(self, prompt: Sequence[int], output_tokens: int, *, timeout_s: float) -> Timing:
        self._asked += 1
        sent_s = self._loop.time()
        sink = _Sink(self._loop)
        request = Request(
            f"r{self._asked}", prompt, output_tokens, arrival_s=sent_s, min_tokens=output_tokens, ignore_eos=True
        )
        self._engine.submit(request, sink)
        async with asyncio.timeout(timeout_s):
            await sink.done
        return Timing(
            sent_s=sent_s,
            events_s=tuple(sink.events_s),
            tokens=len(sink.events_s),
            cached_tokens=request.cached_tokens or 0,
        )

    def _page(self) -> str:
        page = self._port.render()
        return page.decode() if isinstance(page, bytes) else page
