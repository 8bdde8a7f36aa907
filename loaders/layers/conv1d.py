"""GPT-2's ``Conv1D`` → ``nn.Linear``: the same product, weight transposed, which quantizers look for."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def to_linear(layer: nn.Linear | Conv1D) -> nn.Linear:
    """A linear layer with (out, in) weight from a Conv1D's (in, out) one; the bias is shared.

    A layer that is nn.Linear already is returned unchanged.
    """
    if isinstance(layer, nn.Linear):
        return layer
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear
