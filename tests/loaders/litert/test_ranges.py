"""Constant ranges of activations: everything that was seen, and its error on samples that were not."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loaders.litert.ranges import Found, Layer, Read, find_ranges

WEIGHT = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
LAYERS = [Layer(WEIGHT, 0, 1), Layer(WEIGHT[:4], 0, 2)]


def passes(seed: int, outlier: float | None = None) -> Iterator[Read]:
    """Normal inputs of two layers; in one row of each pass, one input is an outlier instead."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(12):
        x = torch.randn(1, 16, 32, generator=generator)
        if outlier is not None:
            x[0, 3, 5] = outlier
        tensors: list[Tensor] = [x, x @ WEIGHT.t(), x @ WEIGHT[:4].t()]
        yield tensors.__getitem__


def found(observed: float | None = None, judged: float | None = None) -> Found:
    return find_ranges(LAYERS, passes(1, observed), passes(2, judged))


def test_ranges_are_those_of_the_observed_values() -> None:
    values = torch.cat([read(1).flatten() for read in passes(1)])
    ranges = found().ranges
    assert ranges.keys() == {0, 1, 2}
    assert ranges[1] == (float(values.min()), float(values.max()))
    assert found(observed=500.0).ranges[0][1] == 500


def test_eight_bits_are_enough_for_normal_values_and_not_beside_an_outlier() -> None:
    assert all(30 < one < 50 for one in found().sqnr_db)
    assert all(one < 15 for one in found(observed=500.0).sqnr_db)


def test_what_is_beyond_the_observed_ranges_counts_as_error() -> None:
    assert max(found(judged=500.0).sqnr_db) < min(found().sqnr_db) - 10


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="can't be observed"):
        found(observed=float("nan"))
