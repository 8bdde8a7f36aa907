"""A precision in one file: int8 weights with one scale an output, multiplied in float32."""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loaders.base import Availability, LoadedModel, ModelSpec, Progress
from loaders.footprint import count_parameters, linear_weights, measure, reasons
from loaders.layers.conv1d import to_linear
from loaders.layers.layer_weights import LayerWeights
from loaders.pretrained import load_pretrained, meta_model
from loaders.runners.select import runner_for


class ToyInt8Linear(nn.Module):
    """y = x Wᵀ + b with W rounded to int8.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.scales: Tensor
        self.codes: Tensor
        self.register_buffer("scales", weight.abs().amax(dim=1) / 127)
        self.register_buffer("codes", (weight / self.scales[:, None]).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._dequantize(), self.bias)

    def layer_weights(self) -> LayerWeights:
        outputs, inputs = self.codes.shape
        state = [("scales", self.scales)]
        return LayerWeights("toy-int8", (outputs, inputs), self.codes, self._dequantize, state)

    def _dequantize(self) -> Tensor:
        return self.codes.float() * self.scales[:, None]


def availability(precision: str, device: Literal["cpu", "cuda"]) -> Availability:
    return Availability() if device == "cpu" else Availability("it is a toy for CPUs")


def estimate_bytes(precision: str, spec: ModelSpec) -> int:
    model = meta_model(spec)
    return 4 * count_parameters(model) - 3 * linear_weights(model)


def load(precision: str, spec: ModelSpec, progress: Progress) -> LoadedModel:
    model = load_pretrained(spec, progress, dtype=torch.float32, device_map="cpu")
    parameters, head = count_parameters(model), model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            linear = to_linear(module)
            model.set_submodule(name, ToyInt8Linear(linear.weight.detach(), linear.bias))
    footprint = measure(model, parameters, reasons(model, "the head is kept in float32"))
    return LoadedModel(precision, runner_for(model, spec), footprint, details={"kernels": "torch"})
