"""Rounding of weights to int4 codes, calibrated by GPTQ.

The scale of a group is the one of several candidates with the least Σ H_ii (w − ŵ)², each a least squares fit
to its codes (as ``quantize_row_iq4_nl_impl`` of llama.cpp).
"""

import torch
from torch import Tensor
from torch.nn import functional

from loaders.kernels.matrix import INT4_GROUP, FourBit
from loaders.layers.gptq import compensated, factored, importance
from loaders.layers.int4_codes import TABLE, groups_of_inputs, in_groups, pack_codes

_FRACTIONS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)  # of the range of a group that the table spans
_LEVELS = 127  # of the scales of groups
_TINY = 1e-36  # weights below it count as zero: the quotient by one may be infinite
_WEIGHTS = 2**16  # whose scales are found at a time: they stay in the cache

_TABLE = torch.tensor(TABLE, dtype=torch.float32)
_EDGES = (_TABLE[1:] + _TABLE[:-1]) / 2
_NEAREST = torch.bucketize(torch.arange(-128.0, 128.0), _EDGES).to(torch.uint8)  # by a rounded value + 128
_VALUES = _TABLE[_NEAREST.long()][:, None]


def quantize(weight: Tensor, hessian: Tensor | None) -> tuple[Tensor, FourBit]:
    """The codes and scales of a matrix.

    Args:
        weight: (outputs, inputs) float32; inputs are a multiple of 64.
        hessian: (inputs, inputs) Σ x xᵀ; None: without calibration, to the nearest code.

    Returns: (outputs, inputs / 2) bytes as ``int4_codes`` packs them, and their state.
    """
    inputs = weight.shape[1]
    known = factored(hessian)
    scales, of_outputs = group_scales(weight, importance(None if known is None else hessian, inputs))
    groups = groups_of_inputs(inputs)
    exact = (scales.float() * of_outputs[:, None]).t().contiguous()
    divisors, group = nonzero(exact), groups.tolist()
    if known is not None:

        def nearest(weights: Tensor, at: int) -> Tensor:
            return _values(weights / divisors[group[at]]).mul_(exact[group[at]])

        weight = compensated(weight, known, nearest)
    codes = nearest_codes(weight / divisors.t()[:, groups])
    table = torch.tensor(TABLE, dtype=torch.int8)
    return pack_codes(codes), FourBit(table, INT4_GROUP, scales, nested_scales=of_outputs)


def nearest_codes(scaled: Tensor) -> Tensor:
    """The uint8 codes of weights divided by their scales."""
    return _NEAREST[(scaled.round().clamp_(-128, 127) + 128).long()]


def _values(scaled: Tensor) -> Tensor:
    """The nearest values of the table."""
    places = scaled.round_().clamp_(-128, 127).add_(128).int()
    return functional.embedding(places, _VALUES).squeeze(-1)


def group_scales(weight: Tensor, of_inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, groups) int8 and (outputs,) float32: their product is the scale of a group.

    Args:
        of_inputs: (inputs,) as from ``importance``.
    """
    of_groups = in_groups(of_inputs[None])[0]
    rows = max(1, _WEIGHTS // weight.shape[1])
    best = torch.cat([_best_scales(in_groups(part), of_groups) for part in weight.split(rows)])
    of_outputs = best.abs().amax(dim=1) / _LEVELS
    of_outputs = torch.where(of_outputs > 0, of_outputs, 1.0)
    codes = (best / of_outputs[:, None]).round()
    codes = torch.where(codes == 0, best.sign(), codes)  # 0 for groups of zeros alone
    return codes.to(torch.int8), of_outputs


def nonzero(scales: Tensor) -> Tensor:
    """The divisors of weights: 1 for a scale of 0, which is that of a group of zeros."""
    return torch.where(scales == 0, 1.0, scales)


def _best_scales(weight: Tensor, of_inputs: Tensor) -> Tensor:
    """(rows, groups) of (rows, groups, 16) weights, by the (groups, 16) importance of inputs.

    With codes q the best scale is Σ h w q / Σ h q², and lowers the error by (Σ h w q)² / Σ h q².
    """
    largest = weight.gather(-1, weight.abs().argmax(dim=-1, keepdim=True))
    weighted = weight * of_inputs
    most, best = torch.zeros(weight.shape[:2]), torch.zeros(weight.shape[:2])
    for end in (TABLE[0], TABLE[-1]):
        unit = torch.where(largest.abs() < _TINY, 0.0, weight * (end / largest))
        for fraction in _FRACTIONS:
            values = _values(unit / fraction)
            along, length = (weighted * values).sum(-1), (values * values * of_inputs).sum(-1)
            gain = along * along / length
            better = gain > most
            most, best = torch.where(better, gain, most), torch.where(better, along / length, best)
    return best
