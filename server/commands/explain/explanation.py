"""One layer and what each scheme does to it."""

import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from loaders.affine.applied import Applied, Code, Matrix
from loaders.affine.method import Method
from loaders.base import Progress
from server.commands.command_line import UsageError
from server.commands.explain.layers import Layers, Ranked

BINS = 120
"""Of the distributions; a terminal adds neighbours."""


@dataclass(frozen=True)
class Explanation:
    """A layer's weights, and one entry for each scheme that could be applied.

    Args:
        place: (row, column) of the weight whose bits are shown.
        counts: of the original weights in ``BINS`` equal bins from ``low`` to ``high``.
        left_out: schemes that can't be applied, and why.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    low: float
    high: float
    mean: float
    deviation: float
    counts: Tensor
    place: tuple[int, int]
    value: float
    schemes: Sequence[tuple[Applied, Code]]
    left_out: Sequence[str]

    @property
    def outlier(self) -> float:
        """The largest magnitude in standard deviations."""
        return max(-self.low, self.high) / self.deviation if self.deviation else 0.0


def explain(
    layers: Layers,
    name: str,
    quantizers: Sequence[Method],
    place: tuple[int, int] | None,
    progress: Progress,
) -> Explanation:
    """Applies every quantizer to the layer.

    Raises:
        UsageError: the layer has no weight at ``place``, or no quantizer can be applied to it.
        CheckpointError
    """
    weight = layers.weight(name)
    outputs, inputs = weight.shape
    if place is not None and not (place[0] < outputs and place[1] < inputs):
        raise UsageError(f"--weight: {name} has {outputs} rows and {inputs} columns, counted from 0")
    place = place or _median(weight)
    matrix, found, left_out = Matrix(weight, BINS), [], []
    for done, quantizer in enumerate(quantizers, 1):
        try:
            found.append((matrix.apply(quantizer), matrix.code(quantizer, *place)))
        except ValueError as error:
            left_out.append(f"{quantizer.name}: {error}")
        progress(f"quantizing {name}", done, len(quantizers))
    if not found:
        raise UsageError(f"--schemes: {left_out[0]}")
    low, high = matrix.histogram.low, matrix.histogram.high
    mean, deviation = float(weight.mean()), float(weight.std(correction=0))
    return Explanation(
        name,
        layers.kind(name),
        (outputs, inputs),
        low,
        high,
        mean,
        deviation,
        matrix.counts,
        place,
        float(weight[place]),
        found,
        left_out,
    )


def _median(weight: Tensor) -> tuple[int, int]:
    """The place of a weight of median magnitude in the matrix's middle row."""
    row = len(weight) // 2
    return row, int(weight[row].abs().median(dim=0).indices)


def code_values(quantizer: Method, code: Code) -> Tensor:
    """The values of all codes in the range of a weight."""
    codes = torch.arange(quantizer.lowest, quantizer.lowest + quantizer.codes)
    return quantizer.decode(codes, torch.tensor(code.scale), torch.tensor(code.zero_point or 0))


def float_bits(value: float) -> tuple[str, str, str]:
    """Sign, exponent and fraction of a float32 (IEEE 754: 1, 8 and 23 bits)."""
    bits = f"{struct.unpack('>I', struct.pack('>f', value))[0]:032b}"
    return bits[0], bits[1:9], bits[9:]


def float_terms(value: float) -> str:
    """A float32 as its sign, power of two and fraction."""
    fraction, exponent = math.frexp(abs(value))
    sign = "-" if math.copysign(1, value) < 0 else "+"
    return f"{sign}2^{exponent - 1} × {2 * fraction:.7g}" if value else "0"


def code_bits(code: int, bits: int) -> str:
    """An integer code in two's complement."""
    return f"{code & ((1 << bits) - 1):0{bits}b}"


def as_dict(found: Explanation, ranking: Sequence[Ranked]) -> dict[str, Any]:
    """All figures, for JSON."""
    return {
        "layer": found.layer,
        "kind": found.kind,
        "shape": found.shape,
        "low": found.low,
        "high": found.high,
        "mean": found.mean,
        "standard_deviation": found.deviation,
        "counts": found.counts.tolist(),
        "weight": {
            "row": found.place[0],
            "column": found.place[1],
            "value": found.value,
            "float32_bits": "".join(float_bits(found.value)),
        },
        "schemes": {one.quantizer.name: _scheme(one, code) for one, code in found.schemes},
        "left_out": list(found.left_out),
        "layers": [asdict(one) for one in ranking],
    }


def _scheme(one: Applied, code: Code) -> dict[str, Any]:
    quantizer = one.quantizer
    return {
        "lowest_code": quantizer.lowest,
        "highest_code": quantizer.lowest + quantizer.codes - 1,
        "ranges": one.ranges,
        "scale": one.scales,
        "zero_point": one.zero_points,
        "limits": one.limits,
        "clipped": one.clipped,
        "codes_used": one.codes_used,
        "bits_per_weight": one.bits_per_weight,
        "relative_error": one.relative_error,
        "max_error": one.max_error,
        "sqnr_db": one.sqnr_db,
        "counts": one.counts.tolist(),
        "weight": {**asdict(code), "bits": code_bits(code.code, quantizer.bits)},
        "table": None if quantizer.values is None else quantizer.values.tolist(),
        "note": quantizer.note,
    }
