"""The last decisions of a relay, for ``explain``: kept as msgpack bytes, a fraction of the size of the values."""

from collections.abc import Callable

import msgspec

from router.routing.types import Decision, ExaminedTarget
from router.shm.control import ExplainedDecision
from twofold.model.reasons import RejectReason, RouteReason

MAX_PER_REQUEST = 8


class _Entry:
    __slots__ = ("at_s", "encoded", "epoch", "observed_ttft_s", "request_id", "version")

    def __init__(self, request_id: str, encoded: bytes, at_s: float, epoch: int, version: int) -> None:
        self.request_id = request_id
        self.encoded = encoded
        self.at_s = at_s
        self.epoch = epoch
        self.version = version
        self.observed_ttft_s = 0.0


class DecisionLog:
    """A ring of the last ``limit`` decisions. Adding is what happens for every request; finding may take a while."""

    def __init__(self, limit: int, wall_clock: Callable[[], float]) -> None:
        self._limit = max(1, limit)
        self._wall_clock = wall_clock
        self._ring: list[_Entry] = []
        self._next = 0
        self.forgotten = 0
        """Decisions that made room for later ones."""
        self._encode = msgspec.msgpack.Encoder().encode

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, decision: Decision, epoch: int, version: int) -> "_Entry":
        """Remember a decision made on snapshot ``(epoch, version)``; set ``observed_ttft_s`` on what is returned."""
        entry = _Entry(decision.request_id, self._encode(decision), self._wall_clock(), epoch, version)
        ring = self._ring
        if len(ring) < self._limit:
            ring.append(entry)
            return entry
        ring[self._next] = entry
        self._next = (self._next + 1) % self._limit
        self.forgotten += 1
        return entry

    def find(self, request_id: str) -> tuple[ExplainedDecision, ...]:
        """The first decisions on a request, oldest first; empty when it is not remembered."""
        ring = self._ring
        found = [entry for entry in (*ring[self._next :], *ring[: self._next]) if entry.request_id == request_id]
        return tuple(
            ExplainedDecision.of(
                _restore(entry.encoded),
                at_s=entry.at_s,
                observed_ttft_s=entry.observed_ttft_s,
                snapshot_epoch=entry.epoch,
                snapshot_version=entry.version,
            )
            for entry in found[:MAX_PER_REQUEST]
        )


DecisionEntry = _Entry

_REASON = Decision.__struct_fields__.index("reason")
_EXAMINED = Decision.__struct_fields__.index("examined")
_ROUTE_REASONS = {reason.value: reason for reason in RouteReason}


def _restore(encoded: bytes) -> Decision:
    """The decision of ``encoded``. By hand, because its reason is one of two enums of text."""
    fields = msgspec.msgpack.decode(encoded)
    reason = fields[_REASON]
    fields[_REASON] = _ROUTE_REASONS.get(reason) or RejectReason(reason)
    fields[_EXAMINED] = msgspec.convert(fields[_EXAMINED], tuple[ExaminedTarget, ...])
    return Decision(*fields)
