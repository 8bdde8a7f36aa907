"""int4 codes: their layout, and GPTQ's rounding against plain rounding on the layer's outputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loaders.layers.int4_codes import dequantize_int4, groups_of_inputs, in_groups, pack_codes, unpack_codes
from loaders.layers.int4_rounding import quantize


@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 9), steps=st.integers(1, 13))
def test_codes_are_packed_and_unpacked(outputs: int, steps: int) -> None:
    codes = torch.randint(0, 16, (outputs, 64 * steps), dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.shape == (outputs, 32 * steps)
    assert torch.equal(unpack_codes(packed), codes)


@pytest.mark.parametrize("inputs", [64, 192, 256, 576, 768])
def test_every_group_has_sixteen_inputs(inputs: int) -> None:
    groups = groups_of_inputs(inputs)
    assert torch.equal(groups.bincount(), torch.full((inputs // 16,), 16))
    values = torch.arange(inputs)[None]
    assert all(set(groups[group].tolist()) == {i} for i, group in enumerate(in_groups(values)[0]))


def correlated(inputs: int, rows: int = 1000) -> Tensor:
    """Inputs in which directions and channels differ in size, as a model's do."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, 1, generator=generator)
    return torch.randn(rows, inputs, generator=generator) @ mixed


def output_error(x: Tensor, weight: Tensor, hessian: Tensor | None) -> float:
    packed, state = quantize(weight, hessian)
    off = dequantize_int4(packed, state) - weight
    return float((x @ off.T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("inputs", [192, 576])
def test_the_outputs_are_nearer_than_by_plain_rounding(inputs: int) -> None:
    x, weight = correlated(inputs), torch.randn(48, inputs, generator=torch.Generator().manual_seed(4))
    plain, calibrated = output_error(x, weight, None), output_error(x, weight, x.T @ x)
    assert calibrated < 0.85 * plain < 0.07


def test_weights_that_the_codes_have_are_kept() -> None:
    """Also by calibration: there is no error to compensate."""
    x, weight = correlated(320), torch.randn(8, 320)
    packed, state = quantize(weight, None)
    exact = dequantize_int4(packed, state)
    again = dequantize_int4(*quantize(exact, x.T @ x))
    assert float((again - exact).norm() / exact.norm()) < 0.01


def test_the_same_inputs_give_the_same_bytes() -> None:
    x, weight = correlated(256), torch.randn(40, 256)
    (first, state), (second, other) = (quantize(weight, x.T @ x) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state.scales, other.scales)


@pytest.mark.parametrize("case", ["few rows", "dead inputs", "zeros", "not finite"])
def test_a_matrix_of_inputs_that_is_not_usable_is_no_error(case: str) -> None:
    """Fewer rows than inputs, inputs that are always zero, a model that overflows."""
    x, weight = correlated(192), torch.randn(16, 192)
    x = x[:5] if case == "few rows" else x
    if case == "dead inputs":
        x[:, ::3] = 0
    hessian = x.T @ x
    if case == "zeros":
        hessian.zero_()
    if case == "not finite":
        hessian[3, 5] = math.nan
    found = dequantize_int4(*quantize(weight, hessian))
    assert found.isfinite().all()
    assert float((found - weight).norm() / weight.norm()) < 0.6


def test_groups_of_zeros_stay_zeros() -> None:
    weight = torch.randn(4, 128)
    weight[1], weight[2:, 16:32] = 0, 0
    found = dequantize_int4(*quantize(weight, None))
    assert not found[1].any()
    assert not found[2:, 16:32].any()
    assert found[0].all()
