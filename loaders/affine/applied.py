"""What a quantizer does to a matrix: its scales, codes and errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loaders.affine.error import ErrorSums
from loaders.affine.histogram import Histogram
from loaders.affine.method import Method

_WEIGHTS = 2**22  # quantized at a time
_ROUNDED = 1.0002  # of the largest error of rounding, which is computed in float32


@dataclass(frozen=True)
class Code:
    """One weight's code, and the value that it stands for.

    Args:
        scale: of the weight's range.
        zero_point: of the weight's range; None if the codes have none.
        level: the value in scales: q - Z, or the table's.
    """

    code: int
    scale: float
    zero_point: int | None
    level: float
    value: float


@dataclass(frozen=True)
class Applied:
    """A quantizer applied to one matrix.

    Args:
        ranges: the number of scales.
        scales: the smallest and the largest.
        zero_points: the smallest and the largest; None if the codes have none.
        limits: the smallest and the largest value that a code stands for.
        clipped: the number of weights beyond the codes of their range: off by more than rounding moves them.
        codes_used: the number of different codes.
        bits_per_weight: scales and zero points included.
        relative_error, max_error, sqnr_db: as in ``ErrorSums``.
        counts: of the quantized weights, in the bins of ``Matrix.counts``.
        errors: histogram of W′ − W.
    """

    quantizer: Method
    ranges: int
    scales: tuple[float, float]
    zero_points: tuple[int, int] | None
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
        self._known: tuple[Method, tuple[Tensor, Tensor]] | None = None

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

    def apply(self, quantizer: Method) -> Applied:
        """Raises: ValueError, if the rows can't be divided into groups."""
        scale, offset = self._parameters(quantizer)
        used = torch.zeros(quantizer.codes, dtype=torch.int64)
        reach = _ROUNDED * quantizer.reach
        counts, clipped = torch.zeros(self.bins, dtype=torch.int64), 0
        sums, errors = ErrorSums(), Histogram()
        for rows, codes, scales, found in self._blocks(quantizer, scale, offset):
            used += torch.bincount((codes - quantizer.lowest).reshape(-1), minlength=len(used))
            counts += self._counts(found)
            clipped += int(((found - rows).abs() > reach * scales.abs()).sum())
            sums.add(rows, found)
            errors.update(found - rows)
        zero_points = (int(offset.min()), int(offset.max())) if quantizer.has_zero_point else None
        low, high = quantizer.limits(scale, offset)
        return Applied(
            quantizer,
            scale.numel(),
            (float(scale.min()), float(scale.max())),
            zero_points,
            (float(low.min()), float(high.max())),
            clipped,
            int((used > 0).sum()),
            quantizer.bits_per_weight(self.weight.shape[1], self.weight.numel()),
            sums.relative,
            sums.largest,
            sums.sqnr_db,
            counts,
            errors,
        )

    def error(self, quantizer: Method) -> ErrorSums:
        """The error alone, in a fraction of the time.

        Raises:
            ValueError: the rows can't be divided into groups.
        """
        sums = ErrorSums()
        for rows, _, _, found in self._blocks(quantizer, *self._parameters(quantizer)):
            sums.add(rows, found)
        return sums

    def code(self, quantizer: Method, row: int, column: int) -> Code:
        """The code of one weight."""
        scale, offset = self._parameters(quantizer)
        if quantizer.per != "tensor":
            group = quantizer.group_of(column, self.weight.shape[1])
            scale, offset = scale[row].reshape(-1)[group], offset[row].reshape(-1)[group]
        code = quantizer.encode(self.weight[row, column], scale, offset)
        level = quantizer.decode(code, torch.ones(()), offset)
        value = quantizer.decode(code, scale, offset)
        zero = int(offset) if quantizer.has_zero_point else None
        return Code(int(code), float(scale), zero, float(level), float(value))

    def _parameters(self, quantizer: Method) -> tuple[Tensor, Tensor]:
        """Those of the last quantizer are kept: they may take longer than all the rest."""
        if self._known is None or self._known[0] != quantizer:
            self._known = quantizer, quantizer.parameters(self)
        return self._known[1]

    def _blocks(
        self, quantizer: Method, scale: Tensor, offset: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Some rows at a time, ``Method.grouped``: weights, codes, scales, and the codes' values.

        Args:
            scale, offset: from ``parameters`` of the quantizer.
        """
        size = max(1, _WEIGHTS // self.weight.shape[1])
        for start in range(0, len(self.weight), size):
            part = slice(start, start + size) if quantizer.per != "tensor" else ...
            rows = quantizer.grouped(self.weight[start : start + size])
            codes = quantizer.encode(rows, scale[part], offset[part])
            yield rows, codes, scale[part], quantizer.decode(codes, scale[part], offset[part])

    def _counts(self, values: Tensor) -> Tensor:
        low, high = self.histogram.low, self.histogram.high
        return torch.histc(values.clamp(low, high), self.bins, low, high).long()
