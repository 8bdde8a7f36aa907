"""An explanation in a terminal: distributions, a table of the schemes, and one weight's bits."""

import math
from collections.abc import Sequence

from torch import Tensor

from loaders.affine.applied import Applied, Code
from server.commands.explain.explanation import Explanation, code_bits, code_values, float_bits, float_terms
from server.commands.explain.layers import Ranked
from server.tables import NONE, aligned
from server.terminal import folded, terminal_width

_WIDEST, _PIPED = 110, 100
_BLOCKS = " ▁▂▃▄▅▆▇█"
_ROWS = 6  # of the original distribution
_LISTED = 10
MOST_SHOWN = 16
"""Codes of a scheme whose values are marked below its distribution."""
_LEGEND = """\
x ≈ S (q − Z)  with an integer code q, a scale S and a zero point Z
x ≈ S T[q]     with a table T of 16 values; nf4, fp4: S is the largest magnitude of a block
int4-table     T and S as of the precision int4: S is an int8 × a float32 of the output, of either sign
scales    how many there are; S and Z: the smallest and the largest
clipped   weights beyond the codes of their range
codes     different codes used, of those that exist
bits      of memory per weight, with scales and zero points
error     ‖W′ − W‖ / ‖W‖;  max: the largest |W′ − W|;  SQNR: 20 log₁₀ (‖W‖ / ‖W′ − W‖)"""


def ranking_lines(ranking: Sequence[Ranked], scheme: str) -> list[str]:
    """The layers with the largest errors."""
    shown = ranking[:_LISTED]
    rows = [["layer", "shape", "max / σ", "error", "SQNR dB"]]
    for one in shown:
        shape, error = f"{one.shape[0]} × {one.shape[1]}", f"{one.relative_error:.3%}"
        rows.append([one.name, shape, f"{one.outlier:.1f}", error, _db(one.sqnr_db)])
    title = f"The largest errors in {scheme}, {len(shown)} of {len(ranking)} linear layers:"
    return [folded(title), "", *aligned(rows, terminal_width())]


def lines(found: Explanation, model: str) -> list[str]:
    """Everything about one layer, within the terminal's width."""
    width = min(terminal_width() or _PIPED, _WIDEST)
    size = 4 * found.shape[0] * found.shape[1]
    return [
        folded(
            f"{found.layer} of {model}: {found.kind}, {found.shape[0]} × {found.shape[1]}, "
            f"{size:,} bytes in float32"
        ),
        folded(
            f"from {found.low:.4g} to {found.high:.4g}, mean {found.mean:.3g}, standard deviation σ "
            f"{found.deviation:.4g}; the largest magnitude is {found.outlier:.1f} σ"
        ),
        "",
        *_distributions(found, width),
        "",
        *aligned(_table(found.schemes), terminal_width()),
        *(
            folded(f"{one.quantizer.name}: {one.quantizer.note}")
            for one, _ in found.schemes
            if one.quantizer.note
        ),
        *(folded(f"left out: {reason}") for reason in found.left_out),
        "",
        folded(_LEGEND),
        "",
        *_weight(found),
    ]


def _distributions(found: Explanation, width: int) -> list[str]:
    names = [one.quantizer.name for one, _ in found.schemes]
    margin = max(map(len, [*names, "float32"])) + 2
    beside = width - margin >= 24
    columns = max(8, width - margin if beside else width)
    most = float(_columns(found.counts, columns).max())
    indent = " " * margin if beside else ""
    shown = [folded("weights before and after, in the same bins; heights: logarithm of their number"), ""]
    bars = _bars(_columns(found.counts, columns), most, _ROWS)
    shown += [
        (("float32".ljust(margin) if at == 0 and beside else indent) + bar) for at, bar in enumerate(bars)
    ]
    shown += [indent + _axis(found.low, found.high, columns)]
    for name, (one, code) in zip(names, found.schemes, strict=True):
        (bar,) = _bars(_columns(one.counts, columns), most, 1)
        shown += [name.ljust(margin) + bar] if beside else [name, bar]
        if one.quantizer.codes <= MOST_SHOWN:
            shown += [indent + _marks(code_values(one.quantizer, code), found, len(bar))]
    if any(one.quantizer.codes <= MOST_SHOWN for one, _ in found.schemes):
        shown += ["", folded("each ╵ is the value of a code in the range of the weight shown below")]
    return [line.rstrip() for line in shown]


def _axis(low: float, high: float, columns: int) -> str:
    """The smallest and the largest value at the ends, and zero in its place where there is room."""
    left, right = f"{low:.4g}", f"{high:.4g}"
    line = list(left.ljust(columns - len(right)) + right)
    zero = int(-low / (high - low) * columns) if low < 0 < high else 0
    if len(left) < zero < columns - len(right) - 1:
        line[zero] = "0"
    return "".join(line)


def _marks(values: Tensor, found: Explanation, columns: int) -> str:
    """The places of values on the axis of the distribution; those outside of it are left out."""
    line, width = [" "] * columns, (found.high - found.low) or 1.0
    for value in values.tolist():
        if found.low <= value <= found.high:
            line[min(columns - 1, int((value - found.low) / width * columns))] = "╵"
    return "".join(line)


def _columns(counts: Tensor, columns: int) -> Tensor:
    """The counts in at most so many equal bins."""
    bins = len(counts)
    edges = [at * bins // columns for at in range(columns)] if columns < bins else list(range(bins))
    sums = counts.cumsum(0)
    ends = [*edges[1:], bins]
    totals = [
        int(sums[end - 1]) - (int(sums[start - 1]) if start else 0)
        for start, end in zip(edges, ends, strict=True)
    ]
    return counts.new_tensor(totals)


def _bars(counts: Tensor, most: float, rows: int) -> list[str]:
    """A chart of columns, the top row first; a count of one has a visible height."""
    full = 8 * rows
    heights = [
        0 if not count else max(1, round(full * math.log1p(count) / math.log1p(most)))
        for count in counts.tolist()
    ]
    return [
        "".join(_BLOCKS[min(8, max(0, height - 8 * row))] for height in heights)
        for row in reversed(range(rows))
    ]


def _table(schemes: Sequence[tuple[Applied, Code]]) -> list[list[str]]:
    rows = [["scheme", "scales", "S", "Z", "clipped", "codes", "bits", "error", "max", "SQNR dB"]]
    for one, _ in schemes:
        rows.append(
            [
                one.quantizer.name,
                f"{one.ranges:,}",
                _span(*one.scales, ".3g"),
                NONE if one.zero_points is None else _span(*one.zero_points, "d"),
                f"{one.clipped:,}",
                f"{one.codes_used}/{one.quantizer.codes}",
                f"{one.bits_per_weight:.2f}",
                f"{one.relative_error:.3%}",
                f"{one.max_error:.2e}",
                _db(one.sqnr_db),
            ]
        )
    return rows


def _notes(schemes: Sequence[tuple[Applied, Code]]) -> list[str]:
    methods = [one.quantizer for one, _ in schemes]
    return [folded(f"{one.name}: {one.note}") for one in methods if one.note]


def _weight(found: Explanation) -> list[str]:
    """The bits of one weight in float32 and in every scheme."""
    sign, exponent, fraction = float_bits(found.value)
    rows = [["", "bits", "value", "off by"]]
    rows.append(["float32", f"{sign} {exponent} {fraction}", f"{found.value:.7g}", ""])
    for one, code in found.schemes:
        off = f"{code.value - found.value:+.2g}"
        rows.append([one.quantizer.name, code_bits(code.code, one.quantizer.bits), weight_value(code), off])
    row, column = found.place
    title = (
        f"the weight in row {row}, column {column}: sign, exponent and fraction {float_terms(found.value)}"
    )
    return [folded(title), "", *aligned(rows, terminal_width(), left=(0, 1))]


def weight_value(code: Code) -> str:
    """S (q − Z) or S T[q] in figures."""
    shown = f"({code.code} - {code.zero_point})" if code.zero_point else f"{code.level:.6g}"
    return f"{shown} × {code.scale:.4g} = {code.value:.5g}"


def _span(low: float, high: float, form: str) -> str:
    one, other = format(low, form), format(high, form)
    return one if one == other else f"{one} … {other}"


def _db(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"
