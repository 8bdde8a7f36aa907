"""The weights of an int4 matrix as the compiled kernels read them: codes in pairs, groups that share a scale.

The kernels multiply 64 inputs at a time in 16 lanes of four. Four such steps are a group of steps: in a lane
its 16 weights share a scale, and so do the activations that they are multiplied with. The steps behind the
last whole group are groups of their own, in which four lanes share a scale.
"""

import torch
from torch import Tensor

from loaders.kernels.matrix import INT4_GROUP, INT8_LANES, FourBit

STEP = 64
"""Inputs multiplied at a time; those of a matrix are a multiple of it."""
_STEPS = 4
_WHOLE = STEP * _STEPS

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of the codes: denser near zero, where most weights are. llama.cpp's IQ4_NL (``kvalues_iq4nl`` in
ggml-common.h); a scale of either sign chooses which end has the larger magnitude."""


def in_groups(matrix: Tensor) -> Tensor:
    """(rows, inputs) → (rows, inputs / 16, 16): the weights of each group; inputs are a multiple of 64."""
    rows, inputs = matrix.shape
    whole = inputs // _WHOLE * _WHOLE
    lanes = matrix[:, :whole].reshape(rows, -1, _STEPS, INT8_LANES, 4).transpose(2, 3)
    rest = matrix[:, whole:].reshape(rows, -1, INT4_GROUP)
    return torch.cat([lanes.reshape(rows, -1, INT4_GROUP), rest], dim=1)


def groups_of_inputs(inputs: int) -> Tensor:
    """(inputs,) the group of each input."""
    grouped = in_groups(torch.arange(inputs)[None])[0]
    found = torch.empty(inputs, dtype=torch.int64)
    found[grouped] = torch.arange(len(grouped))[:, None]
    return found


def int4_bytes(outputs: int, inputs: int) -> int:
    """Bytes of a matrix's codes and scales."""
    return outputs * (inputs // 2 + inputs // INT4_GROUP + 4)


def pack_codes(codes: Tensor) -> Tensor:
    """(outputs, inputs) codes 0 … 15 → (outputs, inputs / 2) bytes in the order of ``int4.h``."""
    outputs, inputs = codes.shape
    whole = inputs // _WHOLE * _WHOLE
    pairs = codes[:, :whole].to(torch.uint8).reshape(outputs, -1, 2, STEP)
    halves = codes[:, whole:].to(torch.uint8).reshape(outputs, -1, 2, STEP // 2)
    packed = [(part[:, :, 0] | part[:, :, 1] << 4).reshape(outputs, -1) for part in (pairs, halves)]
    return torch.cat(packed, dim=1)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of ``pack_codes``."""
    outputs, whole = packed.shape[0], 2 * packed.shape[1] // _WHOLE * _WHOLE // 2
    pairs, halves = (
        packed[:, :whole].unflatten(1, (-1, STEP)),
        packed[:, whole:].unflatten(1, (-1, STEP // 2)),
    )
    parts = [torch.stack([part & 15, part >> 4], dim=2).reshape(outputs, -1) for part in (pairs, halves)]
    return torch.cat(parts, dim=1)


def dequantize_int4(packed: Tensor, state: FourBit) -> Tensor:
    """(outputs, inputs) float32 of (outputs, inputs / 2) bytes."""
    assert state.nested_scales is not None
    codes = unpack_codes(packed).int()
    scales = state.scales.float() * state.nested_scales[:, None]
    return state.table.float()[codes] * scales[:, groups_of_inputs(codes.shape[1])]
