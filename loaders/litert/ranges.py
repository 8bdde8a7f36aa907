"""Constant ranges of activations, chosen by what they do to the outputs of layers. Runs in the converter's
environment.

A layer of LiteRT in int8 has one range for all of its inputs, and one for its outputs. Candidates are the
whole range that was seen, percentiles of it, and the range of the least squared error. The one is taken with
which outputs are nearest to the float ones, on samples that the candidates were not found on.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loaders.affine import Histogram, Scheme, dequantize, parameters, quantize
from loaders.affine.clipping import mse_range, percentile_range

_SCHEME = Scheme(bits=8, symmetric=False)
_PERCENTS = (99.99, 99.9)
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


class Chosen(NamedTuple):
    """Ranges, and what they cost.

    Args:
        ranges: (low, high) by a tensor's place.
        sqnr_db: of each layer's outputs with quantized inputs and outputs.
    """

    ranges: Mapping[int, tuple[float, float]]
    sqnr_db: Sequence[float]


def choose_ranges(layers: Sequence[Layer], observed: Iterable[Read], judged: Iterable[Read]) -> Chosen:
    """The best range of every tensor that a layer reads or writes.

    Args:
        observed: passes on which candidates are found.
        judged: other passes, on which they are compared.
    """
    histograms = {at: Histogram() for layer in layers for at in (layer.before, layer.after)}
    for read in observed:
        for at, histogram in histograms.items():
            histogram.update(read(at))
    candidates = {at: _candidates(histogram) for at, histogram in histograms.items()}
    inputs = [torch.zeros(len(candidates[layer.before])) for layer in layers]
    outputs = [torch.zeros(len(candidates[layer.after])) for layer in layers]
    rows = 0
    for read in judged:
        rows += len(_rows(read(layers[0].before)))
        for layer, of_inputs, of_outputs in zip(layers, inputs, outputs, strict=True):
            x, y = _rows(read(layer.before)), _rows(read(layer.after))
            of_inputs += _errors(x, y, candidates[layer.before], layer.weight)
            of_outputs += _errors(y, y, candidates[layer.after], None)
    errors: dict[int, Tensor] = {}  # of a tensor's candidates, over the layers that read it
    for layer, of_inputs, of_outputs in zip(layers, inputs, outputs, strict=True):
        errors[layer.before] = errors.get(layer.before, 0) + of_inputs
        errors.setdefault(layer.after, of_outputs)
    best = {at: int(error.argmin()) for at, error in errors.items()}
    pairs = zip(layers, inputs, outputs, strict=True)
    off = [float(a[best[layer.before]] + b[best[layer.after]]) / rows for layer, a, b in pairs]
    return Chosen(
        {at: candidates[at][number] for at, number in best.items()},
        [-10 * math.log10(max(one, 1e-12)) for one in off],
    )


def _candidates(histogram: Histogram) -> list[tuple[float, float]]:
    found = [(min(histogram.low, 0.0), max(histogram.high, 0.0))]
    for low, high in (
        *(percentile_range(histogram, percent, _SCHEME) for percent in _PERCENTS),
        mse_range(histogram, _SCHEME),
    ):
        found.append((float(low), float(high)))
    return found


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _errors(
    values: Tensor, outputs: Tensor, candidates: Sequence[tuple[float, float]], weight: Tensor | None
) -> Tensor:
    """Of each range, the squared error in the outputs relative to the outputs' squares, summed over the rows.

    Rows count equally: the first token of a text may be a hundred times as large as the others.
    """
    power, found = outputs.square().sum(-1).clamp_min(1e-20), []
    for low, high in candidates:
        scale, zero_point = parameters(torch.tensor(low), torch.tensor(high), _SCHEME)
        off = dequantize(quantize(values, scale, zero_point, _SCHEME), scale, zero_point) - values
        off = off if weight is None else off @ weight.t()
        found.append((off.square().sum(-1) / power).sum())
    return torch.stack(found)
