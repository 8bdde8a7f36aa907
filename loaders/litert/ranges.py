"""Constant ranges of activations, and what they cost the outputs of layers.

Runs in the converter's environment.
A layer of LiteRT in int8 has one range for all of its inputs, and one for its outputs: the whole one that was
seen. Percentiles gave larger divergences, ranges of the least squared error the same (docs/log.md).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loaders.affine import MinMaxObserver, Scheme, dequantize, parameters, quantize

_SCHEME = Scheme(bits=8, symmetric=False)
Range = tuple[float, float]
Read = Callable[[int], Tensor]
"""The values of a tensor, by its place in the graph, in one pass."""


class Layer(NamedTuple):
    """A matrix product of the graph.

    Args:
        weight: (outputs, inputs), as it will be in int8.
        before, after: places of the tensors of inputs and outputs.
    """

    weight: Tensor
    before: int
    after: int


class Found(NamedTuple):
    """Ranges, and what they cost.

    Args:
        ranges: (low, high) by a tensor's place.
        sqnr_db: of each layer's outputs with quantized inputs and outputs.
    """

    ranges: Mapping[int, Range]
    sqnr_db: Sequence[float]


def find_ranges(layers: Sequence[Layer], observed: Iterable[Read], judged: Iterable[Read]) -> Found:
    """The range of every tensor that a layer reads or writes.

    Args:
        observed: passes on which the ranges are found.
        judged: other passes, on which the errors are measured.

    Raises:
        ValueError: a value is no finite number.
    """
    observers = {at: MinMaxObserver() for layer in layers for at in (layer.before, layer.after)}
    for read in observed:
        for at, observer in observers.items():
            observer.update(read(at))
    ranges: dict[int, Range] = {}
    for at, observer in observers.items():
        low, high = observer.range(_SCHEME)
        ranges[at] = min(float(low), 0.0), max(float(high), 0.0)
    errors, rows = [0.0] * len(layers), 0
    for read in judged:
        rows += len(_rows(read(layers[0].before)))
        for at, layer in enumerate(layers):
            x, y = _rows(read(layer.before)), _rows(read(layer.after))
            power = y.square().sum(-1).clamp_min(1e-20)
            for off in (_error(x, ranges[layer.before]) @ layer.weight.t(), _error(y, ranges[layer.after])):
                errors[at] += float((off.square().sum(-1) / power).sum())  # a text's first token may be huge
    return Found(ranges, [-10 * math.log10(max(error / rows, 1e-12)) for error in errors])


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _error(values: Tensor, limits: Range) -> Tensor:
    """What quantization adds to the values."""
    low, high = torch.tensor(limits)
    scale, zero_point = parameters(low, high, _SCHEME)
    return dequantize(quantize(values, scale, zero_point, _SCHEME), scale, zero_point).sub_(values)
