"""A report's plots by matplotlib, each as SVG and PNG."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.report.rows import Row, front, quality_means_something, rows_of

INSTALL = "pip install matplotlib"
MISSING = f"the plots need matplotlib: {INSTALL}"
TITLES = {
    "quality-memory": "Quality against memory",
    "quality-speed": "Quality against speed",
    "speed-memory": "Speed against memory",
    "layers": "Error of every layer",
    "latency": "Time between tokens, one row",
}
_COLOURS = ("#1b5e9b", "#d1603d", "#2f8f5b", "#8757a8", "#c29a1c", "#3aa6a6", "#b0467a", "#6b6b6b")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bitdial",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


class PlotsUnavailable(Exception):
    """matplotlib isn't installed; the message has the install command."""


def to_draw(requested: bool | None) -> bool:
    """Whether plots are drawn; for None, whether matplotlib is installed.

    Raises:
        PlotsUnavailable: ``requested`` is true, and matplotlib isn't installed.
    """
    if requested:
        require()
    return find_spec("matplotlib") is not None if requested is None else requested


def require() -> None:
    """Raises: PlotsUnavailable."""
    if find_spec("matplotlib") is None:
        raise PlotsUnavailable(MISSING)


def draw(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Draws the plots that the document has figures for; returns their names, without extensions.

    Raises:
        PlotsUnavailable
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure

    rows = rows_of(document)
    quality = quality_means_something(document)
    wanted: dict[str, Callable[[Any], bool]] = {
        "quality-memory": lambda figure: quality and _scatter(figure, rows, _memory, _distance),
        "quality-speed": lambda figure: quality and _scatter(figure, rows, _speed, _distance),
        "speed-memory": lambda figure: not quality and _scatter(figure, rows, _memory, _speed),
        "layers": lambda figure: _layers(figure, document, rows),
        "latency": lambda figure: _latency(figure, document, rows),
    }
    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, plot in wanted.items():
            figure = Figure(figsize=(7.2, 4.4), layout="constrained")
            if plot(figure):
                figure.axes[0].set_title(TITLES[name])
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
                figure.savefig(folder / f"{name}.png", dpi=144, metadata={"Software": None})
                drawn.append(name)
    return drawn


def drawn(folder: Path) -> list[str]:
    """The names of the plots in the folder."""
    return [name for name in TITLES if (folder / f"{name}.svg").exists()]


Axis = tuple[str, Callable[[Row], float | None], bool]
"""A label, a row's value, and whether the scale is logarithmic."""
_memory: Axis = ("weights in memory, MB", lambda row: row.weights_bytes / 1e6, False)
_speed: Axis = ("speed of one row, × fp32's", lambda row: row.speed_ratio, False)
_distance: Axis = ("mean KL divergence from fp32, nats", lambda row: row.mean_kl, True)


def _scatter(figure: Any, rows: Sequence[Row], x: Axis, y: Axis) -> bool:
    best = front(rows)
    points = [(row, x[1](row), y[1](row)) for row in rows]
    known = [(row, a, b) for row, a, b in points if a is not None and b is not None]
    if not known:
        return False
    axes = figure.subplots()
    least = min((b for _, _, b in known if b > 0), default=1.0)
    floor = least / 3  # the place of a zero divergence on the logarithmic scale
    for row, a, b in known:
        filled = row.precision in best
        colour = _colour(rows, row.precision)
        shown = max(b, floor) if y[2] else b
        axes.scatter(
            [a], [shown], s=64, color=colour if filled else "white", edgecolor=colour, linewidth=2, zorder=3
        )
        for across, value in ((True, x), (False, y)):
            _draw_interval(axes, row, value, (a, shown), colour, across)
        axes.annotate(row.precision, (a, shown), xytext=(8, 5), textcoords="offset points")
    if y[2]:
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor / 1.6)
        if any(b <= 0 for _, _, b in known):
            axes.axhline(floor, color="#999999", linewidth=0.8, linestyle=":")
            axes.annotate("0 (fp32)", (0, floor), xycoords=("axes fraction", "data"), va="bottom",
                          xytext=(4, 2), textcoords="offset points", color="#777777", fontsize=8)  # fmt: skip
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.margins(x=0.16)
    axes.autoscale_view()
    axes.set_xlim(left=0)
    axes.set_xlabel(x[0])
    axes.set_ylabel(y[0])
    axes.grid(alpha=0.25)
    figure.text(
        0.995, 0.005, "filled: on the Pareto front", ha="right", va="bottom", fontsize=8, color="#777777"
    )
    return True


def _draw_interval(
    axes: Any, row: Row, axis: Axis, at: tuple[float, float], colour: str, across: bool
) -> None:
    """Draws the confidence interval of a speed as a line through its point; exact values have none."""
    interval = row.ratio_interval()
    if axis is not _speed or math.isinf(interval.high) or interval.factor <= 1:
        return
    ends = (interval.low, interval.high)
    line = (ends, (at[1], at[1])) if across else ((at[0], at[0]), ends)
    axes.plot(*line, color=colour, linewidth=1, zorder=2)


def _layers(figure: Any, document: Mapping[str, Any], rows: Sequence[Row]) -> bool:
    """Relative errors: a row for each precision, a column for each layer; white: no error."""
    proofs = {row.precision: document["precisions"][row.precision]["loading"]["proof"] for row in rows}
    proofs = {name: proof for name, proof in proofs.items() if proof and name != "fp32"}
    names = list(dict.fromkeys(one["name"] for proof in proofs.values() for one in proof["layers"]))
    errors = [[_error(proof, layer) for layer in names] for proof in proofs.values()]
    known = [one for line in errors for one in line if one]
    if not known:
        return False
    from matplotlib.colors import LogNorm

    figure.set_size_inches(max(11.0, min(18.0, 2.4 + 0.24 * len(names))), 1.9 + 0.3 * len(proofs))
    axes = figure.subplots()
    axes.set_facecolor("white")
    grid = [[one if one else math.nan for one in line] for line in errors]
    low, high = min(known), max(known)
    norm = LogNorm(low / 1.1, high * 1.1)
    image = axes.imshow(grid, aspect="auto", cmap="viridis_r", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(proofs)), list(proofs))
    step = max(1, math.ceil(len(names) / 50))
    ticks = range(0, len(names), step)
    axes.set_xticks(ticks, [_short(names[at]) for at in ticks], rotation=90, fontsize=7)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="‖W′ − W‖ / ‖W‖", pad=0.01)
    return True


def _error(proof: Mapping[str, Any], layer: str) -> float | None:
    return next((one["relative_error"] for one in proof["layers"] if one["name"] == layer), None)


def _short(name: str) -> str:
    """``transformer.h.0.attn.c_attn`` → ``0.attn.c_attn``."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :] if numbers else parts[-1:])


def _latency(figure: Any, document: Mapping[str, Any], rows: Sequence[Row]) -> bool:
    """Cumulative distribution of the time between tokens."""
    axes = None
    for row in rows:
        times = document["precisions"][row.precision]["speed"]["batches"]["1"]["inter_token_ms"]
        if not times:
            continue
        axes = axes or figure.subplots()
        axes.plot(
            times, range(len(times)), label=row.precision, color=_colour(rows, row.precision), linewidth=1.8
        )
    if axes is None:
        return False
    axes.set_xscale("log")
    _plain_numbers(axes)
    axes.set(
        xlabel="ms from one token to the next", ylabel="% of the tokens that took no longer", ylim=(0, 101)
    )
    # tokens read in one go have gaps of almost zero: an artifact of reading, not of the model
    middles = [line.get_xdata()[len(line.get_xdata()) // 2] for line in axes.get_lines()]
    axes.set_xlim(left=0.3 * min(middles))
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=9)
    return True


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _colour(rows: Sequence[Row], precision: str) -> str:
    names = [row.precision for row in rows]
    return _COLOURS[names.index(precision) % len(_COLOURS)]
