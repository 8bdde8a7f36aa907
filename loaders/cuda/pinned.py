"""Copies from the host to a device that the host doesn't wait for.

A CUDA device reads them from pinned memory, which torch uses again only when the copy from it is over.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(values: Sequence[object], dtype: torch.dtype, beside: Tensor) -> Tensor:
    """The values as a new tensor on the device of ``beside``."""
    return _on_host(values, dtype, beside).to(beside.device, non_blocking=True)


def send_into(target: Tensor, values: Sequence[object]) -> None:
    """Replaces the contents of ``target``, whose shape the values have."""
    target.copy_(_on_host(values, target.dtype, target), non_blocking=True)


def _on_host(values: Sequence[object], dtype: torch.dtype, beside: Tensor) -> Tensor:
    return torch.tensor(values, dtype=dtype, pin_memory=beside.is_cuda)
