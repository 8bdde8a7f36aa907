"""A quantizer applied to a matrix in blocks of rows: the same as all at once; and quantizers' names."""

import pytest
import torch
from torch import Tensor

from loaders.affine import Scheme, dequantize, grouped, min_max, parameters, quantize
from loaders.affine import applied as module
from loaders.affine.applied import Matrix
from loaders.affine.clipping import mse_ranges
from loaders.affine.error import compare
from loaders.affine.quantizer import Quantizer, affine, parse


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(2)
    weight = torch.randn(48, 64)
    weight[:, 5] *= 12
    weight[7, 9] = 90
    return weight


@pytest.mark.parametrize("name", ["int8-tensor", "uint8-channel", "int4-16", "int8-full-32", "uint4-32-mse"])
@pytest.mark.parametrize("at_once", [64 * 7, 2**22])
def test_figures_are_those_of_the_whole_matrix(
    weight: Tensor, name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WEIGHTS", at_once)
    quantizer, matrix = affine(name), Matrix(weight, 30)
    found = matrix.apply(quantizer)
    scheme, per = quantizer.scheme, quantizer.per
    ranges = mse_ranges(weight, per, scheme) if name.endswith("mse") else min_max(weight, per)
    scale, zero_point = parameters(*ranges, scheme)
    codes = quantize(grouped(weight, per), scale, zero_point, scheme)
    after = dequantize(codes, scale, zero_point).view(48, 64)
    expected = compare(weight, after)
    assert (found.relative_error, found.max_error, found.sqnr_db) == pytest.approx(expected)
    sums = matrix.error(quantizer)
    assert (sums.relative, sums.largest, sums.sqnr_db) == (
        expected if at_once > 448 else pytest.approx(expected)
    )
    assert found.codes_used == len(codes.unique())
    assert (found.ranges, found.scales) == (scale.numel(), (float(scale.min()), float(scale.max())))
    assert found.counts.sum() == found.errors.total == weight.numel()
    for row, column in ((7, 9), (0, 0), (47, 63)):
        code = matrix.code(quantizer, row, column)
        assert code.code == int(codes.reshape(48, 64)[row, column])
        assert code.value == float(after[row, column])


def test_what_is_clipped_is_off_by_more_than_half_a_scale(weight: Tensor) -> None:
    matrix = Matrix(weight, 30)
    assert matrix.apply(parse("int8-tensor")).clipped == 0
    found = matrix.apply(parse("int4-tensor-mse"))
    beyond = found.limits[1] + found.scales[0] / 2
    assert found.clipped == int((weight.abs() > beyond).sum()) > 0
    assert found.max_error == pytest.approx(90 - found.limits[1])


@pytest.mark.parametrize("scheme", [Scheme(bits=4), Scheme(bits=4, symmetric=False, signed=False)])
@pytest.mark.parametrize("per", ["channel", 16])
def test_no_fraction_of_a_range_has_a_smaller_error(weight: Tensor, scheme: Scheme, per: int) -> None:
    groups, (low, high) = grouped(weight, per), mse_ranges(weight, per, scheme)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = parameters(low, high, scheme)
        codes = quantize(groups, scale, zero_point, scheme)
        return (dequantize(codes, scale, zero_point) - groups).square().sum(-1)

    found, (lowest, highest) = errors(low, high), min_max(weight, per)
    for fraction in (1.0, 0.9, 0.76, 0.5, 0.3):
        assert bool((found <= errors(lowest * fraction, highest * fraction) * 1.0001).all())
    assert float(found.sum()) < 0.98 * float(errors(lowest, highest).sum())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", Quantizer("int8", Scheme())),
        ("int8-full-tensor", Quantizer("int8-full-tensor", Scheme(restricted=False), "tensor")),
        ("uint4-32", Quantizer("uint4-32", Scheme(4, symmetric=False, signed=False), 32)),
        ("int6-tensor-kl", Quantizer("int6-tensor-kl", Scheme(6), "tensor", "kl")),
        ("int4-mse", Quantizer("int4-mse", Scheme(4), "channel", "mse")),
    ],
)
def test_a_name(name: str, expected: Quantizer) -> None:
    assert parse(name) == expected


@pytest.mark.parametrize(
    "name", ["", "int1", "int17", "float8", "int8-0", "int8-mse-tensor", "int8-32-kl", "uint8-full", "int8-"]
)
def test_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="no quantizer"):
        parse(name)
