"""Four-bit codes of a table: bitsandbytes' own values, scales and codes."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from loaders.affine.applied import Matrix
from loaders.affine.quantizer import parse
from loaders.affine.tables import TableQuantizer, nested

functional: Any = pytest.importorskip("bitsandbytes.functional")


@cache
def weight() -> Tensor:
    matrix = torch.randn(96, 256, generator=torch.Generator().manual_seed(7)) / 20
    matrix[3, 5], matrix[4], matrix[5, 64:128] = 2.0, 0, 0
    return matrix


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-128", "nf4-nested", "fp4-64-nested"])
def test_the_values_are_those_of_bitsandbytes(name: str) -> None:
    quantizer = parse(name)
    assert isinstance(quantizer, TableQuantizer)
    packed, state = functional.quantize_4bit(
        weight(), blocksize=quantizer.per, quant_type=quantizer.table, compress_statistics=quantizer.nested
    )
    expected = functional.dequantize_4bit(packed, state)
    scale, exact = quantizer.parameters(Matrix(weight(), 1))
    blocks = weight().view(96, -1, quantizer.per)
    codes = quantizer.encode(blocks, scale, exact)
    found = quantizer.decode(codes, scale, exact).view(96, 256)
    near = (found - expected).abs() < 1e-6
    # weights between two values; scales between two of theirs, which change the 64 weights of a block
    assert float(near.float().mean()) > (0.98 if quantizer.nested else 0.999)
    applied = Matrix(weight(), 30).apply(quantizer)
    assert applied.relative_error == pytest.approx(
        float((expected - weight()).norm() / weight().norm()), rel=1e-3
    )
    assert (applied.zero_points, applied.clipped) == (None, 0)
    stored = packed.view(-1)
    theirs = torch.stack([stored >> 4, stored & 15], dim=1).view(96, 256)
    same = (codes.view(96, 256) == theirs) | (found == 0)  # FP4 has two zeros
    assert float(same.float().mean()) > 0.999


def test_nested_scales_are_those_of_bitsandbytes() -> None:
    scales = torch.rand(700, generator=torch.Generator().manual_seed(8)) + 0.1
    middle = scales.mean()
    codes, state = functional.quantize_blockwise(scales - middle, blocksize=256)
    expected = functional.dequantize_blockwise(codes, state) + middle
    torch.testing.assert_close(nested(scales), expected, rtol=0, atol=2e-3)
    assert float(((nested(scales) - expected).abs() < 1e-6).float().mean()) > 0.98


def test_bits_of_a_weight() -> None:
    assert parse("nf4").bits_per_weight(256, 96 * 256) == 4 + 32 / 64
    assert parse("nf4-nested").bits_per_weight(256, 96 * 256) == pytest.approx(4 + (8 + 32 / 256) / 64)


def test_one_weight() -> None:
    code = Matrix(weight(), 1).code(parse("nf4"), 3, 5)
    assert (code.code, code.scale, code.level, code.value, code.zero_point) == (15, 2.0, 1.0, 2.0, None)
    code = Matrix(weight(), 1).code(parse("fp4"), 3, 5)
    assert (code.code, code.level) == (3, 1.0)
    assert Matrix(weight(), 1).code(parse("nf4"), 4, 0).value == 0


@pytest.mark.parametrize("name", ["nf4-0", "nf5", "nf4-channel", "nf4-nested-64", "fp4-mse"])
def test_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="no quantizer"):
        parse(name)


def test_weights_that_are_no_numbers() -> None:
    broken = weight().clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        parse("nf4").parameters(Matrix(broken, 1))
