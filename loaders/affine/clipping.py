"""Clipping ranges from a histogram: what lies outside is given up for a finer scale.

- percentile: McKinstry et al. 2018 (arXiv:1809.04191); Wu et al. 2020 (arXiv:2004.09602), "Calibration".
- mean squared error: Nagel et al. 2021 (arXiv:2106.08295), "Quantization range setting".
- KL divergence: Migacz 2017, "8-bit Inference with TensorRT" (GPU Technology Conference).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.affine.arithmetic import Scheme, dequantize, parameters, quantize
from loaders.affine.histogram import Histogram

Range = tuple[Tensor, Tensor]
_KL_BINS = 2048
_COARSE = 0.9 ** torch.arange(60, dtype=torch.float64)  # fractions of a range that are tried: down to 1/500
_PAIRED = 0.8 ** torch.arange(28, dtype=torch.float64)
_WIDE = torch.linspace(0.8, 1.2, 17, dtype=torch.float64)
_FINE = torch.linspace(0.9, 1.1, 21, dtype=torch.float64)
_AT_ONCE = 2**20  # candidates × bins


def percentile_range(histogram: Histogram, percent: float, scheme: Scheme) -> Range:
    """The range that contains ``percent`` of the values.

    Symmetric: −m … m, with that share of the magnitudes up to m. Otherwise half of what is left out lies
    below the range, and half above it.
    """
    if scheme.symmetric:
        inside = _first(histogram.magnitudes(), percent / 100)
        return _within(histogram, -inside * histogram.width, inside * histogram.width)
    tail = (1 - percent / 100) / 2
    below = _first(histogram.counts, tail, above=True) - 1
    above = _first(histogram.counts, 1 - tail)
    return _within(
        histogram, below * histogram.width - histogram.limit, above * histogram.width - histogram.limit
    )


def mse_range(histogram: Histogram, scheme: Scheme) -> Range:
    """The range of the smallest mean squared error over the histogram.

    A symmetric range is searched in steps of a tenth and then of a hundredth of itself. Of an asymmetric one
    all pairs of ends in steps of a fifth are tried, then each end in finer steps, in turn.
    """
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (histogram.low, histogram.high))
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        for fractions in (_COARSE, _FINE):
            high = _best(histogram, scheme, -high * fractions, high * fractions)[1]
        return _within(histogram, -float(high), float(high))
    lows, highs = torch.meshgrid(low.clamp_max(0) * _PAIRED, high.clamp_min(0) * _PAIRED, indexing="ij")
    low, high = _best(histogram, scheme, lows.reshape(-1), highs.reshape(-1))
    for fractions in (_WIDE, _WIDE, _FINE, _FINE):
        low = _best(histogram, scheme, low * fractions, high.expand(len(fractions)))[0]
        high = _best(histogram, scheme, low.expand(len(fractions)), high * fractions)[1]
    return _within(histogram, float(low), float(high))


def kl_range(histogram: Histogram, scheme: Scheme) -> Range:
    """The range −t … t whose quantized distribution of magnitudes has the smallest KL divergence.

    As in TensorRT: for every threshold t, the reference P is the histogram up to t, with all counts beyond it
    in its last bin; Q is the histogram up to t in as many levels as there are codes on one side of zero, each
    level's count spread evenly over its bins that are not empty.
    """
    counts = histogram.magnitudes(_KL_BINS).double().numpy()
    levels = 1 << (scheme.bits - 1)
    used = int(np.flatnonzero(counts)[-1]) + 1
    sizes = range(min(levels, used), used + 1)
    size = min(sizes, key=lambda size: _divergence(counts[:used], size, levels))
    threshold = histogram.limit / _KL_BINS * (size + 0.5)
    return _within(histogram, -threshold, threshold)


def _divergence(counts: NDArray[np.float64], size: int, levels: int) -> float:
    """KL(P ‖ Q) of the first ``size`` bins in ``levels`` levels."""
    inside = counts[:size]
    reference = inside.copy()
    reference[-1] += counts[size:].sum()
    level = np.arange(size) * levels // size
    filled = inside > 0
    per_bin = np.bincount(level, inside, levels) / np.maximum(np.bincount(level, filled, levels), 1)
    quantized = np.where(filled, per_bin[level], 0)
    seen = reference > 0
    if not quantized.any() or not quantized[seen].all():
        return float("inf")  # the last bin was empty, and now isn't: Q has no mass there
    p, q = reference[seen] / reference.sum(), quantized[seen] / quantized.sum()
    return float((p * np.log(p / q)).sum())


def _best(histogram: Histogram, scheme: Scheme, lows: Tensor, highs: Tensor) -> Range:
    """Of the candidates, the range whose codes have the smallest squared error over the histogram."""
    filled = histogram.counts.nonzero().squeeze(1)
    weights, values = histogram.counts[filled].float(), histogram.centres()[filled].float()
    scales, zero_points = (found[:, None] for found in parameters(lows, highs, scheme))
    errors = []
    step = max(1, _AT_ONCE // len(values))
    for scale, zero_point in zip(scales.split(step), zero_points.split(step), strict=True):
        codes = quantize(values.expand(len(scale), -1), scale, zero_point, scheme)
        errors.append((dequantize(codes, scale, zero_point) - values).square_() @ weights)
    best = int(torch.cat(errors).argmin())
    return lows[best], highs[best]


def _first(counts: Tensor, share: float, above: bool = False) -> int:
    """The number of leading bins that hold ``share`` of all counts; ``above``: more than it."""
    reached = counts.cumsum(0).double()
    return int(torch.searchsorted(reached, share * float(reached[-1]), right=above)) + 1


def _within(histogram: Histogram, low: float, high: float) -> Range:
    return _range(max(low, histogram.low), min(high, histogram.high))


def _range(low: float, high: float) -> Range:
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
