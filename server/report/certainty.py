"""Statistics of repeated measurements: confidence intervals of medians, and candidates for the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

CONFIDENCE = 0.9
LEVEL = 1.05
"""Two figures whose intervals overlap count as equal if both are within this factor."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a median; from 0 to infinity if there are too few measurements.

    Args:
        count: number of measurements.
    """

    low: float
    high: float
    count: int = 1

    @classmethod
    def exactly(cls, value: float) -> "Interval":
        return cls(value, value)

    @property
    def factor(self) -> float:
        """high ÷ low; infinite for too few measurements."""
        return self.high / self.low if self.low > 0 else math.inf

    def above(self, other: "Interval") -> bool:
        return self.low > other.high

    def as_good_as(self, other: "Interval") -> bool:
        """Whether it is above the other, or both overlap and are within a factor of ``LEVEL``."""
        together = Interval(min(self.low, other.low), max(self.high, other.high))
        overlaps = not (self.above(other) or other.above(self))
        return self.low >= other.high or (overlaps and together.factor <= LEVEL)


def interval_of(values: Sequence[float]) -> Interval:
    """The interval of the values' median by the sign test, which assumes no distribution of the noise.

    It reaches from the k-th smallest to the k-th largest of n values, where k is the largest number for which
    the median is outside in at most one of ten cases. Fewer than five values give the infinite interval.
    """
    count = len(values)
    tails = accumulate(2 * math.comb(count, below) / 2**count for below in range(count))
    cut = sum(tail <= 1 - CONFIDENCE for tail in tails)
    if not cut:
        return Interval(0.0, math.inf, count)
    ordered = sorted(values)
    return Interval(ordered[cut - 1], ordered[-cut], count)


def perhaps_best(candidates: Sequence[_T], of: Callable[[_T], Interval]) -> list[_T]:
    """The candidates whose interval no other's is above."""
    surely = max(of(one).low for one in candidates)
    return [one for one in candidates if of(one).high >= surely]
