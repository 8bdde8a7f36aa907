import pytest
import torch

from loaders.layers.dynamic_int8_linear import DynamicInt8Linear


def layer() -> tuple[DynamicInt8Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64) * 0.02, torch.randn(96)
    return DynamicInt8Linear(weight, bias), weight, bias


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


def test_the_result_is_near_the_float_one() -> None:
    quantized, weight, bias = layer()
    x = rows(16)
    error = quantized(x) - bias - x @ weight.T
    assert float(error.norm() / (x @ weight.T).norm()) < 0.02


def test_a_row_is_bit_identical_alone_and_among_outliers() -> None:
    quantized, _, _ = layer()
    x = rows(16)
    x[3] *= 1e4
    x[7, 0] = 1e6
    together = quantized(x)
    for i in range(16):
        assert torch.equal(quantized(x[i : i + 1])[0], together[i])


def test_large_activations_do_not_saturate() -> None:
    """All-equal signs drive the 16-bit sums of hosts without VNNI to their largest."""
    weight = torch.full((8, 256), 0.5)
    x = torch.full((1, 256), 3.0)
    torch.testing.assert_close(DynamicInt8Linear(weight, None)(x), x @ weight.T, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    quantized, _, _ = layer()
    x = torch.randn(shape)
    assert quantized(x).shape == (*shape[:-1], 96)


def test_rows_of_zeros_give_the_bias() -> None:
    quantized, _, bias = layer()
    assert torch.equal(quantized(torch.zeros(1, 64))[0], bias)


def test_channels_of_zeros_stay_zero() -> None:
    assert torch.equal(DynamicInt8Linear(torch.zeros(8, 64), None)(rows(2)), torch.zeros(2, 8))


def test_without_vnni_no_pair_of_products_exceeds_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the host: its own products may not saturate, so the codes are what tells."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    quantized, weight, bias = layer()
    codes = quantized.layer_weights().weight
    assert 2 * 255 * int(codes.abs().max()) < 2**15
    x = rows(16)
    error = quantized(x) - bias - x @ weight.T
    assert float(error.norm() / (x @ weight.T).norm()) < 0.03
