"""Codes as places in a table of values, x ≈ S T[q], in blocks that share their largest magnitude S.

Sources:

- Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), section 3: NF4, whose values are quantiles of the normal
  distribution, and the quantization of the blocks' scales in turn ("double quantization").
- Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 1.3: the
  dynamic type in which these scales are stored.
- ``bitsandbytes.functional``: how it places the values of NF4, FP4 (a sign, two bits of exponent, one of
  fraction; the subnormal is an eighth of 1/24) and the dynamic type.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from loaders.affine import arithmetic

_NAME = re.compile(r"(nf4|fp4)(?:-([1-9]\d{0,6}))?(-nested)?")
_BLOCK, _SCALES = 64, 256  # weights that share a scale; scales that share one in turn
_OUTERMOST = 0.9677083  # mean of 1 − 1/30 and 1 − 1/32, so that no quantile is infinite
_OFF = 1.1  # scales in eight bits may be off by a few hundredths
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by the three bits behind the sign; divided by 12


class HasWeight(Protocol):
    @property
    def weight(self) -> Tensor: ...


@dataclass(frozen=True)
class TableQuantizer:
    """Four-bit codes of a table, blocks of a row with a scale.

    Args:
        table: ``nf4`` or ``fp4``.
        per: neighbours in a row that share a scale.
        nested: scales are quantized to eight bits, in blocks of 256, as distances from their mean.
    """

    name: str
    table: str
    per: int = _BLOCK
    nested: bool = False

    note = None
    bits = 4
    codes = 16
    lowest = 0
    has_zero_point = False

    @property
    def values(self) -> Tensor:
        """(16,) float32 by code."""
        return _TABLES[self.table]()

    @property
    def reach(self) -> float:
        """The largest error of rounding, in scales."""
        ordered = self.values.sort().values
        return _OFF * float((ordered[1:] - ordered[:-1]).max()) / 2

    def grouped(self, x: Tensor) -> Tensor:
        return arithmetic.grouped(x, self.per)

    def group_of(self, column: int, inputs: int) -> int:
        return arithmetic.group_of(column, inputs, self.per)

    def parameters(self, matrix: HasWeight) -> tuple[Tensor, Tensor]:
        """Scale of each block, and the one by which its codes are chosen: the largest magnitude.

        Both broadcast against ``grouped(weight, per)``.

        Raises:
            ValueError: the rows can't be divided into blocks, or a weight is not finite.
        """
        largest = self.grouped(matrix.weight).abs().amax(dim=-1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError("a range must be finite")
        scale = nested(largest) if self.nested else largest
        return scale, largest

    def bits_per_weight(self, inputs: int, weights: int) -> float:
        """Of a code and its share of a scale: float32, or eight bits and their share of a float32."""
        scale = 8 + 32 / min(_SCALES, max(1, weights // self.per)) if self.nested else 32
        return self.bits + scale / self.per

    def encode(self, x: Tensor, scale: Tensor, exact: Tensor, /) -> Tensor:
        """Codes of the nearest values."""
        unit = x / torch.where(exact == 0, 1.0, exact)
        ordered, code = self.values.sort(stable=True)
        return code[torch.bucketize(unit, (ordered[1:] + ordered[:-1]) / 2)].int()

    def decode(self, codes: Tensor, scale: Tensor, exact: Tensor, /) -> Tensor:
        return self.values[codes.long()] * scale

    def limits(self, scale: Tensor, exact: Tensor, /) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each block's codes."""
        return self.values.min() * scale, self.values.max() * scale


def nested(scales: Tensor) -> Tensor:
    """Scales as they are after they were quantized themselves."""
    flat = scales.flatten()
    middle = flat.mean()
    blocks = torch.nn.functional.pad(flat - middle, (0, -len(flat) % _SCALES)).view(-1, _SCALES)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = _dynamic()
    unit = blocks / torch.where(largest == 0, 1.0, largest)
    found = values[torch.bucketize(unit, (values[1:] + values[:-1]) / 2)] * largest
    return (found.flatten()[: len(flat)] + middle).view(scales.shape)


def parse(name: str) -> TableQuantizer | None:
    """The quantizer of a name: ``nf4`` or ``fp4``, then the size of a block, then ``-nested``; else None."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return TableQuantizer(name, found[1], int(found[2] or _BLOCK), bool(found[3]))


@cache
def _nf4() -> Tensor:
    """Seven negative and eight positive quantiles, zero between them, scaled to −1 … 1."""
    below, above = (torch.linspace(0.5, _OUTERMOST, n, dtype=torch.float64)[1:] for n in (8, 9))
    quantiles = [-torch.special.ndtri(below).flip(0), torch.zeros(1), torch.special.ndtri(above)]
    values = torch.cat([one.double() for one in quantiles])
    return (values / values.max()).float()


@cache
def _fp4() -> Tensor:
    positive = torch.tensor(_FP4) / 12
    return torch.cat([positive, -positive])


@cache
def _dynamic() -> Tensor:
    """The 256 values of the signed dynamic type, in order: decades whose steps are the finer, the larger."""
    found = [0.0, 1.0]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        means = (ends[1:] + ends[:-1]) / 2 * 10.0 ** (exponent - 6)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


_TABLES: dict[str, Callable[[], Tensor]] = {"nf4": _nf4, "fp4": _fp4}
