"""Decisions where engines report their caches: exact prefixes instead of estimates, and the last storer."""

from collections.abc import Sequence

from support.routing import NOW, chain_of, one_live, request, serve, snapshot, target

from router.routing.policies.twofold import _HOME_ROLES
from twofold.model.reasons import RouteReason, TargetRole


class Caches:
    """What engines report: by slot the leading blocks of any chain, and who stored last."""

    def __init__(self, leading: dict[int, int], last: int | None) -> None:
        self.leading = leading
        self.last = last
        self.exact = True

    def leading_blocks(self, slot: int, hashes: Sequence[int]) -> int:
        return min(self.leading.get(slot, -1), len(hashes))

    def is_exact(self, slot: int) -> bool:
        return self.exact

    def last_storer(self, hashes: Sequence[int]) -> tuple[int, int] | None:
        return None if self.last is None else (self.last, self.leading[self.last])


def test_what_an_engine_reports_replaces_the_estimate_and_the_last_storer_is_examined() -> None:
    live = one_live(snapshot([target(i) for i in range(20)]))
    chain = chain_of(3, 20)
    first = serve(live, request(chain))
    asked = request(chain, block_hashes=chain_of(4, 320))
    assert live.decide(asked, NOW).cached_tokens == 20 * 256, "nobody reports: the estimate counts"
    homes = {seen.slot for seen in live.decide(asked, NOW).examined}
    elsewhere = min(set(range(20)) - homes)
    live.kv = Caches({first.slot: 100, elsewhere: 300}, elsewhere)
    decision = live.decide(asked, NOW)
    assert (decision.slot, decision.reason, decision.cached_tokens) == (elsewhere, RouteReason.LAST_STORER, 300 * 16)
    assert [seen.role for seen in decision.examined[:5]] == [*_HOME_ROLES, TargetRole.LAST_STORER]
    cached = {seen.slot: seen.cached_tokens for seen in decision.examined}
    assert cached[first.slot] == 100 * 16
    assert len(decision.examined) <= 6
    live.kv = Caches({first.slot: 320}, first.slot)
    decision = live.decide(asked, NOW)
    assert (decision.slot, decision.reason) == (first.slot, RouteReason.HOME)
    assert decision.cached_tokens == 20 * 256
    assert live.decide(request(chain), NOW).cached_tokens == 20 * 256, "without block hashes the estimate counts"


def test_a_partial_report_is_a_lower_bound() -> None:
    live = one_live(snapshot([target(0)]))
    chain = chain_of(3, 20)
    serve(live, request(chain))
    asked = request(chain, block_hashes=chain_of(4, 320))
    live.kv = kv = Caches({0: 7}, None)
    assert live.decide(asked, NOW).cached_tokens == 7 * 16
    kv.exact = False
    assert live.decide(asked, NOW).cached_tokens == 20 * 256, "more may be there: what was sent counts too"
    kv.leading[0] = 319
    assert live.decide(asked, NOW).cached_tokens == 20 * 256


def test_a_prompt_that_is_queued_counts_as_cached_before_the_engine_reports_it() -> None:
    live = one_live(snapshot([target(0)]))
    chain = chain_of(3, 20)
    asked = request(chain, block_hashes=chain_of(4, 320))
    live.kv = Caches({0: 0}, None)
    ticket = live.account(asked, live.decide(asked, NOW), NOW)
    assert live.decide(asked, NOW).cached_tokens == 20 * 256
    ticket.first_token(NOW)
    assert live.decide(asked, NOW).cached_tokens == 0, "computed now: what the engine reports counts"
