"""Grids of int8 layers: which weights of a matrix, and which activations, share a scale.

``GROUPS`` is the compiled kernels' own. LiteRT has ``CHANNELS``, which the kernels compute as well: theirs is
finer, and represents the same weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loaders.kernels.matrix import ACTIVATION_GROUP, INT8_LANES
from loaders.layers.dynamic_int8_linear import bfloat16_above, quantize_lanes

_STEPS, _LANE_VALUES = 4, 4  # an activation's group of 16: four values in each of four steps
_TINY = torch.finfo(torch.float32).tiny


class Int8Grid(NamedTuple):
    """How a layer is rounded.

    Args:
        quantize: (outputs, inputs) float32 weights → codes of that shape and (outputs, 16) bfloat16 scales,
            as in ``kernels.PackedMatrix``.
        round: activations of any shape → the values of their codes.
    """

    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    round: Callable[[Tensor], Tensor]


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As ``quantize_lanes``, with one scale for all weights of an output."""
    scales = bfloat16_above((weight.abs().amax(dim=1) / 127).clamp_min(_TINY))
    codes = (weight / scales[:, None]).round_().to(torch.int8)
    return codes, scales.bfloat16()[:, None].expand(-1, INT8_LANES).contiguous()


def round_rows(x: Tensor) -> Tensor:
    """Activations as LiteRT rounds them to int8, with a scale and a zero point for each row.

    Source: XNNPACK, ``xnn_f32_qd8_asymmetric_quantization_params``.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(_TINY)
    zero_point = (-128 - low / scale).round_()
    codes = (x / scale).round_().add_(zero_point).clamp_(-128, 127)
    return codes.sub_(zero_point).mul_(scale)


def round_groups(x: Tensor) -> Tensor:
    """Activations as the kernels round them to int8 (``int8_rows.h``), with a scale for 16 values.

    The values of a group are strided: of four steps of 64 inputs, the four of one lane; in each of the last
    steps of a row, four values have a scale of their own.
    """
    step = INT8_LANES * _LANE_VALUES
    whole = x.shape[-1] // (_STEPS * step) * _STEPS * step
    parts = x[..., :whole], x[..., whole:]
    shapes = (-1, _STEPS, INT8_LANES, _LANE_VALUES), (-1, 1, INT8_LANES, _LANE_VALUES)
    rounded = [_round_each(part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True)]
    found = [one.reshape(part.shape) for one, part in zip(rounded, parts, strict=True)]
    return torch.cat(found, dim=-1)


def _round_each(groups: Tensor) -> Tensor:
    ranges = groups.abs().amax(dim=(-1, -3), keepdim=True)
    inverse = torch.where(ranges >= 1e-30, 127 / ranges, 0.0)
    return (groups * inverse).round_() * (ranges / 127)


GROUPS, CHANNELS = Int8Grid(quantize_lanes, round_groups), Int8Grid(quantize_channels, round_rows)
assert ACTIVATION_GROUP == _STEPS * _LANE_VALUES
