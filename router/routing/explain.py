"""A decision as text, for people."""

from router.routing.types import Decision, ExaminedTarget


def render(decision: Decision) -> str:
    """Several lines: the outcome, the ring key, and each examined target with the parts of its price."""
    lines = [_outcome(decision)]
    if decision.key:
        covers = f"{decision.key_depth} chunks of the prompt" if decision.key_depth else "this request or session alone"
        lines.append(f"ring key   {decision.key:016x} ({covers}), rings {decision.ring_version or 'none'}")
    lines.append(
        f"prompt     {decision.prompt_tokens} tokens: {decision.cached_tokens} cached, "
        f"{decision.uncached_tokens} to compute"
    )
    if decision.slot is not None:
        lines.append(
            f"predicted  TTFT {decision.predicted_ttft_s:.3f} s ({_met(decision.slo_ttft_met)}), "
            f"TPOT {decision.predicted_tpot_s * 1e3:.1f} ms + {decision.tpot_effect_s * 1e3:.1f} ms for its neighbours "
            f"({_met(decision.slo_tpot_met)})"
        )
    if decision.examined:
        width = max(len(candidate.target_id) for candidate in decision.examined)
        lines.append("examined:")
        lines.extend(_examined(candidate, width, decision.slot) for candidate in decision.examined)
    return "\n".join(lines)


def _outcome(decision: Decision) -> str:
    if decision.slot is None:
        again = f", retry after {decision.retry_after_s:.0f} s" if decision.retry_after_s else ""
        return f"request {decision.request_id} for pool {decision.pool}: rejected, {decision.reason}{again}"
    return (
        f"request {decision.request_id} for pool {decision.pool}: {decision.target_id} "
        f"({decision.reason}, policy {decision.policy})"
    )


def _met(met: bool) -> str:
    return "within SLO" if met else "misses SLO"


def _examined(candidate: ExaminedTarget, width: int, chosen: int | None) -> str:
    mark = "*" if candidate.slot == chosen else " "
    head = f" {mark} {candidate.target_id:<{width}}  {candidate.role:<8}"
    if candidate.ineligible:
        return f"{head}  not eligible: {candidate.ineligible}"
    text = (
        f"{head}  price {candidate.price_s:.3f} s: own {candidate.own_s:.3f}, "
        f"own at reference speed {candidate.own_reference_s:.3f}, wait {candidate.wait_s:.3f}"
    )
    if candidate.margin_s:
        text += f", margin {candidate.margin_s:.3f}"
    text += f"; {candidate.cached_tokens} cached, {candidate.uncached_tokens} to compute"
    if abs(candidate.correction - 1.0) >= 0.005:
        text += f"; speed corrected x{candidate.correction:.2f}"
    return text
