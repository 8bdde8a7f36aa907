"""The scheme int4-table: the figures are those of the codes that int4 writes without calibration."""

import pytest
import torch
from torch import Tensor

from loaders.affine.applied import Matrix
from loaders.layers.int4_codes import dequantize_int4, groups_of_inputs, int4_bytes, unpack_codes
from loaders.layers.int4_method import Int4Method
from loaders.layers.int4_rounding import quantize
from loaders.layers.native_linear import NativeLinear


def weight(inputs: int = 320) -> Tensor:
    """One step of 64 inputs is beyond the whole group of steps; one row, and one group, are zero."""
    matrix = torch.randn(48, inputs, generator=torch.Generator().manual_seed(3)) / 30
    matrix[5, 100], matrix[7] = -1.5, 0
    matrix[9, groups_of_inputs(inputs) == 4] = 0
    return matrix


@pytest.mark.parametrize("inputs", [64, 256, 320])
def test_codes_and_values_are_those_of_the_precision_without_calibration(inputs: int) -> None:
    matrix = weight(inputs) if inputs > 100 else weight()[:, :64].contiguous()
    packed, state = quantize(matrix, None)
    codes, values = unpack_codes(packed), dequantize_int4(packed, state)
    method = Int4Method()
    for row, column in ((0, 0), (5, 50), (9, 33), (47, inputs - 1)):
        code = Matrix(matrix, 1).code(method, row, column)
        assert code.code == int(codes[row, column])
        assert code.value == float(values[row, column])
        assert code.level * code.scale == pytest.approx(code.value, rel=1e-6)
    applied = Matrix(matrix, 40).apply(method)
    assert applied.relative_error == pytest.approx(float((values - matrix).norm() / matrix.norm()), rel=1e-5)
    assert applied.max_error == pytest.approx(float((values - matrix).abs().max()), rel=1e-6)
    low, high = float(matrix.min()), float(matrix.max())
    assert torch.equal(applied.counts, torch.histc(values.clamp(low, high), 40, low, high).long())
    assert (applied.ranges, applied.codes_used) == (48 * inputs // 16, len(codes.unique()))
    assert applied.limits[0] <= values.min()
    assert applied.limits[1] >= values.max()


def test_weights_beyond_the_outermost_code_are_counted_as_clipped() -> None:
    equal = torch.full((1, 64), 1e-3)
    assert Matrix(equal, 1).apply(Int4Method()).clipped == 0
    applied = Matrix(weight(), 1).apply(Int4Method())
    packed, state = quantize(weight(), None)
    off = (dequantize_int4(packed, state) - weight()).abs()
    assert state.nested_scales is not None
    scales = (state.scales.float() * state.nested_scales[:, None])[:, groups_of_inputs(320)].abs()
    assert applied.clipped == int((off > 12.51 * scales).sum()) > 0
    assert applied.scales[0] < 0 < applied.scales[1], "a scale's sign chooses the end of the table"


def test_bits_of_a_weight_are_those_in_memory() -> None:
    packed, state = quantize(weight(), None)
    layer = NativeLinear("int4", packed, None, four_bit=state)
    table = 16  # bytes, once a matrix
    assert 48 * 320 * Int4Method().bits_per_weight(320, 48 * 320) / 8 == int4_bytes(48, 320)
    assert layer.layer_weights().nbytes == int4_bytes(48, 320) + table


@pytest.mark.parametrize("inputs", [32, 100, 0])
def test_rows_that_the_kernels_do_not_take(inputs: int) -> None:
    with pytest.raises(ValueError, match=f"rows of {inputs} inputs: int4's are multiples of 64"):
        Matrix(torch.ones(2, inputs), 1).apply(Int4Method())


def test_weights_that_are_no_numbers() -> None:
    broken = weight()
    broken[0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        Int4Method().parameters(Matrix(broken, 1))


@pytest.mark.parametrize("value", [1e-44, 1e-38, 1e-36, 1e-30])
def test_weights_near_zero_are_rounded_to_zero_or_better(value: float) -> None:
    near = torch.zeros(2, 64)
    near[0, 3] = value
    packed, state = quantize(near, None)
    assert (dequantize_int4(packed, state) - near).abs().max() <= near.max()
