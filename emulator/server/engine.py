"""An engine model on the real clock: steps, delivers tokens when they are due, measures how late it was."""

import enum
import logging
from collections.abc import Callable
from typing import Protocol

from emulator.model import EngineModel, FinishReason, KvEvent, Pause, Request, StepResult
from emulator.server.faults import Faults, TokenFault, other_output_id
from emulator.server.metrics import EngineMetrics, Siblings
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


class PauseMode(enum.StrEnum):
    """What a pause does to the requests there are: end them, let them finish, or freeze them."""

    ABORT = "abort"
    WAIT = "wait"
    KEEP = "keep"


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
        self.on_events: Callable[[list[KvEvent]], None] | None = None
        """Takes the KV events of each step that has any, just before its tokens go out."""
        self.steps_resynced = 0
        self.stream_interval_tokens = 1
        """Tokens that a stream's event waits for; its first and its last do not wait."""
        self._timer = timer
        self._clock = clock
        self._call_soon = call_soon
        self._sinks: dict[str, tuple[Sink, Siblings | None]] = {}
        self._last_token_s: dict[str, float] = {}
        self._stepping = False
        self._stopped = False
        self._held: tuple[StepResult, float] | None = None
        self._when_idle: list[Callable[[], None]] = []

    @property
    def now_s(self) -> float:
        """The engine's clock."""
        return self._clock()

    @property
    def busy(self) -> bool:
        """Whether requests are unfinished or tokens undelivered."""
        return self._stepping or self.model.has_work

    @property
    def unfinished(self) -> int:
        """Requests whose end nobody has been told."""
        return len(self._sinks)

    @property
    def prefilling_tokens(self) -> int:
        """Prompt tokens of the requests without a token yet."""
        waiting = [self.model.get(request_id) for request_id in self._sinks if request_id not in self._last_token_s]
        return sum(request.prompt_tokens for request in waiting if request is not None)

    def submit(self, request: Request, sink: Sink, siblings: Siblings | None = None) -> None:
        """Queue a request; its tokens go to ``sink``. ``siblings``: the choices of one prompt, where there are more."""
        busy = bool(self.model.running)
        request.ready_s = request.arrival_s + self.model.profile.overhead_s(request.prompt_tokens, busy=busy)
        self.model.add(request)
        self._sinks[request.request_id] = (sink, siblings)
        self._start()

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End a request now; its sink hears nothing more. Only a stop string counts as an end by the engine."""
        self._last_token_s.pop(request_id, None)
        entry = self._sinks.pop(request_id, None)
        request = self.model.finish(request_id, reason)
        if request is not None and entry is not None:
            if reason is FinishReason.STOP:
                self.metrics.observe_finished(request, self._clock(), entry[1])
            else:
                self.metrics.forget(request)
        return request

    def abort(self, request_id: str) -> bool:
        """End a request by the abort call: its sink gets the reason "abort". False if there is no such request."""
        entry = self._sinks.get(request_id)
        if entry is None or self.model.get(request_id) is None:
            return False  # unknown, or its last token is on its way
        request = self.finish(request_id, FinishReason.ABORT)
        if request is not None:
            entry[0].token(-1, request)
        return True

    def abort_all(self) -> None:
        """The engine itself ends every request with the reason "abort", and counts them as ended by it."""
        now_s = self._clock()
        for request_id, (sink, siblings) in list(self._sinks.items()):
            request = self.model.finish(request_id, FinishReason.ABORT)
            if request is None:
                continue  # its last token is on its way
            self._sinks.pop(request_id, None)
            self._last_token_s.pop(request_id, None)
            self.metrics.observe_finished(request, now_s, siblings)
            sink.token(-1, request)

    def pause(self, mode: PauseMode, *, clear_cache: bool, done: Callable[[], None]) -> None:
        """Stop admitting requests, or with KEEP scheduling any; ``done`` is called once nothing runs.

        ``clear_cache``: forget the prefix cache then; frozen requests are preempted for that, as in vLLM 0.32.
        """
        if mode is PauseMode.ABORT:
            self.abort_all()
        self.model.paused = Pause.ALL if mode is PauseMode.KEEP else Pause.NEW

        def idle() -> None:
            if clear_cache:
                self.model.reset_prefix_cache(preempt=True)
            done()

        if self.busy:
            self._when_idle.append(idle)
        else:
            idle()

    def resume(self) -> None:
        """End a pause; frozen requests go on, queued ones start."""
        self.model.paused = Pause.NONE
        self._start()

    @property
    def paused(self) -> bool:
        """Whether the engine is paused in any way."""
        return self.model.paused is not Pause.NONE

    def stop(self) -> None:
        """Deliver nothing more: running requests fall silent."""
        self._stopped = True

    def kill(self) -> None:
        """The engine core dies: every sink is told, nothing runs any more."""
        self.dead = self._stopped = True
        sinks = [sink for sink, _ in self._sinks.values()]
        self._sinks.clear()
        self._last_token_s.clear()
        self._when_idle.clear()
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
            self.metrics.forget(request)
        self.model.reset_prefix_cache()
        self.metrics.reset_lateness()
        self.steps_resynced = 0

    def _start(self) -> None:
        if not self._stepping and not self._stopped and self.model.has_work:
            self._stepping = True
            self._call_soon(self._wake)

    def _wake(self) -> None:
        self._begin(self._clock())

    def _begin(self, start_s: float) -> None:
        if self._stopped or not self.model.has_work:
            self._stepping = False
            if not self._stopped:
                self._became_idle()
            return
        ready_s = self.model.idle_until_s(start_s)
        if ready_s is not None:
            self._timer.call_at(ready_s, lambda: self._begin(ready_s))
            return
        result = self.model.step(start_s)
        due_s = start_s + result.duration_s * self.faults.slow_factor
        self._timer.call_at(due_s, lambda: self._complete(result, due_s))

    def _became_idle(self) -> None:
        if self.model.paused is not Pause.ALL:
            self.metrics.load = self.model.load
        callbacks, self._when_idle = self._when_idle, []
        for callback in callbacks:
            callback()
        self.on_idle()

    def _complete(self, result: StepResult, due_s: float) -> None:
        if self._stopped:
            self._stepping = False
            return
        if self.faults.hang:
            self._held = (result, due_s)
            return
        if result.events and self.on_events is not None:
            self.on_events(result.events)
        self._deliver(result, due_s)
        now_s = self._clock()
        late_s = now_s - due_s
        if result.tokens:
            self.metrics.observe_lateness(late_s, result.duration_s)
        if late_s > RESYNC_AFTER_S:
            self.steps_resynced += 1
            due_s = now_s
        if not self._stopped:
            self.metrics.observe_step(result)
            self._begin(due_s)

    def _deliver(self, result: StepResult, due_s: float) -> None:
        metrics, sinks, last = self.metrics, self._sinks, self._last_token_s
        faults = self.faults
        delivered = 0
        for request, token in result.tokens:
            entry = sinks.get(request.request_id)
            if entry is None:
                continue
            delivered += 1
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
        if delivered:
            metrics.observe_iteration(delivered)

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
