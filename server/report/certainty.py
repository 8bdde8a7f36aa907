"""What repeated measurements allow to say: where their median lies, and which of several may be the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

CONFIDENCE = 0.9
LEVEL = 1.05
"""Factor within which two figures that can't be told apart are called equal."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Interval:
    """A confidence interval for a median; from 0 to infinity where nothing is known of it.

    Args:
        count: of the measurements.
    """

    low: float
    high: float
    count: int = 1

    @classmethod
    def exactly(cls, value: float) -> "Interval":
        return cls(value, value)

    @property
    def factor(self) -> float:
        """How far its ends lie apart: high ÷ low; infinite where nothing is known."""
        return self.high / self.low if self.low > 0 else math.inf

    def above(self, other: "Interval") -> bool:
        return self.low > other.high

    def as_good_as(self, other: "Interval") -> bool:
        """Whether it lies above, or equals the other to within ``LEVEL``, and that is known."""
        together = Interval(min(self.low, other.low), max(self.high, other.high))
        overlaps = not (self.above(other) or other.above(self))
        return self.low >= other.high or (overlaps and together.factor <= LEVEL)


def interval_of(values: Sequence[float]) -> Interval:
    """That of their median by the sign test: it assumes nothing of how noise is distributed.

    Between the k-th smallest and the k-th largest of n values, where k is the largest number for which the
    median lies outside in at most one of ten cases. Of fewer than five values nothing is known.
    """
    count = len(values)
    tails = accumulate(2 * math.comb(count, below) / 2**count for below in range(count))
    cut = sum(tail <= 1 - CONFIDENCE for tail in tails)
    if not cut:
        return Interval(0.0, math.inf, count)
    ordered = sorted(values)
    return Interval(ordered[cut - 1], ordered[-cut], count)


def perhaps_best(candidates: Sequence[_T], of: Callable[[_T], Interval]) -> list[_T]:
    """Those that no other lies above."""
    surely = max(of(one).low for one in candidates)
    return [one for one in candidates if of(one).high >= surely]
