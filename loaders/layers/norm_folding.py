"""Outlier channels of norms, scaled down before the linear layers that follow are quantized.

A norm's gain (and bias) may make a few channels many times larger than the others; the weights that multiply
them are then as much smaller, and both lose precision in int8. Dividing a channel's gain and bias by d and
multiplying the following weights of that channel by d leaves the function as it was, exactly, if d is a power
of two (SmoothQuant, arXiv:2211.10438, moves scales between the two in the same place).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loaders.architectures import UnsupportedArchitecture, architecture_of

_OUTLIER, _FARTHEST = 2, 40  # powers of two off the usual balance, at which a channel is an outlier


def fold_norms(model: PreTrainedModel, head: bool) -> dict[str, Tensor]:
    """Divides channels of norms by powers of two, so that no channel is much larger than the others.

    Args:
        head: the last norm too; only if the caller gives the head weights of its own.

    Returns: by the name of each following linear layer the (inputs,) factors that the caller must multiply
        its weights by; without entries for an architecture that ``loaders.architectures`` lacks.
    """
    factors: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    for norm, linears in _pairs(model, head):
        if not _foldable(norm, linears):
            continue
        divisor = _divisor(norm, linears)
        norm.weight.data = (norm.weight.data / divisor).to(norm.weight.dtype)  # exact, in 16 bits as well
        if _bias(norm) is not None:
            norm.bias.data = (norm.bias.data / divisor).to(norm.bias.dtype)
        factors |= {names[linear]: divisor for linear in linears}
    return factors


def fold_into_weights(model: PreTrainedModel, head: bool) -> dict[str, Tensor]:
    """Folds norms, and multiplies the weights of the layers that follow: the function stays as it was.

    Args:
        head: the last norm too; a tied head then has a matrix of its own.

    Returns: as ``fold_norms``, of the layers whose weights were multiplied.
    """
    factors = fold_norms(model, head)
    for name, factor in factors.items():
        layer: Any = model.get_submodule(name)
        scaled = layer.weight.detach() * (factor[:, None] if isinstance(layer, Conv1D) else factor)
        layer.weight = nn.Parameter(scaled.to(layer.weight.dtype), requires_grad=False)
    return factors


def _pairs(model: PreTrainedModel, head: bool) -> list[tuple[Any, list[Any]]]:
    """Each norm, and the linear layers that alone read its output."""
    try:
        architecture = architecture_of(model.config)
    except UnsupportedArchitecture:
        return []
    names = architecture.block
    if architecture.norm_offset or type(model).__name__ != architecture.model_class:
        return []  # an offset is added to the weights of norms: they are not the gains
    found = [
        (block.get_submodule(norm), [block.get_submodule(name) for name in linears])
        for block in model.get_submodule(architecture.blocks)
        for norm, linears in ((names.before_attention, names.qkv), (names.before_mlp, names.mlp_in))
    ]
    if head:
        found.append((model.get_submodule(architecture.last), [model.get_submodule(architecture.head)]))
    return found


def _foldable(norm: Any, linears: Sequence[Any]) -> bool:
    """Whether these are a norm with a gain, and linear layers in floating point on its channels."""
    return getattr(norm, "weight", None) is not None and all(
        isinstance(linear, nn.Linear | Conv1D) and linear.weight.is_floating_point() for linear in linears
    )


def _bias(norm: Any) -> Tensor | None:
    bias: Tensor | None = getattr(norm, "bias", None)
    return bias


def _divisor(norm: Any, linears: Sequence[Any]) -> Tensor:
    """(channels,) powers of two; 1 for channels that are no outliers, whose balance training has found.

    Normalized values have a variance of 1, so that gain and bias tell the size of a channel. The divisor is
    the root of its ratio to the size of the weights, against that of the other channels.
    """
    size, bias = norm.weight.detach().float().abs(), _bias(norm)
    if bias is not None:
        size = torch.hypot(size, bias.detach().float())
    ratio = (size / torch.stack([_columns(linear) for linear in linears]).amax(dim=0)).log2() / 2
    usual = ratio[ratio.isfinite()]  # not so of channels of zeros
    if not len(usual):
        return torch.ones_like(size)
    power = (ratio - usual.median()).round()
    outlier = power.isfinite() & (power.abs() >= _OUTLIER) & (power.abs() < _FARTHEST)
    return torch.where(outlier, power, 0.0).exp2()


def _columns(linear: Any) -> Tensor:
    """(inputs,) largest magnitude of the weights of each input."""
    weight: Tensor = linear.weight.detach()
    return weight.float().abs().amax(dim=1 if isinstance(linear, Conv1D) else 0)
