"""The error of a quantized matrix."""

import math
from dataclasses import dataclass

from torch import Tensor

_WEIGHTS = 2**22  # compared at a time


@dataclass
class ErrorSums:
    """Sums over the parts of two matrices, in float64."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, original: Tensor, found: Tensor) -> None:
        exact = original.to(found.device).double()
        off = found.double() - exact
        self.signal += float(exact.square().sum())
        self.noise += float(off.square().sum())
        self.largest = max(self.largest, float(off.abs().max()))

    @property
    def relative(self) -> float:
        """‖W′ − W‖ / ‖W‖, Frobenius; 0 if the matrices are equal or the original is all zeros."""
        return math.sqrt(self.noise / self.signal) if self.noise and self.signal else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB, 20 log₁₀ (‖W‖ / ‖W′ − W‖); None where ``relative`` is 0."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else None


def compare(original: Tensor, found: Tensor) -> tuple[float, float, float | None]:
    """Relative error, largest error and SQNR in dB of two matrices of one shape."""
    sums = ErrorSums()
    rows = max(1, _WEIGHTS // original.shape[1])
    for one, other in zip(original.split(rows), found.split(rows), strict=True):
        sums.add(one, other)
    return sums.relative, sums.largest, sums.sqnr_db
