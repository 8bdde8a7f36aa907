"""The linear layers of a model, by name and shape: what precisions quantize, and what they can't.

The reasons are parts of sentences that a user reads: each names the first layer that it is about.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Linear: TypeAlias = nn.Linear | Conv1D


def shape_of(layer: Linear) -> tuple[int, int]:
    """(outputs, inputs)"""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def inner_layers(model: PreTrainedModel) -> Iterator[tuple[str, Linear]]:
    """All linear layers but the output head, with their names."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


def is_read_directly(name: str) -> bool:
    """Whether ``transformers`` multiplies with the layer's weight itself, as it does in Mamba and Jamba."""
    return name.endswith((".mixer.dt_proj", ".mamba.dt_proj"))


def read_directly(model: PreTrainedModel) -> str | None:
    """The reason that a weight must stay a plain tensor; None if none must."""
    names = (name for name, _ in inner_layers(model) if is_read_directly(name))
    return next((f"the model's code multiplies with {name}'s weight itself" for name in names), None)


def none_to_quantize(model: PreTrainedModel) -> str | None:
    """The reason that a model has no linear layer to quantize beside its head; None if it has."""
    if not any(True for _ in inner_layers(model)):
        return "the model has no linear layer beside its head"
    return read_directly(model)


def uneven_inputs(layers: Iterable[tuple[str, Linear]], multiple: int) -> str | None:
    """The reason that a row of weights can't be divided into groups of ``multiple``; None if all can."""
    for name, layer in layers:
        _, inputs = shape_of(layer)
        if inputs % multiple:
            return f"{name} has {inputs} inputs, no multiple of {multiple}"
    return None


def outside_layers(model: PreTrainedModel) -> str | None:
    """The reason that a matrix is neither a linear layer's nor an embedding's; None if all are."""
    layers = [one for one in model.modules() if isinstance(one, nn.Linear | Conv1D | nn.Embedding)]
    known = {id(layer.weight) for layer in layers}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in known:
            return f"{name} is in no linear layer (as the experts of a mixture are)"
    return None
