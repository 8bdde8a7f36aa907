"""Inputs that a layer multiplies without rounding them."""

import torch
from torch import Tensor

from loaders.layers.layer_weights import LayerWeights


def exact_inputs(weights: LayerWeights) -> Tensor:
    """(inputs,) values other than 0: 1, or what the last code of a constant scale stands for."""
    if weights.input_factors is None:
        return torch.ones(weights.shape[1])
    factors, zero_points = weights.input_factors
    return (torch.where(zero_points > 0, -128.0, 127.0) - zero_points) / factors
