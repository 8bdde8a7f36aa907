"""Argmax, maximum and logsumexp of logits, by the kernels and by torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loaders import kernels
from loaders.kernels import Library, summarize

EXTREMES = [-1e30, 1e30, -200.0, 0.0, 3.0]


@pytest.fixture(params=["torch", *kernels.runnable()])
def computes(request: pytest.FixtureRequest) -> Library | None:
    """Each library that this CPU runs, and None, which is torch."""
    if request.param == "torch":
        return None
    found = kernels.load(request.param)
    return found if isinstance(found, Library) else pytest.skip(found)


def assert_as_in_float64(logits: Tensor, library: Library | None) -> None:
    found = summarize(logits, True, library)
    assert found.ids == [row.index(max(row)) for row in logits.tolist()]
    assert found.log_totals is not None
    for log_total, expected in zip(found.log_totals, logits.double().logsumexp(-1).tolist(), strict=True):
        assert log_total == pytest.approx(expected, abs=2e-6, rel=2e-7)
    assert found.largest == logits.amax(-1).tolist()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), vocabulary=st.integers(1, 9000), scale=st.sampled_from([0.01, 1.0, 30.0]))
@pytest.mark.parametrize("target", ["torch", *kernels.runnable()])
def test_any_shape(target: str, rows: int, vocabulary: int, scale: float) -> None:
    library = None if target == "torch" else kernels.load(target)
    if isinstance(library, str):
        pytest.skip(library)
    assert_as_in_float64(torch.randn(rows, vocabulary) * scale, library)


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("place", [0, 4095, 4096, 8999])
def test_values_far_apart(computes: Library | None, value: float, place: int) -> None:
    logits = torch.randn(2, 9000)
    logits[1, place] = value
    assert_as_in_float64(logits, computes)


def test_masked_tokens_add_nothing(computes: Library | None) -> None:
    logits = torch.full((1, 9000), -torch.inf)
    logits[0, 17] = logits[0, 8000] = 2.0
    found = summarize(logits, True, computes)
    assert (found.ids, found.largest) == ([17], [2.0])
    assert (found.log_totals or [0.0])[0] == pytest.approx(2.0 + math.log(2))


def test_the_first_of_equals(computes: Library | None) -> None:
    logits = torch.zeros(1, 20_000)
    logits[0, [5003, 5004, 12_000]] = 1.0
    assert summarize(logits, False, computes).ids == [5003]


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4100, 8999])
def test_a_broken_row_is_detected_without_its_neighbours(
    computes: Library | None, fault: float, place: int
) -> None:
    logits = torch.randn(3, 9000)
    whole = summarize(logits, True, computes)
    if fault < 0:
        logits[1] = fault
    logits[1, place] = fault
    found = summarize(logits, True, computes)
    assert [math.isfinite(one) for one in found.largest] == [True, False, True]
    assert [found.ids[i] for i in (0, 2)] == [whole.ids[i] for i in (0, 2)]
    assert found.log_totals is not None
    assert whole.log_totals is not None
    assert [found.log_totals[i] for i in (0, 2)] == [whole.log_totals[i] for i in (0, 2)]


def test_a_row_is_bit_identical_alone_and_in_a_batch(computes: Library | None) -> None:
    if computes is None:
        pytest.skip("torch does not promise it")
    logits = torch.randn(16, 9001)
    together = summarize(logits, True, computes)
    for i in range(16):
        alone = summarize(logits[i : i + 1], True, computes)
        assert (alone.ids, alone.log_totals) == ([together.ids[i]], [(together.log_totals or [])[i]])
    assert summarize(logits, False, computes).log_totals is None
