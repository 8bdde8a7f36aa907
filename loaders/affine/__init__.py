"""Affine quantization: x ≈ S (q − Z) with integer codes q, a float32 scale S and an integer zero point Z."""

from loaders.affine.arithmetic import (
    Per,
    Scheme,
    dequantize,
    grouped,
    min_max,
    parameters,
    quantize,
)
from loaders.affine.histogram import Histogram
from loaders.affine.observers import (
    KLObserver,
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)

__all__ = [
    "Histogram",
    "KLObserver",
    "MSEObserver",
    "MinMaxObserver",
    "Observer",
    "Per",
    "PercentileObserver",
    "Scheme",
    "dequantize",
    "grouped",
    "min_max",
    "parameters",
    "quantize",
]
