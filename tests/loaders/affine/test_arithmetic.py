"""Properties that hold for every scheme and every tensor."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loaders.affine import Per, Scheme, dequantize, grouped, min_max, parameters, quantize
from tests.loaders.affine.schemes import examples, matrices, schemes

INT8, UINT8 = Scheme(), Scheme(symmetric=False, signed=False)
FLOAT32_ERROR = 1e-6  # relative: the scale, the quotient and the product are rounded


def round_trip(x: Tensor, scheme: Scheme, per: Per) -> tuple[Tensor, Tensor]:
    """The values after quantization in their min-max ranges, and the scales; shaped as by ``grouped``."""
    scale, zero_point = parameters(*min_max(x, per), scheme)
    codes = quantize(grouped(x, per), scale, zero_point, scheme)
    assert codes.min() >= scheme.lowest
    assert codes.max() <= scheme.highest
    return dequantize(codes, scale, zero_point), scale


@examples
@given(matrices(), schemes, st.sampled_from(["tensor", "channel"]))
def test_a_round_trip_is_off_by_half_a_scale_at_most(x: Tensor, scheme: Scheme, per: Per) -> None:
    found, scale = round_trip(x, scheme, per)
    x = grouped(x, per)
    assert bool(((found - x).abs() <= scale / 2 + FLOAT32_ERROR * x.abs().amax()).all())


@examples
@given(matrices(rows=3, inputs=4), schemes, st.integers(1, 5))
def test_groups_are_rows_of_their_own(x: Tensor, scheme: Scheme, group: int) -> None:
    matrix = x.repeat(1, group)
    found, _ = round_trip(matrix, scheme, group)
    rows, _ = round_trip(matrix.reshape(-1, group), scheme, "channel")
    assert torch.equal(found.reshape(-1, group), rows)


@examples
@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30), schemes)
def test_zero_is_exact(one: float, other: float, scheme: Scheme) -> None:
    low, high = torch.tensor(sorted((one, other)), dtype=torch.float32)
    scale, zero_point = parameters(low, high, scheme)
    code = quantize(torch.tensor(0.0), scale, zero_point, scheme)
    assert code == zero_point
    assert scheme.lowest <= int(zero_point) <= scheme.highest
    assert dequantize(code, scale, zero_point) == 0
    if scheme.symmetric:
        assert int(zero_point) == scheme.middle


@examples
@given(matrices(rows=1, inputs=20), schemes)
def test_codes_keep_the_order_of_values(x: Tensor, scheme: Scheme) -> None:
    scale, zero_point = parameters(*min_max(x, "tensor"), scheme)
    codes = quantize(x.reshape(-1).sort().values * 3, scale, zero_point, scheme)  # clipped at both ends
    assert bool((codes.diff() >= 0).all())


@examples
@given(matrices(), schemes)
def test_a_second_round_trip_changes_nothing(x: Tensor, scheme: Scheme) -> None:
    scale, zero_point = parameters(*min_max(x, "channel"), scheme)
    codes = quantize(x, scale, zero_point, scheme)
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, scheme), codes)


@examples
@given(matrices(rows=1, inputs=8), schemes)
def test_signed_codes_are_unsigned_ones_shifted(x: Tensor, scheme: Scheme) -> None:
    codes = []
    for one in (replace(scheme, signed=True), replace(scheme, signed=False)):
        scale, zero_point = parameters(*min_max(x, "tensor"), one)
        codes.append(quantize(x, scale, zero_point, one))
    shift = 1 << (scheme.bits - 1)
    assert torch.equal(codes[1], codes[0] + shift)


@pytest.mark.parametrize(
    ("scheme", "limits"),
    [
        (INT8, (-127, 127)),
        (Scheme(restricted=False), (-128, 127)),
        (Scheme(symmetric=False), (-128, 127)),
        (UINT8, (0, 255)),
        (Scheme(signed=False), (1, 255)),
        (Scheme(bits=4), (-7, 7)),
        (Scheme(bits=4, symmetric=False, signed=False), (0, 15)),
    ],
)
def test_infinite_values_take_the_limits(scheme: Scheme, limits: tuple[int, int]) -> None:
    assert (scheme.lowest, scheme.highest) == limits
    scale, zero_point = parameters(torch.tensor(-1.0), torch.tensor(2.0), scheme)
    codes = quantize(torch.tensor([-torch.inf, -1e38, 1e38, torch.inf]), scale, zero_point, scheme)
    assert codes.tolist() == [limits[0], limits[0], limits[1], limits[1]]


def test_worked_examples() -> None:
    """By hand: the largest magnitude 2 in 127 steps; −1 … 2 in 255 steps, zero at 85."""
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    scale, zero_point = parameters(low, high, INT8)
    assert (float(scale), int(zero_point)) == pytest.approx((2 / 127, 0))
    scale, _ = parameters(low, high, Scheme(restricted=False))
    assert float(scale) == pytest.approx(4 / 255)
    scale, zero_point = parameters(low, high, UINT8)
    assert (float(scale), int(zero_point)) == pytest.approx((3 / 255, 85))
    assert quantize(torch.tensor([-1.0, 0.0, 2.0]), scale, zero_point, UINT8).tolist() == [0, 85, 255]


@pytest.mark.parametrize("scheme", [INT8, UINT8, Scheme(bits=4, restricted=False)])
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -5e-39, 3e38, -3e38])
def test_equal_values(value: float, scheme: Scheme) -> None:
    x = torch.full((2, 3), value)
    found, scale = round_trip(x, scheme, "channel")
    assert bool(scale.isfinite().all() & (scale > 0).all())
    assert bool(((found - x).abs() <= scale * 0.5001).all())


def test_opposite_extremes() -> None:
    """high − low is beyond float32."""
    x = torch.tensor([[-3e38, 0.0, 3e38]])
    for scheme in (UINT8, Scheme(restricted=False), INT8):
        found, scale = round_trip(x, scheme, "channel")
        assert bool(((found - x).abs() <= scale * 0.5001).all())


def test_what_has_no_codes() -> None:
    one = torch.tensor(1.0)
    scale, zero_point = parameters(-one, one, INT8)
    assert quantize(torch.empty(0, 4), scale, zero_point, INT8).shape == (0, 4)
    with pytest.raises(ValueError, match="NaN"):
        quantize(torch.tensor([0.0, torch.nan]), scale, zero_point, INT8)
    with pytest.raises(ValueError, match="empty"):
        min_max(torch.empty(3, 0), "channel")
    for bound in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite"):
            parameters(-one, torch.tensor(bound), INT8)
    with pytest.raises(ValueError, match="below its start"):
        parameters(one, -one, INT8)
    with pytest.raises(ValueError, match="groups of 5"):
        min_max(torch.zeros(2, 12), 5)
    with pytest.raises(ValueError, match="no rows"):
        min_max(torch.zeros(2, 12, 3), "channel")
    with pytest.raises(ValueError, match="1 bits"):
        Scheme(bits=1)
