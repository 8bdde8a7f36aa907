"""A linear layer whose weight is one of torchao's quantized tensors. The only module that imports torchao."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    quantize_,
)

from loaders.layers.layer_weights import LayerWeights

Kind = Literal["int8-weight-only", "int8-dynamic", "int4-weight-only"]

GROUP = 32
"""Weights that share a scale and a zero point in int4."""
_MIDDLE = 8  # the code of int4 that stands for the zero point


class TorchAOLinear(nn.Module):
    """y = x Wᵀ + b with torchao's tensor as W; the product is computed in one type, whatever that of x is.

    Args:
        layer: on its device; for int4 with a multiple of ``GROUP`` inputs.
        compute: the type of the product.
        input_scale: (inputs,) factors that the weights include, as those of ``fold_into_weights``.
    """

    def __init__(
        self, layer: nn.Linear, kind: Kind, compute: torch.dtype, input_scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.input_scale = input_scale  # a plain attribute: no product reads it
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.compute = layer.bias, compute
        exact = layer.weight.detach()
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        # torchao computes scales in the type of the weights, and int4 in that of the scales
        plain.weight = nn.Parameter(exact.to(compute) if kind == "int4-weight-only" else exact, False)
        quantize_(plain, _config(kind, exact.device))
        self.weight = plain.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.linear(x.to(self.compute), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def layer_weights(self) -> LayerWeights:
        weights = _int8(self.weight) if isinstance(self.weight, Int8Tensor) else _int4(self.weight)
        return replace(weights, input_scale=self.input_scale)


def _config(kind: Kind, device: torch.device) -> Any:
    """The configuration of torchao; its settings for ``torch.compile`` stay as they are."""
    if kind == "int8-weight-only":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if kind == "int8-dynamic":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    options = {"group_size": GROUP, "int4_choose_qparams_algorithm": "hqq", "set_inductor_config": False}
    if device.type == "cpu":
        return PrototypeInt4WeightOnlyConfig(**options)
    return Int4WeightOnlyConfig(**options, int4_packing_format="tile_packed_to_4d")


def _int8(weight: Any) -> LayerWeights:
    codes, scales = weight.qdata, weight.scale
    state = [("scales", scales)]
    if weight.zero_point is not None:  # zeros, but in memory
        state.append(("zero_points", weight.zero_point))
    return LayerWeights("int8", tuple(weight.shape), codes, lambda: codes.float() * scales.float(), state)


def _int4(weight: Any) -> LayerWeights:
    """Scales and zero points are interleaved, (inputs / group, outputs, 2): w = (code − 8) · scale + zero."""
    outputs, inputs = weight.shape
    parts = weight.scale_and_zero

    def dequantize() -> Tensor:
        codes = _codes(weight) if isinstance(weight, Int4OpaqueTensor) else None
        if codes is None:
            return _by_product(weight)
        groups = codes.view(outputs, -1, GROUP).float() - _MIDDLE
        scale, zero = (one.t().float()[..., None] for one in parts.unbind(-1))
        found: Tensor = (groups * scale + zero).view(outputs, inputs)
        return found

    return LayerWeights("4-bit", (outputs, inputs), weight.qdata, dequantize, [("scales", parts)])


def _codes(weight: Any) -> Tensor:
    """(outputs, inputs) codes of a packed CPU tensor.

    Their order depends on the instructions of the CPU. It is found by packing the place of every code, one
    hexadecimal digit at a time.
    """
    outputs, inputs = weight.shape
    places = torch.arange(outputs * inputs, dtype=torch.int32).view(outputs, inputs)
    order = torch.zeros(outputs * inputs, dtype=torch.int64)
    for shift in range(0, (outputs * inputs - 1).bit_length(), 4):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(places >> shift & 15, 1)
        order |= _nibbles(packed).long() << shift
    codes = torch.empty(outputs * inputs, dtype=torch.uint8)
    codes[order] = _nibbles(weight.qdata)
    return codes.view(outputs, inputs)


def _nibbles(packed: Tensor) -> Tensor:
    flat = packed.reshape(-1)
    return torch.stack([flat & 15, flat >> 4], dim=-1).view(-1)


def _by_product(weight: Any) -> Tensor:
    """The matrix as the kernel of a card multiplies it: the product with an identity, in bfloat16."""
    identity = torch.eye(weight.shape[1], dtype=torch.bfloat16, device=weight.device)
    return nn.functional.linear(identity, weight).t().float()
