"""Keys and values that overflow float16."""

import math

import torch
from torch import Tensor


def overflow_as_nan(states: Tensor) -> Tensor:
    """Replaces infinities in float16 by NaN, so that the logits are NaN and the request fails.

    An infinity could pass unnoticed: a key whose product with the query is −∞ gets no weight.
    """
    if states.dtype != torch.float16:
        return states
    return states.nan_to_num(nan=math.nan, posinf=math.nan, neginf=math.nan)
