"""Linear layers of int8 weights that quantize their activations: by the row, or on the kernels in groups."""

import warnings

import torch
from torch import Tensor, nn

from loaders import kernels
from loaders.kernels.matrix import INT8_LANES
from loaders.layers.dequantize import dequantize_int8
from loaders.layers.huge_pages import Arena
from loaders.layers.layer_weights import LayerWeights
from loaders.layers.native_linear import NativeLinear

_LEVELS = 127  # of activations, and of the kernels' weights
_ROWS = 4096  # outputs quantized at a time


def weight_levels() -> int:
    """Largest quantized magnitude of FBGEMM's weights.

    Without VNNI it adds pairs of uint8 × int8 products in 16 bits, which saturate if both have 8 bits: with
    weights of 7 they never do (255 × 63 × 2 < 2¹⁵). Activations, with their outliers, need the bit more.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


def quantize_weight(weight: Tensor) -> Tensor:
    """(outputs, inputs) float32 → torch's qint8, one scale an output: its largest magnitude / the levels."""
    scales = (weight.abs().amax(dim=1) / weight_levels()).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)


def quantize_lanes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) float32 → int8 codes of that shape and (outputs, 16) bfloat16 scales.

    Weights k of one k / 4 % 16 share a scale: their largest magnitude / 127, rounded up.
    """
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for rows, into in zip(weight.split(_ROWS), codes.split(_ROWS), strict=True):
        lanes = rows.reshape(len(rows), -1, INT8_LANES, 4)
        exact = (lanes.abs().amax(dim=(1, 3)) / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        above = bfloat16_above(exact)
        into.copy_((lanes / above[:, None, :, None]).round_().view(rows.shape))
        scales.append(above.bfloat16())
    return codes, torch.cat(scales)


def bfloat16_above(exact: Tensor) -> Tensor:
    """The smallest numbers of bfloat16 that are not below positive float32 ones, as float32."""
    return ((exact.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def int8_linear(
    weight: Tensor, bias: Tensor | None, arena: Arena, input_scale: Tensor | None = None
) -> "NativeLinear | DynamicInt8Linear":
    """The layer in int8: on the compiled kernels with its weights in ``arena``; otherwise on FBGEMM.

    Args:
        input_scale: (inputs,) factors by which the weights are multiplied first, as ``fold_norms`` returns.
    """
    if input_scale is not None:
        weight = weight * input_scale
    linear = _int8_linear(weight, bias, arena)
    linear.input_scale = input_scale
    return linear


def _int8_linear(weight: Tensor, bias: Tensor | None, arena: Arena) -> "NativeLinear | DynamicInt8Linear":
    if not kernels.supports("int8", weight.shape[1]):
        return DynamicInt8Linear(weight, bias)
    codes, scales = quantize_lanes(weight)
    return NativeLinear("int8", codes, bias, scales, arena=arena)


def int8_linear_bytes(outputs: int, inputs: int) -> int:
    """Bytes of such a layer's weights and scales."""
    lanes = kernels.supports("int8", inputs)
    return outputs * (inputs + (INT8_LANES * 2 if lanes else 12))  # see DynamicInt8Linear.layer_weights


class DynamicInt8Linear(nn.Module):
    """y = x Wᵀ + b with W in int8 per output channel and x quantized to int8 row by row.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.input_scale: Tensor | None = None  # factors that the weights include, as in LayerWeights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces torchao as the successor
            self._packed = torch.ops.quantized.linear_prepack(quantize_weight(weight), None)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        ranges = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / ranges, 1 / _LEVELS, _LEVELS + 1, self._packed
        )
        y = y * ranges if self.bias is None else torch.addcmul(self.bias, y, ranges)
        return y.view(*x.shape[:-1], self.out_features)

    def layer_weights(self) -> LayerWeights:
        """Copies of what the packed object holds: int8 weights and three values an output channel.

        These are a float32 scale, an int32 zero point and an int32 column offset.
        """
        packed, _ = torch.ops.quantized.linear_unpack(self._packed)
        codes: Tensor = packed.int_repr()
        scales = packed.q_per_channel_scales().float()
        return LayerWeights(
            "int8",
            (self.out_features, self.in_features),
            codes,
            lambda: dequantize_int8(codes, scales),
            [
                ("scales", scales),
                ("zero_points", packed.q_per_channel_zero_points().int()),
                ("offsets", codes.sum(dim=1, dtype=torch.int32)),
            ],
            copied=True,
            input_scale=self.input_scale,
        )
