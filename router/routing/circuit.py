"""When a target that keeps failing is left alone, and for how long."""

THRESHOLD = 3
"""Consecutive failures that open the circuit."""
_FIRST_S, _LONGEST_S = 1.0, 60.0


def open_s(failures: int) -> float:
    """Seconds for which a circuit stays open after ``failures`` in a row: 1 s, doubling, at most 60 s."""
    return min(_LONGEST_S, _FIRST_S * 2.0 ** min(max(failures - THRESHOLD, 0), 6))
