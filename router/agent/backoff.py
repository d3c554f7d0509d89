"""Jittered exponential backoff."""

import random


class Backoff:
    """Delays that double from ``first_s`` to ``max_s``, each drawn from its upper half so that replicas spread out."""

    def __init__(self, first_s: float, max_s: float, rng: random.Random) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._rng = rng
        self._next_s = first_s

    def reset(self) -> None:
        """Begin anew after a success."""
        self._next_s = self._first_s

    def next_s(self) -> float:
        """The next delay in seconds."""
        ceiling = self._next_s
        self._next_s = min(self._max_s, 2 * ceiling)
        return max(self._first_s, ceiling * self._rng.uniform(0.5, 1.0))
