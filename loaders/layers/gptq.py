"""Rounding of weights to int4 codes so that a layer's outputs on calibration text change least: GPTQ.

Frantar et al., arXiv:2210.17323: inputs are rounded one after another; the error of each is compensated by
the weights that are not rounded yet, by the inverse of H = Σ x xᵀ over the calibration inputs. As in its
authors' code, inputs with the largest H_ii come first (act-order), and the scales of groups are those of the
weights before any compensation (static groups). A scale is the one of several candidates with the least
Σ H_ii (w − ŵ)², each a least squares fit to its codes (as ``quantize_row_iq4_nl_impl`` of llama.cpp).
"""

import torch
from torch import Tensor
from torch.nn import functional

from loaders.kernels.matrix import INT4_GROUP, FourBit
from loaders.layers.int4_codes import TABLE, groups_of_inputs, in_groups, pack_codes

_DAMPING = 0.01  # of the mean of the diagonal, added to it
_DAMPINGS = 4  # ten times as much, if the matrix isn't positive definite
_FRACTIONS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)  # of the range of a group that the table spans
_LEVELS = 127  # of the scales of groups
_INPUTS = 128  # rounded before the later ones are compensated in one product
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
    damped = None if hessian is None else _factor(hessian)
    importance = torch.ones(inputs) if hessian is None or damped is None else _importance(hessian)
    scales, of_outputs = _scales(weight, importance)
    groups = groups_of_inputs(inputs)
    exact = (scales.float() * of_outputs[:, None]).t().contiguous()
    if hessian is None or damped is None:
        codes = _nearest(weight / _divisors(exact).t()[:, groups])
    else:
        order, factor = damped
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        codes[:, order] = _compensated(weight.t()[order].contiguous(), exact, groups[order], factor).t()
    table = torch.tensor(TABLE, dtype=torch.int8)
    return pack_codes(codes), FourBit(table, INT4_GROUP, scales, nested_scales=of_outputs)


def _importance(hessian: Tensor) -> Tensor:
    diagonal = hessian.diagonal()
    return diagonal / diagonal.mean() + _DAMPING


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor] | None:
    """The order of the inputs, and the upper Cholesky factor of H⁻¹ in it; None if H is not usable."""
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order].double()
    mean = float(diagonal.double().mean())
    if not 0 < mean < torch.inf:
        return None
    for attempt in range(_DAMPINGS):
        damped = ordered.clone()
        damped.diagonal().add_(_DAMPING * 10**attempt * mean)
        lower, fault = torch.linalg.cholesky_ex(damped)
        if fault:
            continue
        factor, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not fault and factor.isfinite().all():
            return order, factor.float()
    return None


def _nearest(scaled: Tensor) -> Tensor:
    return _NEAREST[(scaled.round().clamp_(-128, 127) + 128).long()]


def _values(scaled: Tensor) -> Tensor:
    """The nearest values of the table."""
    places = scaled.round_().clamp_(-128, 127).add_(128).int()
    return functional.embedding(places, _VALUES).squeeze(-1)


def _scales(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, groups) int8 and (outputs,) float32: their product is the scale of a group."""
    of_groups = in_groups(importance[None])[0]
    rows = max(1, _WEIGHTS // weight.shape[1])
    best = torch.cat([_best_scales(in_groups(part), of_groups) for part in weight.split(rows)])
    of_outputs = best.abs().amax(dim=1) / _LEVELS
    of_outputs = torch.where(of_outputs > 0, of_outputs, 1.0)
    codes = (best / of_outputs[:, None]).round()
    codes = torch.where(codes == 0, best.sign(), codes)  # 0 for groups of zeros alone
    return codes.to(torch.int8), of_outputs


def _divisors(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def _best_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """(rows, groups) of (rows, groups, 16) weights, by (groups, 16) importance.

    With codes q the best scale is Σ h w q / Σ h q², and lowers the error by (Σ h w q)² / Σ h q².
    """
    largest = weight.gather(-1, weight.abs().argmax(dim=-1, keepdim=True))
    weighted = weight * importance
    most, best = torch.zeros(weight.shape[:2]), torch.zeros(weight.shape[:2])
    for end in (TABLE[0], TABLE[-1]):
        unit = torch.where(largest == 0, 0.0, weight * (end / largest))
        for fraction in _FRACTIONS:
            values = _values(unit / fraction)
            along, length = (weighted * values).sum(-1), (values * values * importance).sum(-1)
            gain = along * along / length
            better = gain > most
            most, best = torch.where(better, gain, most), torch.where(better, along / length, best)
    return best


def _compensated(weight: Tensor, scales: Tensor, groups: Tensor, factor: Tensor) -> Tensor:
    """(inputs, outputs) codes of weights that are overwritten.

    Args:
        weight: (inputs, outputs), the inputs in the order in which they are rounded.
        scales: (groups, outputs).
        groups: of each input.
        factor: upper triangular, U with H⁻¹ = Uᵀ U.
    """
    inputs, outputs = weight.shape
    places = torch.empty(inputs, outputs)
    divisors = _divisors(scales)
    pivots, group = factor.diagonal().tolist(), groups.tolist()
    for start in range(0, inputs, _INPUTS):
        end = min(start + _INPUTS, inputs)
        errors = torch.empty(end - start, outputs)
        for k in range(start, end):
            scale = scales[group[k]]
            torch.div(weight[k], divisors[group[k]], out=places[k])
            error = torch.sub(weight[k], _values(places[k].clone()).mul_(scale), out=errors[k - start])
            error.div_(pivots[k])
            if k + 1 < end:
                weight[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        if end < inputs:
            weight[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return _nearest(places)
