"""A histogram of constant memory over values that arrive in batches."""

import math

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST = -126  # exponent of the smallest normal float32
_LARGEST = 2.0**127  # the limit has to be a float32
_AT_ONCE = 2**23  # values counted at a time: torch.histc counts in float32, exact up to 2²⁴


class Histogram:
    """Counts of values in equal bins over −limit … limit, where limit is a power of two.

    Values beyond the limit double it as often as needed: neighbouring bins are then added in pairs, so that
    widening splits no bin. The largest magnitude is at least half the limit.

    Args:
        bins: on each side of zero; a power of two.
    """

    def __init__(self, bins: int = 8192) -> None:
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"{bins} bins: choose a power of two")
        self.low, self.high = math.inf, -math.inf
        self.counts = torch.zeros(2 * bins, dtype=torch.int64)
        """Of the bins in ascending order of their values."""
        self._bins, self._exponent = bins, _SMALLEST

    @property
    def limit(self) -> float:
        return math.ldexp(1.0, self._exponent)

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.limit / self._bins

    @property
    def total(self) -> int:
        """The number of values."""
        return int(self.counts.sum())

    def update(self, values: Tensor) -> None:
        """Counts all elements of ``values``, of any shape.

        Raises:
            ValueError: a value is NaN, infinite or at least 2¹²⁷; nothing of ``values`` is counted.
        """
        values = values.detach().float().reshape(-1)
        if not values.numel():
            return
        low, high = (float(bound) for bound in values.aminmax())
        largest = max(-low, high)
        if not largest < _LARGEST:  # NaN compares as false
            raise ValueError("NaN, infinite and very large values (from 2¹²⁷) can't be observed")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(largest)
        for part in values.split(_AT_ONCE):
            found = torch.histc(part, len(self.counts), -self.limit, self.limit)
            self.counts += found.to("cpu", torch.int64)

    def centres(self) -> Tensor:
        """The middle of every bin, float64."""
        return (torch.arange(-self._bins, self._bins, dtype=torch.float64) + 0.5) * self.width

    def magnitudes(self, bins: int | None = None) -> Tensor:
        """Counts of |x| in equal bins over 0 … limit.

        Args:
            bins: a power of two, at most those of a side; None: those.
        """
        negative, positive = self.counts.view(2, -1)
        return _merged((negative.flip(0) + positive), self._bins // (bins or self._bins))

    def _widen(self, largest: float) -> None:
        """Doubles the limit until it is at least ``largest``."""
        exponent = max(self._exponent, math.frexp(largest)[1])
        if exponent == self._exponent:
            return
        merged = _merged(self.counts, 1 << min(exponent - self._exponent, self._bins.bit_length() - 1))
        self.counts = functional.pad(merged, [(2 * self._bins - len(merged)) // 2] * 2)
        self._exponent = exponent


def _merged(counts: Tensor, factor: int) -> Tensor:
    """Counts of bins that are ``factor`` times as wide."""
    return counts.view(-1, factor).sum(1)
