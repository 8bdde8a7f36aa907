"""Matrices as integer codes: affine ones, x ≈ S (q − Z), and places in tables, x ≈ S T[q]."""

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
