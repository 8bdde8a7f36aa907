"""The format of the precision ``int4`` as a way of quantizing any matrix: rounded, not calibrated.

The table, the layout of groups, the choice of scales and the rounding are those of ``int4_rounding``, as it
quantizes a layer without calibration text.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from loaders.affine.method import Values
from loaders.kernels.matrix import INT4_GROUP
from loaders.layers.gptq import importance
from loaders.layers.int4_codes import STEP, TABLE, groups_of_inputs, in_groups, int4_bytes
from loaders.layers.int4_rounding import group_scales, nearest_codes, nonzero

NAME = "int4-table"


@dataclass(frozen=True)
class Int4Method:
    """Four-bit codes of int4's table; 16 weights share an int8 scale, and an output's scales a float32."""

    name = NAME
    note = "not calibrated, unlike int4"
    per = INT4_GROUP
    bits = 4
    codes = len(TABLE)
    lowest = 0
    has_zero_point = False

    @property
    def values(self) -> Tensor:
        """(16,) float32 by code."""
        return torch.tensor(TABLE, dtype=torch.float32)

    @property
    def reach(self) -> float:
        """The largest error of rounding, in scales: half of the widest step, and to an integer before."""
        return max(above - below for below, above in pairwise(TABLE)) / 2 + 0.5

    def grouped(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or not x.shape[1] or x.shape[1] % STEP:
            raise ValueError(f"rows of {x.shape[-1]} inputs: int4's are multiples of {STEP}")
        return in_groups(x)

    def group_of(self, column: int, inputs: int) -> int:
        return int(groups_of_inputs(inputs)[column])

    def parameters(self, matrix: Values) -> tuple[Tensor, Tensor]:
        """Scale of each group, of either sign, and the divisor by which its codes are chosen."""
        if not bool(self.grouped(matrix.weight).isfinite().all()):
            raise ValueError("a range must be finite")
        scales, of_outputs = group_scales(matrix.weight, importance(None, matrix.weight.shape[1]))
        exact = (scales.float() * of_outputs[:, None])[..., None]
        return exact, nonzero(exact)

    def encode(self, x: Tensor, scale: Tensor, divisor: Tensor, /) -> Tensor:
        return nearest_codes(x / divisor).int()

    def decode(self, codes: Tensor, scale: Tensor, divisor: Tensor, /) -> Tensor:
        return self.values[codes.long()] * scale

    def limits(self, scale: Tensor, divisor: Tensor, /) -> tuple[Tensor, Tensor]:
        first, last = TABLE[0] * scale, TABLE[-1] * scale
        return torch.minimum(first, last), torch.maximum(first, last)

    def bits_per_weight(self, inputs: int, weights: int) -> float:
        return 8 * int4_bytes(1, inputs) / inputs
