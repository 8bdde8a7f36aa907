"""Files that precisions make from a checkpoint once: quantized weights, exported graphs.

A precision whose weights take long to compute calls ``prepare`` when it is loaded. Files are kept in a cache,
by everything they depend on (``Recipe``), or in a folder of their own that ``bitdial quantize`` saved.
"""

from loaders.artifacts.prepare import NotPrepared, is_made, prepare
from loaders.base import Recipe

__all__ = ["NotPrepared", "Recipe", "is_made", "prepare"]
