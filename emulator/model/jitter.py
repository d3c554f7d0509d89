"""How far steps scatter around the law. Pure: the scatter of a step follows from its time and number alone."""

import math
import struct
from statistics import NormalDist

import xxhash

_NORMAL = NormalDist()


def factor(sigma: float, step: int, now_s: float) -> float:
    """What the duration of a step is multiplied by: log-normal with a mean of 1, ``sigma`` of its logarithm."""
    drawn = xxhash.xxh3_64_intdigest(struct.pack("<qd", step, now_s))
    return math.exp(sigma * _NORMAL.inv_cdf((drawn + 0.5) / 2.0**64) - sigma * sigma / 2)
