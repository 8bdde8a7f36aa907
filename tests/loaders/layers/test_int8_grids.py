"""Grids of int8 layers: LiteRT's has one scale for an output, and one for a row of activations."""

import pytest
import torch
from torch import Tensor

from loaders.layers.dequantize import dequantize_int8
from loaders.layers.int8_grids import CHANNELS, GROUPS, Int8Grid


@pytest.fixture
def matrix() -> Tensor:
    return (
        torch.randn(24, 192, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 24)[:, None]
    )


def test_an_output_has_one_scale_and_no_weight_is_clipped(matrix: Tensor) -> None:
    codes, scales = CHANNELS.quantize(matrix)
    assert scales.shape == (24, 16)
    assert torch.equal(scales, scales[:, :1].expand(-1, 16))
    assert codes.abs().amax(dim=1).ge(126).all()
    error = (dequantize_int8(codes, scales) - matrix).abs()
    assert (error <= 0.5001 * scales[:, :1].float()).all()


def test_groups_are_finer(matrix: Tensor) -> None:
    errors = [(dequantize_int8(*grid.quantize(matrix)) - matrix).norm() for grid in (GROUPS, CHANNELS)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("grid", [GROUPS, CHANNELS])
def test_a_row_is_rounded_by_its_own_values(grid: Int8Grid, matrix: Tensor) -> None:
    rounded = grid.round(matrix)
    for row in (0, 11, 23):
        assert torch.equal(grid.round(matrix[row]), rounded[row])
    width = matrix.amax(dim=1, keepdim=True) - matrix.amin(dim=1, keepdim=True)
    assert ((rounded - matrix).abs() <= 0.51 * width / 127).all()


def test_a_row_has_256_levels_from_its_lowest_to_its_highest_value() -> None:
    row = torch.linspace(-1, 3, 4096)
    rounded = CHANNELS.round(row)
    assert len(rounded.unique()) == 256
    assert (rounded - row).abs().max() < 1.01 * 4 / 255
    assert torch.equal(CHANNELS.round(torch.zeros(64)), torch.zeros(64))
    assert bool((CHANNELS.round(torch.full((64,), 5.0)) == 5).all())  # zero has a code: the range includes it
