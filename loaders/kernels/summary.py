"""Argmax, maximum and logsumexp of rows of logits."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loaders.kernels.library import Library
from loaders.kernels.structures import I64


@dataclass(frozen=True)
class Summary:
    """One entry per row."""

    ids: list[int]
    """The first argmax; meaningless in a row with a NaN."""
    largest: list[float]
    """The logit there: NaN in a row with a NaN, else +inf in a row with one."""
    log_totals: list[float] | None
    """log Σ e^logit: a logit minus this is its natural log-probability. None if not requested."""


def summarize(logits: Tensor, log_totals: bool, library: Library | None) -> Summary:
    """
    Args:
        logits: (rows, vocabulary) float32, on the CPU.
        library: computes all three in one pass, many rows on every thread; None: numpy and torch compute.

    Raises:
        MemoryError
    """
    if library is None or logits.dtype != torch.float32 or not logits.numel():
        return _without_kernels(logits, log_totals)
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    # no tensors: after a step the CPU caches hold weights, and the first call into torch code is slow
    ids, floats = (I64 * rows)(), ctypes.c_float * rows
    largest, logs = floats(), floats() if log_totals else None
    threads = torch.get_num_threads()
    if library.summarize(logits.data_ptr(), rows, vocabulary, ids, largest, logs, threads):
        raise MemoryError("not enough memory to reduce the logits")
    return Summary(list(ids), list(largest), None if logs is None else list(logs))


def _without_kernels(logits: Tensor, log_totals: bool) -> Summary:
    rows = logits.numpy()  # numpy's argmax takes a fraction of torch's time
    found = rows.argmax(axis=-1)
    largest = np.take_along_axis(rows, found[:, None], axis=-1)[:, 0]
    return Summary(
        found.tolist(), largest.tolist(), logits.logsumexp(dim=-1).tolist() if log_totals else None
    )
