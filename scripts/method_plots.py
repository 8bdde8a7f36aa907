#!/usr/bin/env python3
"""Draws the plots of docs/methods.md from the bundled model's weights, by the package's own quantizers.

.venv/bin/python scripts/method_plots.py
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loaders.affine import dequantize, parameters, quantize
from loaders.affine.applied import Matrix
from loaders.affine.quantizer import affine, parse
from loaders.base import ModelSpec
from loaders.checkpoint import open_checkpoint
from loaders.layer_errors import Originals
from loaders.pretrained import meta_model
from server.report.plots import STYLE

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "methods"
LAYER = "transformer.h.0.mlp.c_fc"
BITS = range(2, 9)
SHARING = {
    "tensor": "one scale",
    "channel": "a scale per output",
    "64": "per 64 weights",
    "32": "per 32 weights",
}
STAIRS = ("int4", "uint4")
RANGES = ("minmax", "percentile", "mse", "kl")


def main() -> None:
    import matplotlib  # late: an optional dependency
    from matplotlib.figure import Figure

    FOLDER.mkdir(exist_ok=True)
    weight = layer()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "bitdial"}):
        for name, draw in (("rounding", rounding), ("sharing", sharing), ("clipping", clipping)):
            figure = Figure(figsize=(7, 3.2), layout="constrained")
            draw(figure.subplots(), weight)
            figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})


def layer() -> Tensor:
    """The bundled model's matrix in float32."""
    checkpoint = open_checkpoint("bundled")
    with Originals(checkpoint, meta_model(ModelSpec(checkpoint))) as originals:
        weight = originals.weight(LAYER)
    assert weight is not None
    return weight.contiguous()


def rounding(axes: Any, weight: Tensor) -> None:
    """Four-bit values of a range that isn't centred: symmetric and asymmetric codes."""
    values = torch.linspace(-0.5, 1.5, 801)
    axes.plot(values, values, color="#c9ced6", label="float32")
    for name, colour in zip(STAIRS, ("#d1603d", "#1b5e9b"), strict=True):
        found = quantized(values[None, :], f"{name}-tensor")[0]
        label = "symmetric (Z = 0)" if name == "int4" else "asymmetric"
        axes.step(values, found, where="mid", color=colour, label=label, linewidth=1)
    axes.set(xlabel="x", ylabel="S (q − Z)")
    axes.legend()


def sharing(axes: Any, weight: Tensor) -> None:
    """The error by the number of bits, for each number of weights that share a scale."""
    for per, label in SHARING.items():
        errors = [Matrix(weight, 64).error(parse(f"int{bits}-{per}")).relative for bits in BITS]
        axes.plot(BITS, errors, marker="o", markersize=3, label=label)
    axes.set(xlabel="bits of a code", ylabel="‖W′ − W‖ / ‖W‖", yscale="log")
    axes.legend()


def clipping(axes: Any, weight: Tensor) -> None:
    """The error of four ways to choose one range, by the number of bits, of weights with an outlier."""
    outlier = weight.clone()
    outlier[0, 0] = 40 * weight.std()
    for way in RANGES:
        suffix = "" if way == "minmax" else f"-{way}"
        errors = [Matrix(outlier, 64).error(parse(f"int{bits}-tensor{suffix}")).relative for bits in BITS]
        axes.plot(BITS, errors, marker="o", markersize=3, label=way)
    axes.set(xlabel="bits of a code", ylabel="‖W′ − W‖ / ‖W‖", yscale="log")
    axes.legend()


def quantized(values: Tensor, name: str) -> Tensor:
    """The values that the codes of a matrix stand for."""
    quantizer = affine(name)
    scale, zero_point = parameters(*quantizer.ranges(Matrix(values, 64)), quantizer.scheme)
    return dequantize(quantize(values, scale, zero_point, quantizer.scheme), scale, zero_point)


if __name__ == "__main__":
    main()
