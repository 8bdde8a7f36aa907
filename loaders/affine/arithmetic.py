"""From a range of values to scale and zero point, and from values to codes and back.

Sources:

- Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
  Inference" (arXiv:1712.05877), section 2.1: r = S (q − Z), with zero exactly representable.
- Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference" (arXiv:1806.08342),
  sections 2.1 and 2.2: affine and symmetric quantizers; one scale a tensor or a channel.
- Nagel et al. 2021, "A White Paper on Neural Network Quantization" (arXiv:2106.08295), section 2.2.
- ``QuantizeLinear`` of ONNX: division by the scale, rounding half to even, saturation.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Per = Literal["tensor", "channel"] | int
"""What shares a scale: a tensor, each row of an (outputs, inputs) matrix, or so many neighbours in a row."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Scheme:
    """The integer codes of a quantizer.

    Args:
        bits: of one code, 2 … 16.
        symmetric: the range is −m … m, and its zero point is the middle of the codes. Otherwise the range is
            extended only as far as it takes to include zero.
        restricted: symmetric only: the lowest code is not used (int8: −127 … 127, not −128 … 127), so that
            S = m / (2^(bits−1) − 1). With the full range, S = 2 m / (2^bits − 1).
        signed: codes are −2^(bits−1) … 2^(bits−1) − 1; otherwise 0 … 2^bits − 1.
    """

    bits: int = 8
    symmetric: bool = True
    restricted: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"codes of {self.bits} bits: choose from 2 to 16")

    @property
    def middle(self) -> int:
        """The zero point of a symmetric range."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def lowest(self) -> int:
        lowest = self.middle - (1 << (self.bits - 1))
        return lowest + 1 if self.symmetric and self.restricted else lowest

    @property
    def highest(self) -> int:
        return self.middle + (1 << (self.bits - 1)) - 1

    @property
    def steps(self) -> int:
        """Steps between the lowest and the highest code."""
        return self.highest - self.lowest


def parameters(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of each range ``low`` … ``high``; tensors of one shape.

    Zero is exactly representable: a range without it is extended to it. Every value of the range is at most
    half a scale from its code's value. A range of zeros has scale 1, as in ONNX Runtime.

    Raises:
        ValueError: a bound is not finite, or ``low`` is above ``high``.
    """
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("a range must be finite")
    if bool((low > high).any()):
        raise ValueError("a range must not end below its start")
    low, high = low.double().clamp_max(0), high.double().clamp_min(0)  # high − low may exceed float32
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    exact = (high - low) / scheme.steps
    scale = exact.float()
    scale = torch.where(high == low, 1.0, scale.clamp(_TINY, torch.finfo(torch.float32).max))
    if scheme.symmetric:
        return scale, torch.full_like(scale, scheme.middle, dtype=torch.int32)
    zero_point = (scheme.lowest - low / torch.where(exact < _TINY, scale.double(), exact)).round()
    return scale, zero_point.clamp(scheme.lowest, scheme.highest).int()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The int32 codes clamp(round(x / S) + Z); ``scale`` and ``zero_point`` are broadcast to ``x``.

    Infinite values become the lowest and the highest code.

    Raises:
        ValueError: a value is NaN, which has no code.
    """
    codes = (x / scale).round_()
    if bool(codes.isnan().any()):
        raise ValueError("NaN can't be quantized")
    # added as floats: an int32 would overflow before it is clamped
    return codes.add_(zero_point).clamp_(scheme.lowest, scheme.highest).int()


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The float32 values S (q − Z) of ``codes``."""
    return (codes - zero_point) * scale


def grouped(x: Tensor, per: Per) -> Tensor:
    """A view of ``x`` whose last dimension holds what shares one scale.

    Args:
        x: for ``"tensor"`` of any shape; otherwise a matrix (outputs, inputs).

    Returns: (elements,), (outputs, inputs) or (outputs, groups, group).

    Raises:
        ValueError: ``x`` is no matrix, or its rows are not a multiple of the group.
    """
    if per == "tensor":
        return x.reshape(-1)
    if x.dim() != 2:
        raise ValueError(f"a tensor of {x.dim()} dimensions has no rows; expected (outputs, inputs)")
    if per == "channel":
        return x
    if per < 1 or x.shape[1] % per:
        raise ValueError(f"rows of {x.shape[1]} inputs can't be divided into groups of {per}")
    return x.reshape(len(x), -1, per)


def group_of(column: int, inputs: int, per: Per) -> int:
    """The group of a column, counted in its row of so many inputs."""
    return column // per if isinstance(per, int) else 0


def min_max(x: Tensor, per: Per) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of what shares a scale; both broadcast against ``grouped(x, per)``.

    Raises:
        ValueError: as of ``grouped``; or ``x`` is empty.
    """
    groups = grouped(x, per)
    if not groups.numel():
        raise ValueError("an empty tensor has no range")
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return low, high
