"""What a quantizer does to a matrix: its scales, codes and errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loaders.affine.arithmetic import dequantize, grouped, parameters, quantize
from loaders.affine.error import ErrorSums
from loaders.affine.histogram import Histogram
from loaders.affine.quantizer import Quantizer

_WEIGHTS = 2**22  # quantized at a time
_HALF = 0.5001  # of a scale: the largest error of rounding, computed in float32


@dataclass(frozen=True)
class Code:
    """One weight's code, its scale and zero point, and the value that it stands for."""

    code: int
    scale: float
    zero_point: int
    value: float


@dataclass(frozen=True)
class Applied:
    """A quantizer applied to one matrix.

    Args:
        ranges: the number of scales.
        scales: the smallest and the largest.
        zero_points: the smallest and the largest.
        limits: the smallest and the largest value that a code stands for.
        clipped: the number of weights beyond the codes of their range: off by more than half a scale.
        codes_used: the number of different codes.
        bits_per_weight: scales and zero points included.
        relative_error, max_error, sqnr_db: as in ``ErrorSums``.
        counts: of the quantized weights, in the bins of ``Matrix.counts``.
        errors: histogram of W′ − W.
    """

    quantizer: Quantizer
    ranges: int
    scales: tuple[float, float]
    zero_points: tuple[int, int]
    limits: tuple[float, float]
    clipped: int
    codes_used: int
    bits_per_weight: float
    relative_error: float
    max_error: float
    sqnr_db: float | None
    counts: Tensor
    errors: Histogram


class Matrix:
    """A matrix to be quantized in several ways.

    Args:
        weight: (outputs, inputs), float32.
        bins: of the counts of values, from the smallest to the largest weight.
    """

    def __init__(self, weight: Tensor, bins: int) -> None:
        self.weight, self.bins = weight, bins

    @cached_property
    def histogram(self) -> Histogram:
        """Raises: ValueError, if a weight is NaN or infinite."""
        histogram = Histogram()
        histogram.update(self.weight)
        return histogram

    @cached_property
    def counts(self) -> Tensor:
        """Of the weights, in ``bins``."""
        return self._counts(self.weight)

    def apply(self, quantizer: Quantizer) -> Applied:
        """Raises: ValueError, if the rows can't be divided into groups."""
        scheme = quantizer.scheme
        scale, zero_point = self._parameters(quantizer)
        used = torch.zeros(scheme.steps + 1, dtype=torch.int64)
        counts, clipped = torch.zeros(self.bins, dtype=torch.int64), 0
        sums, errors = ErrorSums(), Histogram()
        for rows, codes, scales, found in self._blocks(quantizer, scale, zero_point):
            used += torch.bincount((codes - scheme.lowest).reshape(-1), minlength=len(used))
            counts += self._counts(found)
            clipped += int(((found - rows).abs() > _HALF * scales).sum())
            sums.add(rows, found)
            errors.update(found - rows)
        return Applied(
            quantizer,
            scale.numel(),
            (float(scale.min()), float(scale.max())),
            (int(zero_point.min()), int(zero_point.max())),
            (
                float((scale * (scheme.lowest - zero_point)).min()),
                float((scale * (scheme.highest - zero_point)).max()),
            ),
            clipped,
            int((used > 0).sum()),
            quantizer.bits_per_weight(self.weight.shape[1], self.weight.numel()),
            sums.relative,
            sums.largest,
            sums.sqnr_db,
            counts,
            errors,
        )

    def error(self, quantizer: Quantizer) -> ErrorSums:
        """The error alone, in a fraction of the time.

        Raises:
            ValueError: the rows can't be divided into groups.
        """
        sums = ErrorSums()
        for rows, _, _, found in self._blocks(quantizer, *self._parameters(quantizer)):
            sums.add(rows, found)
        return sums

    def code(self, quantizer: Quantizer, row: int, column: int) -> Code:
        """The code of one weight."""
        scale, zero_point = self._parameters(quantizer)
        if quantizer.per != "tensor":
            group = column // (self.weight.shape[1] if quantizer.per == "channel" else quantizer.per)
            scale, zero_point = scale[row].reshape(-1)[group], zero_point[row].reshape(-1)[group]
        code = quantize(self.weight[row, column], scale, zero_point, quantizer.scheme)
        value = dequantize(code, scale, zero_point)
        return Code(int(code), float(scale), int(zero_point), float(value))

    def _parameters(self, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
        return parameters(*quantizer.ranges(self), quantizer.scheme)

    def _blocks(
        self, quantizer: Quantizer, scale: Tensor, zero_point: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Some rows at a time, shaped as by ``grouped``: weights, codes, scales, and the codes' values."""
        size = max(1, _WEIGHTS // self.weight.shape[1])
        for start in range(0, len(self.weight), size):
            part = slice(start, start + size) if quantizer.per != "tensor" else ...
            rows = grouped(self.weight[start : start + size], quantizer.per)
            codes = quantize(rows, scale[part], zero_point[part], quantizer.scheme)
            yield rows, codes, scale[part], dequantize(codes, scale[part], zero_point[part])

    def _counts(self, values: Tensor) -> Tensor:
        low, high = self.histogram.low, self.histogram.high
        return torch.histc(values.clamp(low, high), self.bins, low, high).long()
