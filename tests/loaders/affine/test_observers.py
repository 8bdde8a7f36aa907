"""Ranges against other computations of them: NumPy's, PyTorch's, a search over all values, a plain loop."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import observer as ao

from loaders.affine import (
    Histogram,
    KLObserver,
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    Scheme,
    dequantize,
    parameters,
    quantize,
)
from tests.loaders.affine.schemes import examples, matrices, schemes

INT8, UINT8 = Scheme(), Scheme(symmetric=False, signed=False)
OBSERVERS: list[Callable[[], Observer]] = [MinMaxObserver, PercentileObserver, MSEObserver, KLObserver]


def normal() -> Tensor:
    return torch.randn(49_999)


def outliers() -> Tensor:
    """As the inputs of a transformer's layers: a few channels far out."""
    x = torch.randn(499, 100)
    x[:, 7] *= 60
    return x


def gelu() -> Tensor:
    return torch.nn.functional.gelu(torch.randn(49_999) * 2)


def laplace() -> Tensor:
    return torch.distributions.Laplace(0.5, 1.0).sample((49_999,))


VALUES = [normal, outliers, gelu, laplace]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def observed(observer: Observer, x: Tensor, parts: int = 7) -> Observer:
    for part in x.reshape(-1).tensor_split(parts):
        observer.update(part)
    return observer


def squared_error(x: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> float:
    scale, zero_point = parameters(low, high, scheme)
    found = dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point)
    return float((found - x).double().square().mean())


dyadic = st.builds(lambda whole, exponent: whole * 2.0**exponent, st.integers(-999, 999), st.integers(-9, 9))
"""Values that lie clearly in one bin, whatever the limit."""


@examples
@given(st.lists(st.lists(dyadic, min_size=1), min_size=1, max_size=4))
def test_a_histogram_forgets_the_order_of_its_batches(batches: list[list[float]]) -> None:
    one, other, whole = Histogram(64), Histogram(64), Histogram(64)
    for batch in batches:
        one.update(torch.tensor(batch))
    for batch in reversed(batches):
        other.update(torch.tensor(batch))
    whole.update(torch.tensor([value for batch in batches for value in batch]))
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.counts, whole.counts)
    assert (one.low, one.high, one.limit) == (other.low, other.high, other.limit)
    assert one.total == sum(map(len, batches))
    largest = max(-one.low, one.high)
    assert largest <= one.limit <= max(2 * largest, 2.0**-126)


def test_a_histogram_counts_as_numpys_does() -> None:
    histogram, x = Histogram(512), outliers().reshape(-1)
    x = (x * 64).round() / 64 + 2**-12  # no value is close to an edge
    for part in x[x.abs().argsort()].split(5000):  # widens again and again
        histogram.update(part)
    edges = np.linspace(-histogram.limit, histogram.limit, 1025)
    expected, _ = np.histogram(x.numpy().astype(np.float64), edges)
    assert histogram.counts.tolist() == expected.tolist()
    np.testing.assert_allclose(histogram.centres() * histogram.limit, (edges[1:] + edges[:-1]) / 2)
    sizes, _ = np.histogram(x.abs().numpy().astype(np.float64), edges[512:])
    assert histogram.magnitudes().tolist() == sizes.tolist()
    assert histogram.magnitudes(64).tolist() == sizes.reshape(64, 8).sum(1).tolist()


def test_a_histogram_keeps_its_size_and_counts_beyond_float32() -> None:
    histogram = Histogram(64)
    for exponent in range(-20, 20):
        histogram.update(torch.full((100,), 2.0**exponent))
    assert histogram.counts.shape == (128,)
    histogram = Histogram(64)
    histogram.update(torch.ones(1).expand(2**24 + 3))  # float32 counts stop at 2²⁴
    assert histogram.total == 2**24 + 3


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("percent", [99.0, 99.9])
def test_percentiles_are_numpys(values: Callable[[], Tensor], percent: float) -> None:
    x = values()
    observer = PercentileObserver(percent)
    observed(observer, x)
    width = observer.histogram.width * 1.001
    low, high = (float(bound) for bound in observer.range(UINT8))
    ends = np.percentile(x.numpy(), [(100 - percent) / 2, (100 + percent) / 2], method="inverted_cdf")
    assert [low, high] == pytest.approx(ends, abs=width)
    assert float(((x >= low) & (x <= high)).double().mean()) >= percent / 100 - 1e-12
    m = max(abs(float(bound)) for bound in observer.range(INT8))
    expected = np.percentile(x.abs().numpy(), percent, method="inverted_cdf")
    assert expected <= m <= expected + width


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_range_of_the_smallest_error_symmetric(values: Callable[[], Tensor], bits: int) -> None:
    """Against every threshold of a fine grid on the values themselves."""
    x, scheme = values()[::5], Scheme(bits)
    found = squared_error(x, *observed(MSEObserver(), x).range(scheme), scheme)
    grid = x.abs().max() * torch.linspace(0.02, 1, 100)
    assert found <= 1.005 * min(squared_error(x, -m, m, scheme) for m in grid)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_range_of_the_smallest_error_asymmetric(values: Callable[[], Tensor], bits: int) -> None:
    """No worse than PyTorch's HistogramObserver, which searches for the smallest error as well."""
    x, scheme = values(), Scheme(bits, symmetric=False, signed=False)
    found = squared_error(x, *observed(MSEObserver(), x).range(scheme), scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ao.HistogramObserver(dtype=torch.quint8, quant_min=0, quant_max=2**bits - 1)
        theirs(x)
        scale, zero_point = theirs.calculate_qparams()
    codes = quantize(x, scale, zero_point, scheme)
    assert found <= 1.005 * float((dequantize(codes, scale, zero_point) - x).double().square().mean())
    assert found <= 1.005 * squared_error(x, x.min(), x.max(), scheme)
    assert found <= 1.005 * squared_error(x, *observed(PercentileObserver(99.9), x).range(scheme), scheme)


def published_divergence(counts: list[int], size: int, levels: int) -> float:
    """KL(P ‖ Q) of one threshold as Migacz 2017 writes it, bin by bin."""
    p = [float(count) for count in counts[:size]]
    p[-1] += sum(counts[size:])
    q = [0.0] * size
    for level in range(levels):
        inside = [at for at in range(size) if at * levels // size == level and counts[at]]
        for at in inside:
            q[at] = sum(counts[one] for one in inside) / len(inside)
    if any(p[at] and not q[at] for at in range(size)):
        return math.inf
    terms = ((p[at] / sum(p), q[at] / sum(q)) for at in range(size) if p[at])
    return sum(one * math.log(one / other) for one, other in terms)


@pytest.mark.parametrize("values", [normal, outliers])
def test_the_range_by_kl_divergence(values: Callable[[], Tensor]) -> None:
    x, scheme = values(), Scheme(bits=4)
    observer = KLObserver()
    observed(observer, x)
    high = float(observer.range(scheme)[1])
    counts, width = observer.histogram.magnitudes(2048).tolist(), observer.histogram.limit / 2048
    size = round(high / width - 0.5) if high < float(x.max()) else math.ceil(float(x.max()) / width)
    best = published_divergence(counts, size, 8)
    others = [published_divergence(counts, other, 8) for other in range(8, 2049, 40)]
    assert best <= min(others)
    assert high < 0.9 * float(x.abs().max())


@pytest.mark.parametrize("make", OBSERVERS)
@examples
@given(x=matrices(), scheme=schemes)
def test_ranges_lie_within_what_was_observed(make: Callable[[], Observer], x: Tensor, scheme: Scheme) -> None:
    observer = make()
    observer.update(x)
    low, high = observer.range(scheme)
    assert low.dtype == high.dtype == torch.float32
    if make is MinMaxObserver:
        assert (low, high) == x.aminmax()
    else:
        assert x.min().clamp_max(0) <= low <= 0 <= high <= x.max().clamp_min(0)
    scale, _ = parameters(low, high, scheme)
    assert bool(scale.isfinite() & (scale > 0))


@pytest.mark.parametrize("make", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-40])
def test_equal_values_are_not_clipped(make: Callable[[], Observer], value: float) -> None:
    x = torch.full((4, 5), value)
    for scheme in (INT8, UINT8):
        low, high = observed(make(), x, 2).range(scheme)
        assert squared_error(x, low, high, scheme) <= (value / 254) ** 2 + 1e-76


@pytest.mark.parametrize("make", OBSERVERS)
def test_what_cannot_be_observed(make: Callable[[], Observer]) -> None:
    observer = make()
    with pytest.raises(ValueError, match="no value was observed"):
        observer.range(INT8)
    observer.update(torch.empty(3, 0))
    with pytest.raises(ValueError, match="no value was observed"):
        observer.range(INT8)
    observer.update(torch.tensor([1.0, -4.0]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="can't be observed"):
            observer.update(torch.tensor([9.0, bad]))
    assert float(observer.range(INT8)[1]) <= 1, "a batch that was refused left something behind"
    for half in (torch.bfloat16, torch.float16):
        observer.update(torch.tensor([2.0, 3.0], dtype=half))
    assert float(make_range(make, torch.tensor([2.0, 3.0]))[1]) <= 3


def make_range(make: Callable[[], Observer], x: Tensor) -> tuple[Tensor, Tensor]:
    observer = make()
    observer.update(x)
    return observer.range(INT8)


def test_arguments_that_are_impossible() -> None:
    with pytest.raises(ValueError, match="100 bins"):
        Histogram(100)
    with pytest.raises(ValueError, match="percentile of 0"):
        PercentileObserver(0)
