"""Keys and values that don't fit float16."""

import math

import torch
from torch import Tensor


def overflow_as_nan(states: Tensor) -> Tensor:
    """Keys or values with NaN for what overflowed float16, so that the logits are NaN and the request fails.

    Infinities may pass unseen: a key whose product with the query is −∞ is just not attended to.
    """
    if states.dtype != torch.float16:
        return states
    return states.nan_to_num(nan=math.nan, posinf=math.nan, neginf=math.nan)
