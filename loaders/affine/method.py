"""What a way of quantizing a matrix offers, whatever its codes stand for."""

from typing import Protocol

from torch import Tensor

from loaders.affine.arithmetic import Per
from loaders.affine.histogram import Histogram


class Values(Protocol):
    """A matrix, and its histogram, which is computed where it is needed."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def histogram(self) -> Histogram: ...


class Method(Protocol):
    """Codes, what shares a scale, and how the scales are chosen.

    ``parameters`` returns two tensors, the scales and one that depends on the method, such as the zero
    points; they are what ``encode``, ``decode`` and ``limits`` take, and broadcast against ``grouped``.
    """

    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str | None:
        """What a reader of the figures has to know of the method; None if nothing."""
        ...

    @property
    def per(self) -> Per: ...

    @property
    def bits(self) -> int:
        """Of one code."""
        ...

    @property
    def codes(self) -> int:
        """How many there are."""
        ...

    @property
    def lowest(self) -> int:
        """The lowest code."""
        ...

    @property
    def values(self) -> Tensor | None:
        """(codes,) float32, the table by code; None of affine codes."""
        ...

    @property
    def has_zero_point(self) -> bool: ...

    @property
    def reach(self) -> float:
        """The largest error of rounding, in scales."""
        ...

    def grouped(self, x: Tensor) -> Tensor:
        """Some rows of a matrix; the last dimension holds what shares a scale.

        Raises:
            ValueError: the rows can't be divided into groups.
        """
        ...

    def group_of(self, column: int, inputs: int) -> int:
        """The group of a column, counted in its row of so many inputs."""
        ...

    def parameters(self, matrix: Values) -> tuple[Tensor, Tensor]:
        """
        Raises:
            ValueError: the rows can't be divided into groups, or a weight is not finite.
        """
        ...

    def encode(self, x: Tensor, scale: Tensor, offset: Tensor, /) -> Tensor: ...

    def decode(self, codes: Tensor, scale: Tensor, offset: Tensor, /) -> Tensor: ...

    def limits(self, scale: Tensor, offset: Tensor, /) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each range's codes."""
        ...

    def bits_per_weight(self, inputs: int, weights: int) -> float:
        """Of a code and its share of what describes its range."""
        ...
