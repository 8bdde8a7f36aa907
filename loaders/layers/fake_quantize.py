"""Linear layers that compute in training what the compiled kernels compute with their quantized weights.

Weights are rounded in the forward pass; gradients pass through the rounding as if it were the identity, the
straight-through estimator (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877, section
3). The scales of four-bit blocks are trained as well (LSQ: Esser et al. 2020, arXiv:1902.08153).
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loaders.kernels import FourBit
from loaders.layers.dequantize import dequantize_int8
from loaders.layers.huge_pages import Arena
from loaders.layers.int8_grids import GROUPS, Int8Grid
from loaders.layers.native_linear import NativeLinear

FOUR_BIT_BLOCK = 64
"""Weights of a row that share a scale."""
_LOWEST, _HIGHEST = -8, 7  # four-bit codes
_SHARES = [share / 100 for share in range(50, 112, 2)]  # of the scale that covers a block's range


class FakeQuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W as it will be after quantization.

    Args:
        weight: (outputs, inputs) float32; trained if it is a parameter that requires gradients.
        bias: (outputs,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @abstractmethod
    def quantized_weight(self) -> Tensor:
        """(outputs, inputs) float32: the values that the codes and scales of ``to_native`` represent."""
        ...

    @abstractmethod
    def resolution(self) -> float:
        """The mean distance of neighbouring values that a weight can have."""
        ...

    @abstractmethod
    def to_native(self, arena: Arena) -> NativeLinear:
        """The quantized layer on the compiled kernels."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.quantized_weight(), self.bias)


class FakeFourBitLinear(FakeQuantizedLinear):
    """Weights in four bits: w = s · c with c in −8 … 7 and a trained scale s for each block of a row.

    A scale is trained as the logarithm of its ratio to the initial one: it keeps its sign, and a step of the
    optimizer changes small and large ones in proportion. It may be negative: the code −8, which has no
    positive counterpart, then stands for the largest weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.initial_scales: Tensor
        self.register_buffer("initial_scales", best_scales(weight.detach()))
        self.log_ratio = nn.Parameter(torch.zeros_like(self.initial_scales))

    def quantized_weight(self) -> Tensor:
        found: Tensor = _RoundToFourBits.apply(self.weight, self._scales())  # type: ignore[no-untyped-call]
        return found

    def resolution(self) -> float:
        return float(self.initial_scales.abs().mean())

    def to_native(self, arena: Arena) -> NativeLinear:
        scales = self._scales().detach()
        codes = (_four_bit_codes(self.weight.detach(), scales) - _LOWEST).to(torch.uint8)
        pairs = codes.view(len(scales), -1, 2)
        table = torch.arange(_LOWEST, _HIGHEST + 1, dtype=torch.float32)
        four_bit = FourBit(table, FOUR_BIT_BLOCK, scales.reshape(-1))
        return NativeLinear(
            "four-bit", pairs[..., 0] << 4 | pairs[..., 1], self.bias, four_bit=four_bit, arena=arena
        )

    def _scales(self) -> Tensor:
        return self.initial_scales * self.log_ratio.exp()


class FakeInt8Linear(FakeQuantizedLinear):
    """Weights and activations in int8.

    Args:
        input_scale: (inputs,) factors by which the weights are multiplied first, as ``fold_norms`` returns.
        grid: what shares a scale; by default as ``dynamic-int8`` computes.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None = None,
        grid: Int8Grid = GROUPS,
    ) -> None:
        super().__init__(weight, bias)
        self.input_scale: Tensor | None
        self.register_buffer("input_scale", input_scale)
        self._grid = grid
        self._frozen: Tensor | None = None  # of a weight that isn't trained

    def quantized_weight(self) -> Tensor:
        if self.weight.requires_grad:
            return self._quantized()
        if self._frozen is None:
            self._frozen = self._quantized()
        return self._frozen

    def _quantized(self) -> Tensor:
        weight = self._scaled()
        return _straight_through(weight, dequantize_int8(*self._grid.quantize(weight.detach())))

    def resolution(self) -> float:
        scaled = self._scaled().detach()
        unscaled = self.weight.detach().abs().mean() / scaled.abs().mean().clamp_min(1e-30)
        return float(unscaled * self._grid.quantize(scaled)[1].float().mean())

    def to_native(self, arena: Arena) -> NativeLinear:
        codes, scales = self._grid.quantize(self._scaled().detach())
        linear = NativeLinear("int8", codes, self.bias, scales, arena=arena)
        linear.input_scale = self.input_scale
        return linear

    def forward(self, x: Tensor) -> Tensor:
        rounded = _straight_through(x, self._grid.round(x.detach().float()).to(x.dtype))
        return functional.linear(rounded, self.quantized_weight(), self.bias)

    def _scaled(self) -> Tensor:
        return self.weight if self.input_scale is None else self.weight * self.input_scale


class _RoundToFourBits(torch.autograd.Function):
    """s · round(w / s), saturated; LSQ's gradients of w and s (arXiv:1902.08153, equations 1 to 3 and 5)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        codes = _four_bit_codes(weight, scales)
        return codes.view(*scales.shape, -1).mul_(scales[..., None]).view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        weight, scales = ctx.saved_tensors
        gradient = gradients[0].reshape(*scales.shape, -1)
        exact = weight.view(*scales.shape, -1) / scales[..., None]
        codes = exact.clamp(_LOWEST, _HIGHEST)
        saturated = (exact - codes).abs_().sign_()  # 1 or 0: masks of booleans take several times as long
        of_weights = torch.addcmul(gradient, gradient, saturated, value=-1)
        of_scales = codes.round_().mul_(gradient).addcmul_(of_weights, exact, value=-1).sum(dim=-1)
        return of_weights.view(weight.shape), of_scales


def _four_bit_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """(outputs, inputs) of integers −8 … 7, as floats."""
    exact = weight.reshape(*scales.shape, -1) / scales[..., None]
    return exact.round_().clamp_(_LOWEST, _HIGHEST).view(weight.shape)


def covering_scales(weight: Tensor) -> Tensor:
    """(outputs, inputs / 64) scales for which each block's largest magnitude has the code −8."""
    blocks = weight.reshape(len(weight), -1, FOUR_BIT_BLOCK)
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(largest == 0, tiny, largest / _LOWEST)


def best_scales(weight: Tensor) -> Tensor:
    """Scales of a grid around ``covering_scales``, of either sign, with the least squared error."""
    blocks = weight.reshape(len(weight), -1, FOUR_BIT_BLOCK)
    widest = covering_scales(weight)
    least, best = torch.full_like(widest, torch.inf), widest
    for share in _SHARES:
        for scales in (share * widest, -share * widest):
            rounded = _four_bit_codes(weight, scales).view(blocks.shape) * scales[..., None]
            error = (rounded - blocks).square_().sum(dim=-1)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
    return best


def _straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of the exact ones."""
    found: Tensor = _Identity.apply(exact, rounded)  # type: ignore[no-untyped-call]
    return found


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
