"""An explanation as a picture: the weights before and after each scheme, their errors, one weight's bits."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loaders.affine.applied import Applied
from server.commands.explain.explanation import Explanation, code_bits, code_values, float_bits, float_terms
from server.commands.explain.text import MOST_SHOWN, weight_value
from server.report.plots import STYLE
from server.settings.output import NotSaved

_BEFORE, _AFTER, _LIMIT = "#c9ced6", "#1b5e9b", "#d1603d"
_SIGN, _EXPONENT, _FRACTION = "#d1603d", "#2f8f5b", "#1b5e9b"
_WIDTH, _TITLE, _SCHEME, _BITS = 11.0, 1.0, 1.15, 0.27  # inches


def draw(found: Explanation, model: str, file: Path) -> None:
    """Writes the picture, as SVG or PNG by the file's name.

    Raises:
        NotSaved
    """
    import matplotlib
    from matplotlib.figure import Figure

    schemes = len(found.schemes)
    bits = _BITS * (schemes + 3)
    height = _TITLE + _SCHEME * schemes + bits
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(height - bits, bits))
        upper, lower = parts
        upper.suptitle(_title(found, model), fontsize=11, ha="left", x=0.01)
        axes = upper.subplots(schemes, 3, squeeze=False, width_ratios=(1.1, 3.6, 1.3), sharex="col")
        widest = 3 * max(_rms(one) for one, _ in found.schemes)
        for (left, middle, right), (one, code) in zip(axes, found.schemes, strict=True):
            left.set_axis_off()
            left.text(0, 1, one.quantizer.name, va="top", weight="bold", fontsize=9)
            left.text(0, 0.8, _figures(one), va="top", fontsize=8, linespacing=1.3)
            _distribution(middle, found, one)
            if one.quantizer.codes <= MOST_SHOWN:
                middle.vlines(code_values(one.quantizer, code).tolist(), 0.7, 1.5, color=_LIMIT, linewidth=1)
            _errors(right, one, widest or 1.0)
        axes[-1][1].set_xlabel(
            "weights, logarithmic counts; grey: float32; dashed: the outermost codes\n"
            "below: all codes in the range of the weight shown"
        )
        axes[-1][2].set_xlabel("W′ − W")
        _bits(lower.subplots(), found)
        _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    metadata = {"Date": None, "Creator": None} if file.suffix.lower() == ".svg" else {"Software": None}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata=metadata, dpi=144)
    except OSError as error:
        raise NotSaved(f"--out: {error.strerror}") from error


def _title(found: Explanation, model: str) -> str:
    return (
        f"{found.layer} of {model}: {found.kind}, {found.shape[0]} × {found.shape[1]}\n"
        f"{found.low:.4g} … {found.high:.4g}, σ {found.deviation:.4g}, "
        f"largest magnitude {found.outlier:.1f} σ"
    )


def _distribution(axes: Any, found: Explanation, one: Applied) -> None:
    edges = torch.linspace(found.low, found.high, len(found.counts) + 1).tolist()
    axes.stairs(found.counts.tolist(), edges, fill=True, color=_BEFORE)
    axes.stairs(one.counts.tolist(), edges, color=_AFTER, linewidth=1)
    for limit in one.limits:
        axes.axvline(limit, color=_LIMIT, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    margin = 0.03 * (found.high - found.low) or 1.0
    axes.set(ylim=(0.7, None), xlim=(found.low - margin, found.high + margin))
    axes.tick_params(labelsize=7)


def _figures(one: Applied) -> str:
    scale = " … ".join(dict.fromkeys(f"{end:.3g}" for end in one.scales))
    zero = " … ".join(dict.fromkeys(f"{end}" for end in one.zero_points or ("none",)))
    ranges = "1 range" if one.ranges == 1 else f"{one.ranges:,} ranges"
    noise = "" if one.sqnr_db is None else f", {one.sqnr_db:.1f} dB"
    note = f"\n{one.quantizer.note}" if one.quantizer.note else ""
    return (
        f"{ranges}, {one.bits_per_weight:.2f} bits\nS {scale}\nZ {zero}\n"
        f"{one.clipped:,} clipped\nerror {one.relative_error:.2%}{noise}{note}"
    )


def _errors(axes: Any, one: Applied, widest: float) -> None:
    """The distribution of the errors within −widest … widest; all rows have the same area."""
    values = one.errors.centres() * one.errors.limit
    bins = 81
    shown = torch.histogram(values, bins, range=(-widest, widest), weight=one.errors.counts.float()).hist
    edges = torch.linspace(-widest, widest, bins + 1).tolist()
    axes.stairs((shown / one.errors.total).tolist(), edges, fill=True, color=_AFTER)
    axes.tick_params(labelsize=7)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.annotate(
        f"max {one.max_error:.2g}", (0.99, 0.97), xycoords="axes fraction", va="top", ha="right", fontsize=8
    )


def _rms(one: Applied) -> float:
    squares = (one.errors.centres() * one.errors.limit).square()
    return math.sqrt(float(squares @ one.errors.counts.float()) / one.errors.total)


def _bits(axes: Any, found: Explanation) -> None:
    """One weight's bits as cells: sign, exponent and fraction; or the integer code."""
    sign, exponent, fraction = float_bits(found.value)
    row, column = found.place
    axes.set_axis_off()
    axes.set(xlim=(-12, 64), ylim=(len(found.schemes) + 1, -0.6))
    axes.set_title(f"The weight in row {row}, column {column}", fontsize=10)
    colours = [_SIGN, *[_EXPONENT] * 8, *[_FRACTION] * 23]
    _cells(axes, 0, "float32", sign + exponent + fraction, colours, 0)
    _text(axes, 33, 0, f"= {float_terms(found.value)} = {found.value:.7g}")
    for at, (one, code) in enumerate(found.schemes, 1):
        bits = code_bits(code.code, one.quantizer.bits)
        _cells(axes, at, one.quantizer.name, bits, [_AFTER] * len(bits), 0)
        _text(axes, 33, at, f"{weight_value(code)}, off by {code.value - found.value:+.2g}")


def _cells(axes: Any, at: int, name: str, bits: str, colours: Sequence[str], start: float) -> None:
    from matplotlib.patches import Rectangle

    _text(axes, -12, at, name)
    for place, (bit, colour) in enumerate(zip(bits, colours, strict=True)):
        face = colour if bit == "1" else "white"
        axes.add_patch(
            Rectangle((start + place, at - 0.4), 0.92, 0.8, facecolor=face, edgecolor=colour, lw=0.8)
        )
        ink = "white" if bit == "1" else colour
        axes.text(start + place + 0.46, at, bit, ha="center", va="center", fontsize=7, color=ink)


def _text(axes: Any, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="left", va="center", fontsize=9)
