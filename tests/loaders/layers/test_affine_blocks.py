"""Weights in affine blocks: their codes, and GPTQ's rounding against plain rounding on the outputs."""

import pytest
import torch
from torch import Tensor

from loaders.layers.affine_blocks import BLOCK, pack, quantize, unpack
from tests.loaders.layers.test_gptq import correlated


def normal(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [2, 7, 64])
def test_codes_are_packed_low_bits_first(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits)[..., :count], codes)
    assert int(packed[0, 0, 0]) % 2**bits == int(codes[0, 0, 0])


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 19, 28), (8, 44, 52)])
@pytest.mark.parametrize("inputs", [32, 96, 100, 7])
def test_the_error_is_that_of_the_bits(bits: int, least: float, most: float, inputs: int) -> None:
    """Also where the last block is not whole."""
    weight = normal(64, inputs)
    blocks = quantize(weight, bits)
    assert blocks.codes.shape == (64, -(-inputs // BLOCK), BLOCK)
    found = blocks.dequantize()
    assert found.shape == weight.shape
    assert least < 20 * float((weight.norm() / (found - weight).norm()).log10()) < most


def test_every_code_of_eight_bits_is_within_half_a_step() -> None:
    weight = normal(16, 64)
    blocks = quantize(weight, 8)
    steps = blocks.scales.repeat_interleave(BLOCK, dim=1)
    assert bool(((blocks.dequantize() - weight).abs() <= 0.5001 * steps).all())


def test_weights_that_the_codes_have_are_kept() -> None:
    """Zero is one of them: padding and pruned weights stay zero."""
    codes = torch.randint(0, 16, (8, 3, BLOCK), generator=torch.Generator().manual_seed(6))
    codes[..., :3] = torch.tensor([0, 15, 7])  # the whole range, and zero
    exact = ((codes - 7) * 0.01).flatten(1)
    torch.testing.assert_close(quantize(exact, 4).dequantize(), exact, rtol=1e-4, atol=1e-6)
    assert not quantize(torch.zeros(4, 64), 4).dequantize().any()


@pytest.mark.parametrize("inputs", [192, 300])
def test_the_outputs_are_nearer_than_by_plain_rounding(inputs: int) -> None:
    x, weight = correlated(inputs), normal(48, inputs)

    def error(hessian: Tensor | None) -> float:
        off = quantize(weight, 4, hessian).dequantize() - weight
        return float((x @ off.T).norm() / (x @ weight.T).norm())

    assert error(x.T @ x) < 0.85 * error(None) < 0.09


def test_the_scales_are_better_than_those_of_the_range() -> None:
    """Than of minimum and maximum, as ONNX Runtime's quantizer has them."""
    from loaders.affine.applied import Matrix
    from loaders.affine.quantizer import parse

    weight = normal(64, 256)
    usual = Matrix(weight, 1).error(parse("uint4-32")).relative
    found = float((quantize(weight, 4).dequantize() - weight).norm() / weight.norm())
    assert found < 0.96 * usual


@pytest.mark.parametrize("case", ["few rows", "zeros", "not finite"])
def test_a_matrix_of_inputs_that_is_not_usable_is_no_error(case: str) -> None:
    x, weight = correlated(192), normal(16, 192)
    hessian = x[:5].T @ x[:5] if case == "few rows" else x.T @ x
    if case == "zeros":
        hessian.zero_()
    if case == "not finite":
        hessian[3, 5] = torch.nan
    found = quantize(weight, 4, hessian).dequantize()
    assert found.isfinite().all()
    assert float((found - weight).norm() / weight.norm()) < 0.6
