"""The compiled CPU kernels against products in float64; each row against itself in a batch, bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loaders import kernels
from loaders.kernels import FourBit, Library, PackedMatrix
from loaders.kernels.matrix import INT4_GROUP, INT8_LANES
from loaders.layers.int4_codes import dequantize_int4

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))

KINDS = ["float32", "bfloat16", "float16", "int8", "int8-lanes", "static-int8", "four-bit", "int4"]
FLOATS: dict[str, kernels.Format] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK = 64


def packed(
    library: Library, kind: str, outputs: int, inputs: int, bias: Tensor | None = None
) -> tuple[PackedMatrix, Tensor]:
    """A random matrix in that format, and its dequantized float32 weights."""
    weight = torch.randn(outputs, inputs) * 0.1
    if kind == "int8":
        scales = (torch.rand(outputs) + 0.01) / 100
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return PackedMatrix(library, "int8", codes, scales, bias), codes * scales[:, None]
    if kind == "int8-lanes":
        scales = ((torch.rand(outputs, INT8_LANES) + 0.01) / 100).bfloat16()
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        each = scales.float().repeat_interleave(4, dim=1).repeat(1, inputs // 64)
        return PackedMatrix(library, "int8", codes, scales, bias), codes * each
    if kind == "int4":
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        table = torch.randint(-127, 128, (16,), dtype=torch.int8)
        groups = torch.randint(-127, 128, (outputs, inputs // INT4_GROUP), dtype=torch.int8)
        state = FourBit(table, INT4_GROUP, groups, nested_scales=(torch.rand(outputs) + 0.01) / 12700)
        matrix = PackedMatrix(library, "int4", codes, bias=bias, four_bit=state)
        return matrix, dequantize_int4(codes, state)
    if kind == "static-int8":
        scales, factors = (torch.rand(outputs) + 0.01) / 100, static_factors(inputs)
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        matrix = PackedMatrix(library, "static-int8", codes, scales, bias, input_factors=factors)
        return matrix, codes * scales[:, None] * factors[0]
    if kind == "four-bit":
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        table, scales = torch.randn(16), torch.rand(outputs * inputs // BLOCK)
        state = FourBit(table, BLOCK, scales)
        matrix = PackedMatrix(library, "four-bit", codes, bias=bias, four_bit=state)
        return matrix, as_multiplied(library, kind, four_bit_weights(codes, table, scales))
    held = weight.to(DTYPES[kind])
    return PackedMatrix(library, FLOATS[kind], held, bias=bias), held.float()


def four_bit_weights(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    outputs = codes.shape[0]
    pairs = torch.stack([codes >> 4, codes & 15], dim=-1).reshape(outputs, -1)
    return table[pairs.long()] * scales.reshape(outputs, -1).repeat_interleave(BLOCK, dim=1)


def static_factors(inputs: int) -> Tensor:
    """Powers of two, by which a product is exact; and zero points over the whole range."""
    numbers = torch.arange(inputs)
    return torch.stack([2.0 ** (3 + numbers % 4), (numbers * 37 % 256 - 128).float()])


def as_multiplied(library: Library, kind: str, x: Tensor) -> Tensor:
    """``x`` rounded to the type of the computation."""
    if kind.startswith("int"):
        return in_groups(x)
    if kind == "static-int8":
        factors, zero_points = static_factors(x.shape[1]).unbind()
        return ((x * factors + zero_points).round().clamp(-128, 127) - zero_points) / factors
    computed = library.computes_in("four-bit" if kind == "four-bit" else FLOATS[kind])
    return x.to(DTYPES[computed]).float()


def in_groups(x: Tensor) -> Tensor:
    """``x`` rounded to int8: in a lane, four steps of 64 values share a range; the last have their own."""
    rows, inputs = x.shape
    steps = x.view(rows, inputs // 64, INT8_LANES, 4)
    whole = steps.shape[1] // 4 * 4
    groups = [steps[:, k : k + 4] for k in range(0, whole, 4)]
    groups += [steps[:, k : k + 1] for k in range(whole, steps.shape[1])]
    return torch.cat([rounded(group) for group in groups], dim=1).view(x.shape)


def rounded(group: Tensor) -> Tensor:
    ranges = group.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-30)
    # torch computes 127 / ranges as 127 × (1 / ranges), an ulp off: enough to round a tie the other way
    inverse = torch.full_like(ranges, 127).div(ranges)
    return (group * inverse).round() * (ranges / 127)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 30),
    extras=st.tuples(st.booleans(), st.booleans()),
)
def test_products(
    library: Library,
    kind: str,
    rows: int,
    outputs: int,
    blocks: int,
    extras: tuple[bool, bool],
) -> None:
    bias = torch.randn(outputs) if extras[0] else None
    matrix, weight = packed(library, kind, outputs, blocks * BLOCK, bias)
    x = torch.randn(rows, blocks * BLOCK)
    residual = torch.randn(rows, outputs) if extras[1] else None
    expected = as_multiplied(library, kind, x).double() @ weight.double().T
    for extra in (bias, residual):
        expected = expected if extra is None else expected + extra
    torch.testing.assert_close(matrix(x, residual), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [256, 896, 1600])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_batch(library: Library, kind: str, inputs: int) -> None:
    matrix, _ = packed(library, kind, 133, inputs)
    x = torch.randn(23, inputs)
    x[7] *= 1e4  # an outlier in the batch
    together = matrix(x)
    for row in range(23):
        assert torch.equal(matrix(x[row : row + 1].clone())[0], together[row])


@pytest.mark.parametrize("kind", ["int8", "static-int8", "int4"])
def test_a_row_of_zeros_gives_the_bias(library: Library, kind: str) -> None:
    bias = torch.randn(5)
    matrix, _ = packed(library, kind, 5, 64, bias)
    assert torch.equal(matrix(torch.zeros(2, 64)), bias.expand(2, 5))


@pytest.mark.parametrize("kind", ["int8", "int8-lanes", "int4"])
def test_an_outlier_costs_precision_in_its_group_alone(library: Library, kind: str) -> None:
    """The product of the other values is the one that they have without it."""
    matrix, _ = packed(library, kind, 40, 512)
    x = torch.randn(4, 512)
    x[:, 300] *= 1000
    group = torch.zeros(512, dtype=torch.bool)
    group.view(2, 4, INT8_LANES, 4)[1, :, 300 // 4 % INT8_LANES] = True
    apart = matrix(torch.where(group, x, 0)) + matrix(torch.where(group, 0, x))
    torch.testing.assert_close(matrix(x), apart, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("value", [1e4, 1e30])
def test_static_int8_saturates_outside_its_range(library: Library, value: float) -> None:
    matrix, weight = packed(library, "static-int8", 40, 128)
    x = torch.full((7, 128), value)
    x[:, 1::2] *= -1
    factors, zero_points = static_factors(128)
    ends = (torch.tensor([127.0, -128.0]).repeat(64) - zero_points) / factors
    expected = (weight.double() @ ends.double()).float().expand(7, 40)
    torch.testing.assert_close(matrix(x), expected, rtol=1e-4, atol=1e-4)


def test_static_int8_sums_are_exact_at_their_largest(library: Library) -> None:
    """2¹⁶ inputs, all products of one sign and of the largest magnitude: no partial sum overflows."""
    inputs = 2**16
    factors = torch.stack([torch.ones(inputs), torch.full((inputs,), -128.0)])
    codes = torch.full((4, inputs), -127, dtype=torch.int8)
    matrix = PackedMatrix(library, "static-int8", codes, torch.ones(4), input_factors=factors)
    assert torch.equal(matrix(torch.full((1, inputs), 255.0)), torch.full((1, 4), -127.0 * 255 * inputs))
    assert not library.supports("static-int8", inputs + 64)


@pytest.mark.parametrize("kind", ["int8", "static-int8", "int4"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_an_int8_row_that_is_not_finite_is_nan(library: Library, kind: str, fault: float) -> None:
    matrix, _ = packed(library, kind, 9, 320)
    x = torch.randn(2, 320)
    x[0, 5] = x[1, 260] = fault
    assert matrix(x).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_row_leaves_other_rows_unchanged(library: Library, kind: str) -> None:
    matrix, _ = packed(library, kind, 9, 64)
    x = torch.randn(4, 64)
    alone = matrix(x[:1].clone())
    x[2, 5] = math.nan
    found = matrix(x)
    assert torch.equal(found[:1], alone)
    assert found[2].isnan().all()


def test_nested_scales(library: Library) -> None:
    """Quantized scales: table[code] × scale of 256 + offset."""
    outputs, inputs = 40, 512
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    count = outputs * inputs // BLOCK
    table, nested = torch.randn(16), torch.rand(256)
    scale_codes, scale_scales = (
        torch.randint(0, 256, (count,), dtype=torch.uint8),
        torch.rand(-(-count // 256)),
    )
    scales = nested[scale_codes.long()] * scale_scales.repeat_interleave(256)[:count] + 0.25
    x = torch.randn(3, inputs)
    plain = PackedMatrix(library, "four-bit", codes, four_bit=FourBit(table, BLOCK, scales))(x)
    state = FourBit(table, BLOCK, scale_codes, nested, scale_scales, 0.25)
    nested_product = PackedMatrix(library, "four-bit", codes, four_bit=state)(x)
    tolerance = 1e-5 if library.computes_in("four-bit") == "float32" else 1e-2  # a weight may round otherwise
    torch.testing.assert_close(nested_product, plain, rtol=tolerance, atol=10 * tolerance)
