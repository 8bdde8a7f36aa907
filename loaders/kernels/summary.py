"""Rows of logits, summed up: where each is largest, and what its probabilities are relative to."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loaders.kernels.library import Library


@dataclass(frozen=True)
class Summary:
    """One entry a row."""

    ids: list[int]
    """Where it is largest: the first place, if there are several; meaningless in a row with a NaN."""
    finite: list[bool]
    """Whether the largest value is: a row that holds a NaN or +∞ is not."""
    log_totals: list[float] | None
    """log Σ e^logit: a logit less this is its natural log-probability. None if not asked for."""


def summarize(logits: Tensor, log_totals: bool, library: Library | None) -> Summary:
    """
    Args:
        logits: (rows, vocabulary) float32, on the CPU.
        library: computes in one pass and on every thread; None: numpy and torch do.

    Raises:
        MemoryError
    """
    if library is None or logits.dtype != torch.float32 or not logits.numel():
        return _without_kernels(logits, log_totals)
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    ids, largest = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    logs = torch.empty(rows if log_totals else 0, dtype=torch.float32)
    if library.summarize(
        logits.data_ptr(),
        rows,
        vocabulary,
        ids.data_ptr(),
        largest.data_ptr(),
        logs.data_ptr() if log_totals else None,
        torch.get_num_threads(),
    ):
        raise MemoryError("not enough memory to look at the logits")
    return Summary(ids.tolist(), largest.isfinite().tolist(), logs.tolist() if log_totals else None)


def _without_kernels(logits: Tensor, log_totals: bool) -> Summary:
    rows = logits.numpy()  # numpy's argmax takes a fraction of torch's time
    found = rows.argmax(axis=-1)
    finite = np.isfinite(np.take_along_axis(rows, found[:, None], axis=-1)[:, 0])
    return Summary(found.tolist(), finite.tolist(), logits.logsumexp(dim=-1).tolist() if log_totals else None)
