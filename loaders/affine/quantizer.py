"""A way of quantizing a matrix, by its name: ``int8-channel``, ``uint4-32``, ``int8-tensor-mse``, ``nf4``."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from loaders.affine import arithmetic
from loaders.affine.arithmetic import Per, Scheme, min_max
from loaders.affine.clipping import Range, kl_range, mse_range, mse_ranges, percentile_range
from loaders.affine.method import Method, Values
from loaders.affine.tables import parse as parse_table

Clipping = Literal["minmax", "percentile", "mse", "kl"]
_PERCENT = 99.99
NAMES = """\
int2 … int16 (symmetric), with -full for the lowest code too, or uint2 … uint16 (asymmetric); then
-tensor, -channel (the default) or the size of a group; then -mse, or per tensor -percentile or -kl;
or nf4 or fp4, with the size of a block (64), with -nested for scales in eight bits"""
"""What a name is made of."""


@dataclass(frozen=True)
class Quantizer:
    """Codes, what shares a scale, and how the range that they cover is chosen."""

    name: str
    scheme: Scheme
    per: Per = "channel"
    clipping: Clipping = "minmax"

    note = None
    values = None
    has_zero_point = True
    reach = 0.5
    """The largest error of rounding, in scales."""

    @property
    def bits(self) -> int:
        return self.scheme.bits

    @property
    def codes(self) -> int:
        """How many there are."""
        return self.scheme.steps + 1

    @property
    def lowest(self) -> int:
        return self.scheme.lowest

    def grouped(self, x: Tensor) -> Tensor:
        return arithmetic.grouped(x, self.per)

    def group_of(self, column: int, inputs: int) -> int:
        return arithmetic.group_of(column, inputs, self.per)

    def parameters(self, matrix: Values) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each range, which broadcast against ``grouped(weight, per)``.

        Raises:
            ValueError: the rows can't be divided into groups.
        """
        return arithmetic.parameters(*self.ranges(matrix), self.scheme)

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor, /) -> Tensor:
        return arithmetic.quantize(x, scale, zero_point, self.scheme)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor, /) -> Tensor:
        return arithmetic.dequantize(codes, scale, zero_point)

    def limits(self, scale: Tensor, zero_point: Tensor, /) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each range's codes."""
        return scale * (self.scheme.lowest - zero_point), scale * (self.scheme.highest - zero_point)

    def ranges(self, matrix: Values) -> Range:
        """The (low, high) of each range of a matrix, which broadcast against ``grouped(weight, per)``.

        Raises:
            ValueError: the rows can't be divided into groups.
        """
        if self.clipping == "minmax":
            return min_max(matrix.weight, self.per)
        if self.per != "tensor":
            return mse_ranges(matrix.weight, self.per, self.scheme)
        if self.clipping == "percentile":
            return percentile_range(matrix.histogram, _PERCENT, self.scheme)
        if self.clipping == "kl":
            return kl_range(matrix.histogram, self.scheme)
        return mse_range(matrix.histogram, self.scheme)

    def bits_per_weight(self, inputs: int, weights: int) -> float:
        """Bits of a weight's code and of its share of a float32 scale and, if asymmetric, a zero point."""
        sharing = {"tensor": weights, "channel": inputs}.get(str(self.per)) or int(self.per)
        return self.scheme.bits + (32 + (0 if self.scheme.symmetric else self.scheme.bits)) / sharing


def parse(name: str) -> Method:
    """The quantizer of a name.

    Raises:
        ValueError: the name has another form.
    """
    return parse_table(name) or affine(name)


def affine(name: str) -> Quantizer:
    """As ``parse``, of affine codes alone."""
    first, *words = name.split("-")
    kind = re.fullmatch(r"(u?)int(\d{1,2})", first)
    if kind is None or not 2 <= int(kind[2]) <= 16:
        raise ValueError(_unknown(name))
    full = words[:1] == ["full"] and not kind[1]
    words = words[full:]
    per: Per = "channel"
    if words and (words[0] in ("tensor", "channel") or (words[0].isdecimal() and int(words[0]))):
        word = words.pop(0)
        per = int(word) if word.isdecimal() else "tensor" if word == "tensor" else "channel"
    clipping: Clipping = "minmax"
    for known in get_args(Clipping):
        if words == [known]:
            words, clipping = [], known
    if words or (clipping in ("percentile", "kl") and per != "tensor"):
        raise ValueError(_unknown(name))
    asymmetric = bool(kind[1])
    scheme = Scheme(int(kind[2]), symmetric=not asymmetric, restricted=not full, signed=not asymmetric)
    return Quantizer(name, scheme, per, clipping)


def _unknown(name: str) -> str:
    return f"no quantizer {name[:40]!r}; a name is {' '.join(NAMES.split())}"
