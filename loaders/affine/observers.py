"""Observers: they see a tensor's values in batches and choose the range that its codes cover."""

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from loaders.affine.arithmetic import Scheme
from loaders.affine.clipping import Range, kl_range, mse_range, percentile_range
from loaders.affine.histogram import Histogram


class Observer(Protocol):
    """Chooses one range for all values that it has seen; its memory does not grow with their number."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Takes in all elements of ``x``, of any shape; an empty tensor changes nothing.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        ...

    @abstractmethod
    def range(self, scheme: Scheme) -> Range:
        """The (low, high) of the range, float32 scalars, for ``parameters``.

        Raises:
            ValueError: no value was observed.
        """
        ...


class MinMaxObserver:
    """The smallest and the largest value; nothing is clipped."""

    def __init__(self) -> None:
        self._low, self._high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = (bound.float().cpu() for bound in x.detach().aminmax())
        if not bool(low.isfinite() & high.isfinite()):
            raise ValueError("NaN and infinite values can't be observed")
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)

    def range(self, scheme: Scheme) -> Range:
        if bool(self._low > self._high):
            raise ValueError("no value was observed")
        return self._low, self._high


class _HistogramObserver:
    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    def _observed(self) -> Histogram:
        if self.histogram.low > self.histogram.high:
            raise ValueError("no value was observed")
        return self.histogram


class PercentileObserver(_HistogramObserver):
    """The range of ``percent`` of the values; see ``percentile_range``."""

    def __init__(self, percent: float = 99.99) -> None:
        if not 0 < percent <= 100:
            raise ValueError(f"a percentile of {percent}: choose one above 0, up to 100")
        super().__init__()
        self._percent = percent

    def range(self, scheme: Scheme) -> Range:
        return percentile_range(self._observed(), self._percent, scheme)


class MSEObserver(_HistogramObserver):
    """The range of the smallest mean squared error; see ``mse_range``."""

    def range(self, scheme: Scheme) -> Range:
        return mse_range(self._observed(), scheme)


class KLObserver(_HistogramObserver):
    """The range by KL divergence, TensorRT's entropy calibration; see ``kl_range``."""

    def range(self, scheme: Scheme) -> Range:
        return kl_range(self._observed(), scheme)
