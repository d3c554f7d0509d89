"""What people are told of a decision."""

from support.routing import live_fleets, request, snapshot, target

from router.routing.explain import render
from twofold.model.fleet import RoutingPolicy


def test_a_choice_is_told_with_its_key_its_candidates_and_the_parts_of_their_prices() -> None:
    live = live_fleets(snapshot([target(i, cordoned=i == 3) for i in range(4)]))[0]
    for _ in range(40):
        live.correct(0, 1.0, 2.0)
    decision = live.decide(request((0xABC, 2)), 0.0)
    text = render(decision)
    lines = text.splitlines()
    assert lines[0] == f"request r for pool p: {decision.target_id} (home, policy twofold)"
    assert "0000000000000abc (1 chunks of the prompt)" in lines[1]
    assert decision.ring_version in lines[1]
    assert "552 tokens: 0 cached, 552 to compute" in lines[2]
    assert "within SLO" in lines[3]
    told = {line.split()[1 if line.startswith(" *") else 0]: line for line in lines[5:]}
    assert sorted(told) == ["w0000", "w0001", "w0002", "w0003"]
    assert [name for name, line in told.items() if line.startswith(" *")] == [decision.target_id]
    assert told["w0003"].endswith("not eligible: cordoned")
    assert "speed corrected x1." in told["w0000"]
    chosen = decision.chosen
    assert f"price {chosen.price_s:.3f} s: own {chosen.own_s:.3f}" in told[decision.target_id]


def test_a_rejection_says_why_and_when_to_come_again() -> None:
    live = live_fleets(snapshot([target(0, cordoned=True)]))[0]
    text = render(live.decide(request(), 0.0))
    assert text.startswith("request r for pool p: rejected, rejected-no-endpoints, retry after 5 s")


def test_policies_without_a_key_tell_none() -> None:
    live = live_fleets(snapshot([target(0)], RoutingPolicy(name="round_robin")))[0]
    text = render(live.decide(request(), 0.0))
    assert "ring key" not in text
    assert "(round-robin, policy round_robin)" in text
