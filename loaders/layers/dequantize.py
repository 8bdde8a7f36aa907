"""A loaded matrix as it is kept: its format, its bytes, and the float32 weights that it stands for.

Read from the tensors of every kind of layer that the loaders leave behind, without bitsandbytes' own code:
what that can dequantize depends on the device and on whether a layer has run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders.kernels import FourBit
from loaders.layers.dynamic_int8_linear import DynamicInt8Linear
from loaders.layers.native_linear import NativeLinear

_INT8_LEVELS = 127  # bitsandbytes' scales are rows' largest magnitudes
_PACKED_ROWS = 32  # outputs side by side in bitsandbytes' layout for AVX-512


@dataclass(frozen=True)
class StoredMatrix:
    """One layer's weights as they lie in memory.

    Args:
        format: ``float32``, ``int8``, ``4-bit`` …
        quantized: whether the weights are codes with scales.
        nbytes: of the weights and all that describes their quantization, biases left out.
        address: tells whose weights they are; two layers with one share them.
        dense: makes the (outputs, inputs) float32 matrix; on the weights' device.
    """

    format: str
    quantized: bool
    nbytes: int
    address: int
    dense: Callable[[], Tensor]


def stored(module: nn.Module) -> StoredMatrix | None:
    """What a linear layer or an embedding keeps; None for any other module."""
    if isinstance(module, NativeLinear):
        return _native(module)
    if isinstance(module, DynamicInt8Linear):
        return _dynamic_int8(module)
    if isinstance(module, Conv1D | nn.Linear | nn.Embedding):
        kind = type(module).__name__
        if kind == "Linear8bitLt":
            return _linear_8bit(module)
        if kind == "Linear4bit":
            return _linear_4bit(module)
        return _dense(module)
    return None


def _dense(module: Any) -> StoredMatrix:
    weight: Tensor = module.weight.detach()
    transposed = isinstance(module, Conv1D)
    return StoredMatrix(
        str(weight.dtype).removeprefix("torch."),
        False,
        weight.nbytes,
        weight.data_ptr(),
        lambda: (weight.t() if transposed else weight).float(),
    )


def _native(module: NativeLinear) -> StoredMatrix:
    if not module.is_quantized:
        return _dense(module)
    weight = module.weight.detach()
    size = weight.nbytes + sum(tensor.nbytes for _, tensor in module.state())
    if (four_bit := module.four_bit) is not None:
        return StoredMatrix("4-bit", True, size, weight.data_ptr(), lambda: _four_bit(weight, four_bit))
    assert module.scales is not None
    return _int8(weight, module.scales.detach(), size)


def _dynamic_int8(module: DynamicInt8Linear) -> StoredMatrix:
    parts = dict(module.unpacked())
    size = sum(tensor.nbytes for tensor in parts.values())
    return _int8(parts["weights"], parts["scales"], size, address=id(module))  # the parts are copies


def _int8(codes: Tensor, scales: Tensor, size: int, address: int | None = None) -> StoredMatrix:
    where = codes.data_ptr() if address is None else address
    return StoredMatrix("int8", True, size, where, lambda: codes.float() * scales[:, None])


def _linear_8bit(module: Any) -> StoredMatrix:
    """bitsandbytes moves the scales to the layer's state in its first forward pass."""
    held = module.weight.SCB
    scales: Tensor = module.state.SCB if held is None else held
    codes: Tensor = module.weight.data
    return _int8(codes, scales.float() / _INT8_LEVELS, codes.nbytes + scales.nbytes)


def _linear_4bit(module: Any) -> StoredMatrix:
    state, codes = module.weight.quant_state, module.weight.data
    packed = getattr(state, "packing_format_for_cpu", False)
    described = FourBit(state.code, state.blocksize, state.absmax)
    tensors = [codes, state.code, state.absmax]
    if state.nested:
        described.nested_table, described.nested_scales = state.state2.code, state.state2.absmax
        described.nested_offset = float(state.offset)
        tensors += [state.state2.code, state.state2.absmax, state.offset]
    elif packed:  # (inputs / block, outputs)
        described.scales = state.absmax.t().float()
    size = sum(tensor.nbytes for tensor in tensors)

    def dense() -> Tensor:
        ordered = _unpacked(codes) if packed else codes
        return _four_bit(ordered.view(module.out_features, module.in_features // 2), described)

    return StoredMatrix("4-bit", True, size, codes.data_ptr(), dense)


def _four_bit(codes: Tensor, state: FourBit) -> Tensor:
    """(outputs, inputs) of (outputs, inputs / 2) bytes, the first of two weights in the upper half."""
    nibbles = torch.stack([codes >> 4, codes & 15], dim=-1)
    scales = state.scales.reshape(-1)
    if state.nested_table is not None and state.nested_scales is not None:
        outer = state.nested_scales.repeat_interleave(256)[: len(scales)]  # one for 256 inner ones
        scales = state.nested_table[scales.long()] * outer + state.nested_offset
    weights = state.table[nibbles.view(-1).int()]
    blocks = scales.repeat_interleave(state.block)[: len(weights)]
    return weights.mul_(blocks).view(codes.shape[0], -1)


def _unpacked(codes: Tensor) -> Tensor:
    """The usual order of codes that bitsandbytes repacked for AVX-512 at a layer's first forward pass.

    Packed: by 32 outputs, all inputs; in 32 bytes the first 32 codes of (input pair, output, of the pair) in
    the lower halves, the next 32 in the upper ones (``_convert_weight_packed_for_cpu`` of bitsandbytes 0.50).
    """
    outputs, pairs = codes.shape
    bytes_ = codes.reshape(-1, _PACKED_ROWS)
    nibbles = torch.cat([bytes_ & 15, bytes_ >> 4], dim=1)
    nibbles = nibbles.view(outputs // _PACKED_ROWS, pairs, _PACKED_ROWS, 2).transpose(1, 2).contiguous()
    first, second = nibbles.view(outputs, pairs, 2).unbind(-1)
    return first << 4 | second
