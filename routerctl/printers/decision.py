"""A routing decision as a table of what was examined, and one plain sentence."""

import math
from collections import Counter

from routerctl.printers.text import Column, Table, duration, listed, moment, number, pairs, priced, printable, render
from twofold.model.reasons import RejectReason, RouteReason, TargetRole
from twofold.v1 import router_pb2

_HOMES = (TargetRole.HOME_A1, TargetRole.HOME_A2, TargetRole.HOME_B1, TargetRole.HOME_B2)

_WHY_CHOSEN = {
    RouteReason.HOME: "the home {role} was the cheapest of the targets examined",
    RouteReason.LAST_STORER: "it last stored the deepest cached block and was the cheapest of the targets examined",
    RouteReason.ESCAPE: "as the target with the least work it beat every home by more than the margin",
    RouteReason.ONLY_TARGET: "it was the only eligible target",
    RouteReason.ROUND_ROBIN: "it was next in turn",
    RouteReason.LEAST_REQUESTS: "it had the fewest requests",
    RouteReason.RETRY: "an earlier target failed before the first byte and this one was the best of the rest",
    RouteReason.PINNED: "the caller named it",
}
_WHY_REJECTED = {
    RejectReason.MODEL_NOT_FOUND: "no pool serves this model",
    RejectReason.NO_ENDPOINTS: "no examined target may take it",
    RejectReason.SATURATED: "every target that may take it is too busy",
    RejectReason.CONTEXT_TOO_LONG: "it does not fit the model's context",
    RejectReason.TTL_EXPIRED: "it waited longer than it may",
    RejectReason.SHUTTING_DOWN: "the router is stopping",
    RejectReason.BAD_REQUEST: "the request is malformed",
}


def explain(decision: router_pb2.Decision, *, past: bool, wide: bool = False) -> str:
    """The whole decision. ``past``: the request was really sent, so an observed time may be there."""
    return "".join(
        (
            pairs(_facts(decision, past=past)),
            "\n",
            render(examined(decision), wide=wide),
            "\n",
            printable(sentence(decision, past=past)),
            "\n",
        )
    )


def examined(decision: router_pb2.Decision) -> Table:
    """Every target looked at, with the parts of its price in seconds."""
    columns = (
        Column(""),
        Column("ROLE"),
        Column("TARGET"),
        Column("CACHED", number=True),
        Column("UNCACHED", number=True),
        Column("OWN S", number=True),
        Column("OWN REF S", number=True),
        Column("WAIT S", number=True),
        Column("PRICE S", number=True),
        Column("NOTE"),
    )
    rows = (
        (
            "*" if target.chosen else " ",
            target.role,
            target.target_id,
            number(target.cached_tokens),
            number(target.uncached_tokens),
            priced(target.own_s),
            priced(target.own_reference_s),
            priced(target.wait_s),
            "" if target.ineligible else priced(target.price_s),
            "chosen" if target.chosen else target.ineligible,
        )
        for target in decision.examined
    )
    return Table(columns=columns, rows=tuple(rows), empty="no target was examined")


def sentence(decision: router_pb2.Decision, *, past: bool) -> str:
    """What happened and why, in one sentence."""
    subject = f"Request {decision.request_id}" if past and decision.request_id else "The request"
    if not decision.target_id:
        return _rejection(decision, f"{subject} {'was' if past else 'would be'} rejected")
    verb = "went" if past else "would go"
    chosen = next((t for t in decision.examined if t.chosen), None)
    if chosen is None:
        return f"{subject} {verb} to {decision.target_id} because {_chosen_because(decision.reason, '')}."
    why = _chosen_because(decision.reason, chosen.role)
    tokens = chosen.cached_tokens + chosen.uncached_tokens
    parts = f"{number(chosen.cached_tokens)} of {number(tokens)} prompt tokens cached"
    parts += f", {duration(chosen.own_s)} of own prefill behind {duration(chosen.wait_s)} of waiting"
    others = [t for t in decision.examined if not t.chosen and not t.ineligible and t.target_id != chosen.target_id]
    text = f"{subject} {verb} to {decision.target_id} because {why}: {parts}, price {priced(chosen.price_s)} s"
    if others:
        best = min(others, key=lambda t: t.price_s if math.isfinite(t.price_s) else math.inf)
        text += f" against {priced(best.price_s)} s for {best.target_id}, the best of the others"
    return text + "."


def _chosen_because(reason: str, role: str) -> str:
    try:
        why = _WHY_CHOSEN[RouteReason(reason)]
    except (ValueError, KeyError):
        return f"the router says {reason or 'nothing'}"
    return why.format(role=role or "target")


def _rejection(decision: router_pb2.Decision, start: str) -> str:
    try:
        why = _WHY_REJECTED[RejectReason(decision.reason)]
    except (ValueError, KeyError):
        why = "the router says so"
    text = f"{start} ({decision.reason or 'no reason given'}) because {why}"
    codes = Counter(target.ineligible or "eligible" for target in decision.examined)
    if codes:
        of_them = listed(f"{count} {code}" for code, count in codes.most_common())
        text += f"; of {len(decision.examined)} examined: {of_them}"
    return text + "."


def _facts(decision: router_pb2.Decision, *, past: bool) -> list[tuple[str, str]]:
    homes = [f"{t.role} {t.target_id}" for t in decision.examined if t.role in _HOMES]
    key = f"{decision.ring_key} (depth {decision.key_depth} chunks)" if decision.ring_key else ""
    facts = [
        ("Request", decision.request_id if past else "hypothetical, not sent"),
        ("Decided by", f"router {decision.replica_id}, relay {decision.relay}" if past else decision.replica_id),
        ("At", moment(decision.at_s)),
        ("Pool, policy", f"{decision.pool or '-'}, {decision.policy or '-'}"),
        ("Snapshot", f"{decision.snapshot_epoch}/{decision.snapshot_version}"),
        ("Ring key", key),
        ("Ring version", decision.ring_version),
        ("Homes", listed(homes)),
        ("Prompt", f"{number(decision.prompt_tokens)} tokens"),
        ("Predicted TTFT", duration(decision.predicted_ttft_s) if decision.target_id else ""),
    ]
    if past:
        observed = decision.observed_ttft_s
        facts.append(("Observed TTFT", duration(observed) if observed > 0 else "not known"))
    return facts
