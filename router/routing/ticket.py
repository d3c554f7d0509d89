"""A request on the accounts, from dispatch to its end: the relay tells it what happens, it keeps the books right."""

from router.routing.accounts import AccountsWriter, Entry
from router.routing.prefix import scheduled_hashes
from router.routing.prefix_table import PrefixWriter
from router.routing.state import TargetState
from router.routing.types import Decision, RequestFeatures

_TELLING_TOKENS = 512
"""Uncached tokens from which a prefill time says something about the engine's speed."""


class Ticket(Entry):
    """Returned by ``LiveFleet.account``. Every method may be called at any time, in any order, any number of times."""

    __slots__ = ("_decision", "_entered", "_prefixes", "_request", "_state", "_writer")

    def __init__(
        self,
        writer: AccountsWriter,
        prefixes: PrefixWriter,
        slot: int,
        request: RequestFeatures,
        decision: Decision,
        state: TargetState | None,
        entered: int,
        now_s: float,
    ) -> None:
        super().__init__(slot, decision.uncached_tokens, decision.prompt_tokens, decision.own_s, now_s)
        self._writer = writer
        self._prefixes = prefixes
        self._request = request
        self._decision = decision
        self._state = state
        self._entered = entered
        writer.enter(self)

    @property
    def assume_first_token_at_s(self) -> float:
        """When to call ``assume_first_token`` for a request that shows none (not streamed): as predicted."""
        return self.sent_s + self._decision.predicted_ttft_s

    @property
    def dispatched_prefix(self) -> bool:
        """Whether the dispatch was entered as a cached prefix of its target."""
        return self._state is not None and bool(self._request.chain)

    @property
    def finished(self) -> bool:
        """Whether ``finish`` was called."""
        return self.done

    def first_token(self, now_s: float) -> None:
        """The first output token came: prefill is over. Also corrects the target's speed where this tells it."""
        if self.done or self.decoding:
            return
        self._writer.first_token(self, now_s)
        self._learn(now_s - self.sent_s)

    def assume_first_token(self, now_s: float) -> None:
        """Prefill is taken to be over by now, though nothing was seen: moves the request from queued to decoding."""
        self._writer.first_token(self, now_s)

    def tokens(self, count: int) -> None:
        """``count`` more output tokens came."""
        self._writer.tokens(self, count)

    def finish(self, now_s: float, failed: bool = False) -> None:
        """The request is over on this target, for whatever reason. A failure before the first token takes back what
        was entered as cached: the target most likely never saw the prompt."""
        if self.done:
            return
        never_ran = failed and not self.decoding
        self._writer.finish(self)
        if never_ran and self._state is not None and self._request.chain:
            hashes = scheduled_hashes(self._request.chain)
            self._prefixes.forget(self._state.salt, hashes, self._entered, self.sent_s)

    def _learn(self, observed_s: float) -> None:
        """Only a cold, long prefill on a target that did little else is evidence of its speed."""
        decision, state = self._decision, self._state
        if state is None or decision.uncached_tokens < _TELLING_TOKENS or observed_s <= 0:
            return
        if 4 * decision.cached_tokens > decision.prompt_tokens:
            return
        wait_s = decision.predicted_ttft_s - decision.own_s
        if wait_s > 0.5 * decision.own_s or decision.own_s <= 0:
            return
        chosen = decision.chosen
        correction = chosen.correction if chosen else 1.0
        state.correct(observed_s * correction / decision.predicted_ttft_s)
