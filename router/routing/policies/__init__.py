"""Routing policies by name; one interface, one file each."""

from collections.abc import Collection
from typing import Protocol

from router.routing.policies import least_requests, round_robin, twofold
from router.routing.state import FleetView, PoolState
from router.routing.types import Decision, RequestFeatures
from twofold.model.fleet import RoutingPolicy


class Policy(Protocol):
    """A pure function from a request and the fleet as it is now to a decision with its reasons."""

    def __call__(
        self,
        request: RequestFeatures,
        view: FleetView,
        pool: PoolState,
        policy: RoutingPolicy,
        now_s: float,
        exclude: Collection[int],
    ) -> Decision:
        """Chooses among the targets of ``pool``, never one in ``exclude`` (slots) nor an ineligible one; rejects only
        where none is eligible or, by prediction, ``policy.shed_ttft_s`` would be exceeded."""


DEFAULT = "twofold"
POLICIES: dict[str, Policy] = {
    "twofold": twofold.decide,
    "round_robin": round_robin.decide,
    "least_requests": least_requests.decide,
}
