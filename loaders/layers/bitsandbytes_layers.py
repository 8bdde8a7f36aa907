"""Adapters of bitsandbytes' linear layers: their weights, and the same layers on the compiled kernels.

The only module that imports bitsandbytes. Importing it registers both classes.
"""

from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from torch import Tensor, nn

from loaders import kernels
from loaders.kernels import FourBit
from loaders.layers.dequantize import dequantize_four_bit, dequantize_int8
from loaders.layers.huge_pages import Arena
from loaders.layers.layer_weights import LayerWeights, dense, weights_of
from loaders.layers.native_linear import NativeLinear, to_native

_INT8_LEVELS = 127  # the scales are rows' largest magnitudes
_NESTED_BLOCK = 256  # scales that share an outer one
_PACKED_ROWS = 32  # outputs side by side in the layout for AVX-512


class Int8Linear(Linear8bitLt):
    """bitsandbytes' layer for inputs of any number of dimensions, such as the four of latent attention.

    Its product flattens three to rows, and on a CPU it fails on more.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = super().forward(x.flatten(0, -2))
        return rows.view(*x.shape[:-1], rows.shape[-1])


def take_any_shape(model: nn.Module) -> None:
    """Makes the layers that ``from_pretrained`` made take what bitsandbytes fails on, on a CPU.

    In int8 inputs of any number of dimensions; in four bits any number of outputs: weights that its layout
    for AVX-512 can't hold stay in the usual one.
    """
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = Int8Linear
        elif isinstance(module, Linear4bit) and module.out_features % _PACKED_ROWS:
            module.support_avx512bf16_for_cpu = False


def int8_layer(weight: Tensor, bias: Tensor | None, input_scale: Tensor | None) -> nn.Module:
    """The layer that ``from_pretrained`` makes of a linear one at threshold 0, on the CPU.

    Args:
        weight: (outputs, inputs) of floats.
        input_scale: (inputs,) factors by which the weights are multiplied first, as ``fold_norms`` returns.
    """
    outputs, inputs = weight.shape
    layer = Int8Linear(inputs, outputs, bias is not None, has_fp16_weights=False, device="meta").eval()
    scaled = weight if input_scale is None else weight * input_scale
    layer.weight = Int8Params(scaled, requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.bias, layer.input_scale = bias, input_scale
    found: nn.Module = layer
    return found


def layer_class(precision: str) -> type[nn.Module]:
    """The class of the layers that ``from_pretrained`` quantizes to int8, nf4 or fp4."""
    layer: type[nn.Module] = Linear8bitLt if precision == "int8" else Linear4bit
    return layer


def weight_shape(layer: Any) -> tuple[int, ...]:
    """The shape of the tensor that was quantized, which may differ from the layer's."""
    state = getattr(layer.weight, "quant_state", None)
    return tuple(layer.weight.shape if state is None else state.shape)


@weights_of.register(Linear8bitLt)
def _(module: Any) -> LayerWeights:
    """The first forward pass moves the scales from the weight to the layer's state."""
    held = getattr(module.weight, "SCB", None)
    scales: Tensor | None = module.state.SCB if held is None else held
    codes: Tensor = module.weight.data
    if scales is None:  # not quantized yet
        return dense(codes)
    return LayerWeights(
        "int8",
        (module.out_features, module.in_features),
        codes,
        lambda: dequantize_int8(codes, scales.float() / _INT8_LEVELS),
        [("scales", scales)],
        input_scale=getattr(module, "input_scale", None),
    )


@weights_of.register(Linear4bit)
def _(module: Any) -> LayerWeights:
    state, codes = module.weight.quant_state, module.weight.data
    if state is None:  # not quantized yet
        return dense(codes)
    shape = module.out_features, module.in_features
    packed = getattr(state, "packing_format_for_cpu", False)
    described = four_bit(state)
    tensors = [("absmax", state.absmax), ("tables", state.code)]
    if state.nested:
        inner = state.state2
        tensors += [("absmax", inner.absmax), ("tables", inner.code), ("absmax", state.offset)]
    elif packed:  # (inputs / block, outputs)
        described.scales = state.absmax.t().float()

    def dequantize() -> Tensor:
        ordered = _unpacked(codes) if packed else codes
        return dequantize_four_bit(ordered.view(shape[0], shape[1] // 2), described)

    return LayerWeights("4-bit", shape, codes, dequantize, tensors)


def four_bit(state: Any) -> FourBit:
    """What bitsandbytes' ``QuantState`` describes; with double quantization the scales are codes as well."""
    described = FourBit(state.code, state.blocksize, state.absmax)
    if state.nested:
        described.nested_table, described.nested_scales = state.state2.code, state.state2.absmax
        described.nested_offset = float(state.offset)
    return described


@to_native.register(Linear8bitLt)
def _(module: Any, arena: Arena) -> NativeLinear | None:
    """LLM.int8 at threshold 0 is the same product; above it, outlier columns are computed separately."""
    scales = getattr(module.weight, "SCB", None)
    if scales is None or module.state.threshold or not kernels.supports("int8", module.in_features):
        return None
    scales = scales.float() / _INT8_LEVELS
    linear = NativeLinear("int8", module.weight.data, module.bias, scales, arena=arena)
    linear.input_scale = getattr(module, "input_scale", None)
    return linear


@to_native.register(Linear4bit)
def _(module: Any, arena: Arena) -> NativeLinear | None:
    state = getattr(module.weight, "quant_state", None)
    inputs, outputs = module.in_features, module.out_features
    if state is None or inputs % state.blocksize or not kernels.supports("four-bit", state.blocksize):
        return None
    if state.nested and state.state2.blocksize != _NESTED_BLOCK:
        return None
    codes = module.weight.data.reshape(outputs, inputs // 2)
    return NativeLinear("four-bit", codes, module.bias, four_bit=four_bit(state), arena=arena)


def _unpacked(codes: Tensor) -> Tensor:
    """Restores the order of codes that bitsandbytes repacks for AVX-512 in a layer's first forward pass.

    Packed: by 32 outputs, all inputs; in 32 bytes the first 32 codes of (input pair, output, of the pair) in
    the lower halves, the next 32 in the upper ones (``_convert_weight_packed_for_cpu`` of bitsandbytes 0.50).
    """
    outputs, pairs = codes.shape
    bytes_ = codes.reshape(-1, _PACKED_ROWS)
    nibbles = torch.cat([bytes_ & 15, bytes_ >> 4], dim=1)
    nibbles = nibbles.view(outputs // _PACKED_ROWS, pairs, _PACKED_ROWS, 2).transpose(1, 2).contiguous()
    first, second = nibbles.view(outputs, pairs, 2).unbind(-1)
    return first << 4 | second
