"""Rows of logits, summed up: where each is largest, and what its probabilities are relative to."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loaders.kernels.library import I64, Library


@dataclass(frozen=True)
class Summary:
    """One entry a row."""

    ids: list[int]
    """Where it is largest: the first place, if there are several; meaningless in a row with a NaN."""
    largest: list[float]
    """The logit there. A row that holds a NaN has NaN, one with an infinity above zero that."""
    log_totals: list[float] | None
    """log Σ e^logit: a logit less this is its natural log-probability. None if not asked for."""


def summarize(logits: Tensor, log_totals: bool, library: Library | None) -> Summary:
    """
    Args:
        logits: (rows, vocabulary) float32, on the CPU.
        library: computes in one pass, of many rows on every thread; None: numpy and torch do.

    Raises:
        MemoryError
    """
    if library is None or logits.dtype != torch.float32 or not logits.numel():
        return _without_kernels(logits, log_totals)
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    # no tensors: after a step the caches hold weights, and every call into torch is slow the first time
    ids, floats = (I64 * rows)(), ctypes.c_float * rows
    largest, logs = floats(), floats() if log_totals else None
    threads = torch.get_num_threads()
    if library.summarize(logits.data_ptr(), rows, vocabulary, ids, largest, logs, threads):
        raise MemoryError("not enough memory to look at the logits")
    return Summary(list(ids), list(largest), None if logs is None else list(logs))


def _without_kernels(logits: Tensor, log_totals: bool) -> Summary:
    rows = logits.numpy()  # numpy's argmax takes a fraction of torch's time
    found = rows.argmax(axis=-1)
    largest = np.take_along_axis(rows, found[:, None], axis=-1)[:, 0]
    return Summary(
        found.tolist(), largest.tolist(), logits.logsumexp(dim=-1).tolist() if log_totals else None
    )
