"""Quantized codes and their state → the float32 matrix that they represent.

Independent of bitsandbytes, whose own functions depend on the device and on whether a layer has run.
"""

import torch
from torch import Tensor

from loaders.kernels import FourBit


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """(outputs, inputs) of int8 codes and scales: (outputs,), or (outputs, 16) with one per lane of a row."""
    if scales.dim() == 1:
        return codes.float() * scales[:, None]
    outputs, lanes = scales.shape
    return (codes.view(outputs, -1, lanes, 4) * scales.float()[:, None, :, None]).view(codes.shape)


def dequantize_four_bit(codes: Tensor, state: FourBit) -> Tensor:
    """(outputs, inputs) of (outputs, inputs / 2) bytes, the first of two weights in the upper half."""
    nibbles = torch.stack([codes >> 4, codes & 15], dim=-1)
    scales = state.scales.reshape(-1)
    if state.nested_table is not None and state.nested_scales is not None:
        outer = state.nested_scales.repeat_interleave(256)[: len(scales)]  # one for 256 inner ones
        scales = state.nested_table[scales.long()] * outer + state.nested_offset
    weights = state.table[nibbles.view(-1).int()]
    blocks = scales.repeat_interleave(state.block)[: len(weights)]
    return weights.mul_(blocks).view(codes.shape[0], -1)
