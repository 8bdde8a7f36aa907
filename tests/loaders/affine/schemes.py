"""Hypothesis strategies: schemes, and matrices of float32 values; and how many examples a test tries."""

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from loaders.affine import Scheme

examples = settings(max_examples=40, deadline=None)
schemes = st.builds(
    Scheme, bits=st.integers(2, 16), symmetric=st.booleans(), restricted=st.booleans(), signed=st.booleans()
)


def matrices(rows: int = 6, inputs: int = 12, largest: float = 2.0**100) -> Any:
    """(1 … rows, 1 … inputs) of values of very different magnitudes."""
    values = st.floats(-largest, largest, width=32, allow_subnormal=False)
    shapes = st.tuples(st.integers(1, rows), st.integers(1, inputs))
    return shapes.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=values)).map(_tensor)


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(values)
