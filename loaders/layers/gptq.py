"""GPTQ: rounding weights so that a layer's outputs on calibration text change least.

Frantar et al., arXiv:2210.17323: inputs are rounded one after another; the error of each is compensated by
the weights that are not rounded yet, by the inverse of H = Σ x xᵀ over the calibration inputs. As in its
authors' code, inputs with the largest H_ii come first (act-order), and the scales of groups are those of the
weights before any compensation (static groups), which the caller chooses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the diagonal, added to it."""
_DAMPINGS = 4  # ten times as much, if the matrix isn't positive definite
_INPUTS = 128  # rounded before the later ones are compensated in one product

Nearest = Callable[[Tensor, int], Tensor]
"""The values that the codes have for the (outputs,) weights of an input, in a new tensor."""
Factored = tuple[Tensor, Tensor]
"""The order in which inputs are rounded, and U in it, upper triangular, with H⁻¹ = Uᵀ U."""


def importance(hessian: Tensor | None, inputs: int) -> Tensor:
    """(inputs,) how much the error of each input's weights counts, for the choice of scales."""
    if hessian is None:
        return torch.ones(inputs)
    diagonal = hessian.diagonal()
    return diagonal / diagonal.mean() + DAMPING


def factored(hessian: Tensor | None) -> Factored | None:
    """The Cholesky factor of a matrix (inputs, inputs) Σ x xᵀ; None without one, or if it is not usable."""
    if hessian is None:
        return None
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order].double()
    mean = float(diagonal.double().mean())
    if not 0 < mean < torch.inf:
        return None
    for attempt in range(_DAMPINGS):
        damped = ordered.clone()
        damped.diagonal().add_(DAMPING * 10**attempt * mean)
        lower, fault = torch.linalg.cholesky_ex(damped)
        if fault:
            continue
        factor, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not fault and factor.isfinite().all():
            return order, factor.float()
    return None


def compensated(weight: Tensor, known: Factored, nearest: Nearest) -> Tensor:
    """(outputs, inputs) weights, each as it is when it is rounded; their nearest codes are GPTQ's.

    Args:
        weight: (outputs, inputs) float32.
    """
    order, factor = known
    rows = weight.t()[order].contiguous()
    pivots, inputs = factor.diagonal().tolist(), order.tolist()
    for start in range(0, len(rows), _INPUTS):
        end = min(start + _INPUTS, len(rows))
        errors = torch.empty(end - start, rows.shape[1])
        for k in range(start, end):
            error = torch.sub(rows[k], nearest(rows[k], inputs[k]), out=errors[k - start])
            error.div_(pivots[k])
            if k + 1 < end:
                rows[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        if end < len(rows):
            rows[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    found = torch.empty_like(weight)
    found[:, order] = rows.t()
    return found
