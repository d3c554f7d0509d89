"""An engine model on the real clock: steps, delivers tokens when they are due, measures how late it was."""

import logging
from collections.abc import Callable
from typing import Protocol

from emulator.model import EngineModel, FinishReason, Request, StepResult
from emulator.server.faults import Faults, TokenFault, other_output_id
from emulator.server.metrics import EngineMetrics
from emulator.server.timer import PreciseTimer

log = logging.getLogger(__name__)

RESYNC_AFTER_S = 0.05
"""An engine that is further behind than this gives the lost time up instead of catching up."""


class Sink(Protocol):
    """Where the tokens of one engine request go."""

    def token(self, token_id: int, request: Request) -> None:
        """One more token; ``request.finish_reason`` is set with the last."""

    def died(self) -> None:
        """The engine core died."""


class RealTimeEngine:
    """Runs an ``EngineModel`` step by step. Nothing is scheduled while there is no work."""

    def __init__(
        self,
        model: EngineModel,
        metrics: EngineMetrics,
        timer: PreciseTimer,
        clock: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self.model = model
        self.metrics = metrics
        self.faults = Faults()
        self.dead = False
        self.on_death: Callable[[str], None] = lambda mode: None
        self.on_idle: Callable[[], None] = lambda: None
        self.steps_resynced = 0
        self.stream_interval_tokens = 1
        """Tokens that a stream's event waits for; its first and its last do not wait."""
        self._timer = timer
        self._clock = clock
        self._call_soon = call_soon
        self._sinks: dict[str, tuple[Sink, int]] = {}
        self._last_token_s: dict[str, float] = {}
        self._stepping = False
        self._stopped = False
        self._held: tuple[StepResult, float] | None = None

    @property
    def now_s(self) -> float:
        """The engine's clock."""
        return self._clock()

    @property
    def busy(self) -> bool:
        """Whether requests are unfinished or tokens undelivered."""
        return self._stepping or self.model.has_work

    def submit(self, request: Request, sink: Sink, n: int = 1) -> None:
        """Queue a request; its tokens go to ``sink``. ``n``: completions asked for, for the metrics."""
        self.model.add(request)
        self._sinks[request.request_id] = (sink, n)
        if not self._stepping and not self._stopped:
            self._stepping = True
            self._call_soon(self._wake)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End a request now; its sink hears nothing more. Only a stop string counts as an end by the engine."""
        self._last_token_s.pop(request_id, None)
        entry = self._sinks.pop(request_id, None)
        request = self.model.finish(request_id, reason)
        if request is not None and entry is not None and reason is FinishReason.STOP:
            self.metrics.observe_finished(request, self._clock(), entry[1])
        return request

    def abort(self, request_id: str) -> bool:
        """End a request by the abort call: its sink gets the reason "abort". False if there is no such request."""
        entry = self._sinks.get(request_id)
        request = self.finish(request_id, FinishReason.ABORT)
        if request is None or entry is None:
            return False
        entry[0].token(-1, request)
        return True

    def stop(self) -> None:
        """Deliver nothing more: running requests fall silent."""
        self._stopped = True

    def kill(self) -> None:
        """The engine core dies: every sink is told, nothing runs any more."""
        self.dead = self._stopped = True
        sinks = [sink for sink, _ in self._sinks.values()]
        self._sinks.clear()
        self._last_token_s.clear()
        for request in self.model.unfinished():
            self.model.finish(request.request_id, FinishReason.ERROR)
        for sink in sinks:
            sink.died()

    def set_faults(self, faults: Faults) -> None:
        """Put other faults in force; a hung engine that no longer hangs goes on where it stood."""
        self.faults = faults
        if not faults.hang and self._held is not None:
            result, due_s = self._held
            self._held = None
            self._complete(result, due_s)

    def reset(self) -> None:
        """Drop all requests without a word, the prefix cache and the lateness figures."""
        self._sinks.clear()
        self._last_token_s.clear()
        for request in self.model.unfinished():
            self.model.finish(request.request_id, FinishReason.ABORT)
        self.model.reset_prefix_cache()
        self.metrics.reset_lateness()
        self.steps_resynced = 0

    def _wake(self) -> None:
        self._begin(self._clock())

    def _begin(self, start_s: float) -> None:
        if self._stopped or not self.model.has_work:
            self._stepping = False
            if not self._stopped:
                self.metrics.observe_idle()
                self.on_idle()
            return
        result = self.model.step(start_s)
        self.metrics.observe_step(result)
        due_s = start_s + result.duration_s * self.faults.slow_factor
        self._timer.call_at(due_s, lambda: self._complete(result, due_s))

    def _complete(self, result: StepResult, due_s: float) -> None:
        if self._stopped:
            self._stepping = False
            return
        if self.faults.hang:
            self._held = (result, due_s)
            return
        self._deliver(result, due_s)
        now_s = self._clock()
        late_s = now_s - due_s
        if result.tokens:
            self.metrics.observe_lateness(late_s, result.duration_s)
        if late_s > RESYNC_AFTER_S:
            self.steps_resynced += 1
            due_s = now_s
        if not self._stopped:
            self._begin(due_s)

    def _deliver(self, result: StepResult, due_s: float) -> None:
        metrics, sinks, last = self.metrics, self._sinks, self._last_token_s
        faults = self.faults
        for request, token in result.tokens:
            entry = sinks.get(request.request_id)
            if entry is None:
                continue
            metrics.observe_token(request, due_s, last.get(request.request_id))
            if request.finish_reason is None:
                last[request.request_id] = due_s
            else:
                del sinks[request.request_id]
                last.pop(request.request_id, None)
                metrics.observe_finished(request, due_s, entry[1])
            if faults.armed:
                self._deliver_faulty(entry[0], token, request)
                if self.dead:
                    return
            else:
                entry[0].token(token, request)

    def _deliver_faulty(self, sink: Sink, token: int, request: Request) -> None:
        fault = self.faults.next_token(request.finish_reason is not None)
        if fault is TokenFault.DIE:
            log.warning("fault: the engine dies", extra={"mode": self.faults.die_mode})
            self.dead = self._stopped = True
            self.on_death(self.faults.die_mode)
            return
        if fault is TokenFault.DROP:
            return
        sink.token(other_output_id(token) if fault is TokenFault.CORRUPT else token, request)
        if fault is TokenFault.DOUBLE:
            sink.token(token, request)
