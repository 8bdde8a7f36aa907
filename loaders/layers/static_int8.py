"""Static int8: constant scales and zero points of a layer's inputs, chosen from what calibration saw of them.

An input of code q stands for scale · (q − zero point). Candidates are one scale for all inputs of a layer,
by the observers of ``loaders.affine``, and a scale for each input: x / s and W · s have the same product as x
and W, so that a channel of large inputs can have a large scale at the cost of larger weights. SmoothQuant
(Xiao et al., arXiv:2211.10438, equation 4) balances the two: s = max|x|^α / max|w|^(1 − α). A zero point for
each input shifts its range to the middle (Outlier Suppression+, arXiv:2304.09145). The candidate whose
outputs are nearest to float32's on calibration samples that chose no range is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders import kernels
from loaders.affine import Scheme, parameters
from loaders.kernels import PackedMatrix
from loaders.layers.dynamic_int8_linear import quantize_lanes
from loaders.layers.layer_weights import InputCalibration
from loaders.layers.observed_inputs import ObservedInputs

SCHEME = Scheme(bits=8, symmetric=False)
"""Of activations. Weights are symmetric, −127 … 127, with a scale for each output."""
BALANCES = {f"balanced {alpha}": alpha for alpha in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
"""The α that are tried: at 1 every input has the scale of its own range."""
OBSERVERS = ("min-max", "mse", *BALANCES)
_WEIGHT_LEVELS = 127
_LEAST_WIDTH = 0.1  # of the median range: inputs that calibration saw little of can be larger later
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class StaticWeights:
    """A layer in static int8.

    Args:
        codes: (outputs, inputs) int8.
        scales: (outputs,) float32.
        input_factors: (2, inputs), as in ``kernels.PackedMatrix``; one tensor for all layers of an input.
    """

    codes: Tensor
    scales: Tensor
    input_factors: Tensor


@dataclass(frozen=True)
class Calibrated:
    """The layers that read one input, in static int8: in the order of ``ObservedInputs.names``."""

    weights: Sequence[StaticWeights]
    calibrations: Sequence[InputCalibration]

    @property
    def sqnr_db(self) -> float:
        """Of the layer that loses most."""
        return min(one.sqnr_db for one in self.calibrations)

    @property
    def dynamic_sqnr_db(self) -> float:
        return min(one.dynamic_sqnr_db for one in self.calibrations)


def calibrate(
    seen: ObservedInputs, weights: Sequence[Tensor], observers: Sequence[str] = OBSERVERS
) -> Calibrated:
    """Quantizes the layers that read the inputs ``seen``, by the observer whose outputs are the nearest.

    Args:
        weights: (outputs, inputs) float32 of each of the layers.
        observers: those to choose from.
    """
    rows, outputs = seen.rows(), [len(one) for one in weights]
    weight = torch.cat(list(weights))
    exact = rows @ weight.T
    best: tuple[str, Tensor] | None = None
    for observer in observers:
        found = _quantized(weight, *_scales(observer, seen, weight, held_out=False))
        product = _product("static-int8", rows, found.codes, found.scales, found.input_factors)
        noises = _noises(exact, product, outputs)
        if best is None or noises.mean() < best[1].mean():
            best = observer, noises
    assert best is not None, "no observer to choose from"
    observer, noises = best
    found = _quantized(weight, *_scales(observer, seen, weight, held_out=True))
    dynamic = _noises(exact, _product("int8", rows, *quantize_lanes(weight)), outputs)
    split = zip(found.codes.split(outputs), found.scales.split(outputs), strict=True)
    return Calibrated(
        [StaticWeights(codes, scales, found.input_factors) for codes, scales in split],
        [
            _calibration(observer, seen, found.input_factors, *pair)
            for pair in zip(noises.tolist(), dynamic.tolist(), strict=True)
        ],
    )


def _scales(observer: str, seen: ObservedInputs, weight: Tensor, held_out: bool) -> tuple[Tensor, Tensor]:
    """(inputs,) scales and zero points by an observer; ``held_out``: as in ``ObservedInputs.ranges``."""
    if observer in BALANCES:
        columns = weight.abs().amax(dim=0)
        return _balanced(
            *seen.ranges(held_out), columns.clamp_min(float(columns.max()) * 1e-3 + _TINY), BALANCES[observer]
        )
    chosen = seen.min_max if observer == "min-max" else seen.mse
    scale, zero_point = parameters(*chosen.range(SCHEME), SCHEME)
    return scale.expand(weight.shape[1]), zero_point.expand(weight.shape[1])


def _balanced(low: Tensor, high: Tensor, columns: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(inputs,) scales that share each input's range with its weights, and zero points that centre it."""
    width = high - low
    width = width.clamp_min(float(width.median()) * _LEAST_WIDTH + _TINY)
    balance = width**alpha / columns ** (1 - alpha)
    scale = balance * ((width / balance).max() / SCHEME.steps)
    middle = (SCHEME.lowest + SCHEME.highest) / 2
    zero_point = (middle - (low + high) / 2 / scale).round().clamp(SCHEME.lowest, SCHEME.highest)
    return scale, zero_point


def _quantized(weight: Tensor, scale: Tensor, zero_point: Tensor) -> StaticWeights:
    scaled = weight * scale
    scales = (scaled.abs().amax(dim=1) / _WEIGHT_LEVELS).clamp_min(_TINY)
    codes = (scaled / scales[:, None]).round_().to(torch.int8)
    return StaticWeights(codes, scales, torch.stack([1 / scale, zero_point.float()]))


def _product(
    kind: kernels.Format, rows: Tensor, codes: Tensor, scales: Tensor, factors: Tensor | None = None
) -> Tensor:
    library = kernels.get()
    assert library is not None, str(kernels.find())
    return PackedMatrix(library, kind, codes, scales, input_factors=factors)(rows)


def _noises(exact: Tensor, found: Tensor, outputs: Sequence[int]) -> Tensor:
    """(layers,) mean over the rows of ‖y′ − y‖² / ‖y‖²: rows of large outputs count no more than others.

    Rows whose outputs are nearly zero are measured by a hundredth of the median row.
    """
    means = []
    for one, other in zip(exact.split(list(outputs), 1), found.split(list(outputs), 1), strict=True):
        signal = one.square().sum(dim=1)
        noise = (other - one).square().sum(dim=1)
        means.append((noise / signal.clamp_min(float(signal.median()) / 100 + _TINY)).mean())
    return torch.stack(means)


def _decibels(noise: float) -> float:
    return round(-10 * torch.tensor(max(noise, _TINY)).log10().item(), 2)


def _calibration(
    observer: str, seen: ObservedInputs, factors: Tensor, noise: float, dynamic: float
) -> InputCalibration:
    low, high = seen.ranges(held_out=True)
    scale, zero_point = 1 / factors[0], factors[1].int()
    codes = (seen.rows() * factors[0] + factors[1]).round_()
    clipped = ((codes < SCHEME.lowest) | (codes > SCHEME.highest)).float().mean()
    return InputCalibration(
        observer,
        float(low.min()),
        float(high.max()),
        float(clipped),
        float(scale.min()),
        float(scale.max()),
        int(zero_point.min()),
        int(zero_point.max()),
        _decibels(noise),
        _decibels(dynamic),
    )
