"""The weights that a layer multiplies with, read from its products."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders.layers.layer_weights import LayerWeights


def multiplied_weights(module: Any, weights: LayerWeights) -> Tensor:
    """(outputs, inputs): the layer's outputs for multiples of the rows of an identity."""
    plain = isinstance(module, nn.Linear | Conv1D) and not weights.quantized
    values = exact_inputs(weights)
    with torch.inference_mode():
        rows = torch.diag(values).to(weights.weight.dtype if plain else torch.float32)
        product = module(rows) - (0 if module.bias is None else module.bias)
    found: Tensor = product.t().float() / values
    return found


def exact_inputs(weights: LayerWeights) -> Tensor:
    """(inputs,) values other than 0 that aren't rounded: 1, or the value of a constant scale's last code."""
    if weights.input_factors is None:
        return torch.ones(weights.shape[1])
    factors, zero_points = weights.input_factors.unbind()
    return (torch.where(zero_points > 0, -128.0, 127.0) - zero_points) / factors
