"""Constant ranges of activations: those whose layers' outputs are nearest, on samples that did not choose."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loaders.litert.ranges import Chosen, Layer, choose_ranges

WEIGHT = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
LAYERS = [Layer(WEIGHT, 0, 1), Layer(WEIGHT[:4], 0, 2)]
ROWS, PASSES = 64, 12


def passes(seed: int, spoiled: float = 0.0) -> Iterator[object]:
    """Normal inputs of two layers; in one row of every fourth pass, one input is ``spoiled`` instead."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(PASSES):
        x = torch.randn(1, ROWS, 32, generator=generator)
        if spoiled and number % 4 == 0:
            x[0, 3, 5] = spoiled
        tensors: list[Tensor] = [x, x @ WEIGHT.t(), x @ WEIGHT[:4].t()]
        yield tensors.__getitem__


def chosen(spoiled: float = 0.0, judged: float | None = None) -> Chosen:
    return choose_ranges(LAYERS, passes(1, spoiled), passes(2, spoiled if judged is None else judged))  # type: ignore[arg-type]


def test_values_without_outliers_keep_nearly_their_whole_range() -> None:
    found = chosen()
    low, high = found.ranges[0]
    assert -5 < low < -2.5
    assert 2.5 < high < 5
    assert all(one > 30 for one in found.sqnr_db)
    assert len(found.sqnr_db) == len(LAYERS)
    assert found.ranges.keys() == {0, 1, 2}


def test_an_outlier_in_few_rows_is_clipped_for_the_others() -> None:
    low, high = chosen(spoiled=500.0).ranges[0]
    assert high < 250
    assert low < 0


def test_what_judges_is_not_what_was_observed() -> None:
    """Ranges that clip what is rare among the observed are not taken where it is frequent."""
    clipped, whole = chosen(500.0, judged=0.0).ranges[0], chosen(500.0, judged=500.0).ranges[0]
    assert clipped[1] <= whole[1]


def test_an_outlier_that_a_range_has_to_cover_costs_precision() -> None:
    assert min(chosen().sqnr_db) > max(chosen(spoiled=3000.0).sqnr_db) + 3


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="can't be observed"):
        chosen(spoiled=float("nan"))
