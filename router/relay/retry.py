"""How many retries a relay may make: a token bucket filled by requests, so that retries never bury a dying fleet."""


class RetryBudget:
    """Each request adds ``ratio`` tokens up to ``burst``; each retry takes one."""

    __slots__ = ("_burst", "_tokens")

    def __init__(self, burst: float) -> None:
        self._burst = max(1.0, burst)
        self._tokens = self._burst

    @property
    def tokens(self) -> float:
        """Retries that may be made now."""
        return self._tokens

    def request(self, ratio: float) -> None:
        """A new request came; ``ratio`` retries per request are allowed in the long run."""
        self._tokens = min(self._burst, self._tokens + ratio)

    def take(self) -> bool:
        """Whether one more retry is allowed; it is then spent."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
