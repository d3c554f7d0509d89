"""Request headers that carry routing facts, under every name that clients of other routers already send.

Names are lower case. The first name present wins.
"""

SESSION: tuple[bytes, ...] = (
    b"x-session-id",
    b"x-session-token",
    b"x-smg-routing-key",
    b"x-claude-code-session-id",
    b"x-session-affinity",
    b"session-id",
    b"thread-id",
)
OBJECTIVE: tuple[bytes, ...] = (b"x-llm-d-inference-objective", b"x-gateway-inference-objective")
FAIRNESS: tuple[bytes, ...] = (b"x-llm-d-inference-fairness-id", b"x-gateway-inference-fairness-id")
SLO_TTFT_MS: tuple[bytes, ...] = (b"x-llm-d-slo-ttft-ms", b"x-slo-ttft-ms")
SLO_TPOT_MS: tuple[bytes, ...] = (b"x-llm-d-slo-tpot-ms", b"x-slo-tpot-ms")
PRIORITY: tuple[bytes, ...] = (b"x-vllm-priority",)
DATA_PARALLEL_RANK: tuple[bytes, ...] = (b"x-data-parallel-rank",)
REQUEST_ID: tuple[bytes, ...] = (b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id")
"""The relay's concern; listed here so that one file knows all names."""
