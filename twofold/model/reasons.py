"""Reason codes. The same code appears in decisions, logs, metrics, response headers, status and the CLI."""

import enum


class RouteReason(enum.StrEnum):
    """Why a target was chosen."""

    HOME = "home"
    """A home target was cheapest."""
    LAST_STORER = "last-storer"
    """The target that last stored the deepest cached block was cheapest."""
    ESCAPE = "escape"
    """The least-work target beat every home by the margin."""
    ONLY_TARGET = "only-target"
    """One eligible target, nothing to choose."""
    ROUND_ROBIN = "round-robin"
    LEAST_REQUESTS = "least-requests"
    RETRY = "retry"
    """Chosen after an earlier target failed before the first byte."""
    PINNED = "pinned"
    """The caller named the target (data-parallel rank header, administrator)."""


class TargetRole(enum.StrEnum):
    """Why a target was examined."""

    HOME_A1 = "home-a1"
    HOME_A2 = "home-a2"
    HOME_B1 = "home-b1"
    HOME_B2 = "home-b2"
    LAST_STORER = "last-storer"
    ESCAPE = "escape"
    SCAN = "scan"
    """Examined by a policy that looks at every target."""


class Ineligible(enum.StrEnum):
    """Why an examined target may not take the request."""

    NONE = ""
    UNHEALTHY = "unhealthy"
    CORDONED = "cordoned"
    DRAINING = "draining"
    CIRCUIT_OPEN = "circuit-open"
    EXCLUDED = "excluded"
    """Already tried by this request."""
    CONTEXT_TOO_LONG = "context-too-long"
    ADAPTER_MISSING = "adapter-missing"
    SATURATED = "saturated"
    """At its bound of concurrent requests."""
    UNKNOWN = "unknown"
    """Not in this router's snapshot."""


class RejectReason(enum.StrEnum):
    """Why the router answered a request itself with an error; value of the ``x-twofold-reason`` header."""

    BAD_REQUEST = "bad-request"
    BAD_HEAD = "bad-head"
    HEAD_TOO_LARGE = "head-too-large"
    BODY_TOO_LARGE = "body-too-large"
    LENGTH_REQUIRED = "length-required"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    MODEL_NOT_FOUND = "model-not-found"
    NO_ENDPOINTS = "rejected-no-endpoints"
    SATURATED = "rejected-saturated"
    TTL_EXPIRED = "rejected-ttl-expired"
    SHUTTING_DOWN = "rejected-shutting-down"
    CONTEXT_TOO_LONG = "context-too-long"
    UPSTREAM_FAILED = "upstream-failed"
    UPSTREAM_TIMEOUT = "upstream-timeout"
    UPSTREAM_STALLED = "upstream-stalled"
    CLIENT_TIMEOUT = "client-timeout"
    INTERNAL = "internal"


class TargetCondition(enum.StrEnum):
    """Conditions on a target, visible in ``routerctl describe`` and in metrics."""

    BLOCK_SIZE_MISMATCH = "block-size-mismatch"
    HASH_ALGORITHM_MISMATCH = "hash-algorithm-mismatch"
    TOKENIZER_MISMATCH = "tokenizer-mismatch"
    MODEL_LENGTH_MISMATCH = "model-length-mismatch"
    MODEL_MISSING = "model-missing"
    """The engine answers but does not serve the pool's model."""
    PROBE_FAILING = "probe-failing"
    STALLED = "stalled"
    """Health says 200 but requests run and no iteration completes."""
    RECONFIGURING = "reconfiguring"
    """503 on every path while an MoE engine scales."""
    UNREACHABLE_BY_ROUTERS = "unreachable-by-routers"
    COUNTERS_RESET = "counters-reset"
