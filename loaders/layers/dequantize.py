"""Quantized codes and their state → the float32 matrix that they represent.

Independent of bitsandbytes, whose own functions depend on the device and on whether a layer has run.
"""

import torch
from torch import Tensor
from torch.nn import functional

from loaders.kernels import FourBit


def dequantize_int8(codes: Tensor, scales: Tensor, input_factors: Tensor | None = None) -> Tensor:
    """(outputs, inputs) of int8 codes and scales: (outputs,), or (outputs, 16) with one per lane of a row.

    Args:
        input_factors: of static-int8: the first row multiplies the inputs.
    """
    if input_factors is not None:
        return codes.float() * scales[:, None] * input_factors[0]
    if scales.dim() == 1:
        return codes.float() * scales[:, None]
    outputs, lanes = scales.shape
    return (codes.view(outputs, -1, lanes, 4) * scales.float()[:, None, :, None]).view(codes.shape)


def dequantize_four_bit(codes: Tensor, state: FourBit) -> Tensor:
    """(outputs, inputs) of (outputs, inputs / 2) bytes, the first of two weights in the upper half."""
    scales = state.scales.reshape(-1)
    if state.nested_table is not None and state.nested_scales is not None:
        outer = state.nested_scales.repeat_interleave(256)[: len(scales)]  # one for 256 inner ones
        scales = state.nested_table[scales.long()] * outer + state.nested_offset
    table = state.table
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=-1)  # of every byte
    weights = functional.embedding(codes.reshape(-1).int(), pairs)
    return weights.view(-1, state.block).mul_(scales[:, None]).view(codes.shape[0], -1)
