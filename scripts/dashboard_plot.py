#!/usr/bin/env python3
"""Draws the panels of the Grafana dashboard from a running Prometheus, without Grafana.

    .venv/bin/python scripts/dashboard_plot.py --prometheus http://127.0.0.1:9090 --minutes 10 --out board.png

The queries are those of ``docs/deploy/grafana/dashboards/bitdial.json``; the picture is matplotlib's.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHBOARD = Path(__file__).resolve().parent.parent / "docs/deploy/grafana/dashboards/bitdial.json"
_SCALES = {"percentunit": (100, "%"), "bytes": (1e-6, "MB"), "s": (1000, "ms"), "reqps": (1, "requests / s")}
"""By Grafana's name of a unit: the factor and the unit that is drawn."""
_WIDTH = 24  # columns of Grafana's grid
Panel = dict[str, Any]


@dataclass(frozen=True)
class Query:
    panel: str
    expression: str
    legend: str


def panels(dashboard: Mapping[str, Any]) -> list[Panel]:
    """The panels that have queries, without the rows above them."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(panel: Panel, variables: Mapping[str, str]) -> list[Query]:
    """A panel's queries, the dashboard's variables replaced.

    Raises:
        KeyError: a variable without a value.
    """
    return [
        Query(panel["title"], expand(target["expr"], variables), target["legendFormat"])
        for target in panel["targets"]
    ]


def expand(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: variables[match[1]], text)


def label(legend: str, labels: Mapping[str, str]) -> str:
    """The legend of a series: ``{{name}}`` is replaced by its label."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend).strip()


def ask(prometheus: str, path: str, **parameters: object) -> Any:
    """The data of an answer of Prometheus' API; ``HTTPError`` if it refuses the query."""
    with urlopen(f"{prometheus}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
        return json.load(answer)["data"]


class Drawing:
    """Panels on the dashboard's grid.

    Args:
        prometheus: the address of its server.
        variables: values of the dashboard's variables.
        minutes: the range that is drawn, until now.
    """

    def __init__(self, prometheus: str, variables: Mapping[str, str], minutes: float) -> None:
        self._prometheus, self._variables = prometheus, variables
        self._end = time.time()
        self._start = self._end - 60 * minutes
        self._step = max(1.0, 60 * minutes / 240)  # seconds

    def save(self, dashboard: Mapping[str, Any], file: Path) -> None:
        from matplotlib.figure import Figure  # late: an optional dependency

        drawn = panels(dashboard)
        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in drawn)
        figure = Figure(figsize=(18, 0.33 * rows), dpi=72, layout="constrained")
        grid = figure.add_gridspec(rows, _WIDTH)
        for panel in drawn:
            place = panel["gridPos"]
            cell = grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]]
            self._draw(figure.add_subplot(cell), panel)
        figure.suptitle(f"{dashboard['title']}: the dashboard's queries, answered by Prometheus", fontsize=13)
        figure.savefig(file)

    def _draw(self, axes: "Axes", panel: Panel) -> None:
        fields = panel["fieldConfig"]["defaults"]
        found = [pair for query in queries(panel, self._variables) for pair in self._series(query)]
        factor, unit = _scale(fields["unit"], [value for _, points in found for _, value in points])
        axes.set_title(f"{panel['title']}{f' ({unit})' if unit else ''}", fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        if panel["type"] == "stat":
            axes.set_axis_off()
            last = found[0][1][-1][1] * factor if found else math.nan
            axes.text(0, 0.3, f"{last:,.4g}", fontsize=22, color="#1f60c4")
            return
        states = panel["type"] == "state-timeline"  # a line for each, as long as it lasts
        for place, (name, points) in enumerate(found):
            minutes = [(when - self._end) / 60 for when, _ in points]
            heights = [float(place) if states else value * factor for _, value in points]
            axes.plot(minutes, heights, label=name, linewidth=5 if states else 1.1)
        axes.set_xlim((self._start - self._end) / 60, 0)
        _decorate(axes, states, [factor * fields[end] if end in fields else None for end in ("min", "max")])

    def _series(self, query: Query) -> list[tuple[str, list[tuple[float, float]]]]:
        found = ask(
            self._prometheus, "query_range", query=query.expression, start=self._start, end=self._end,
            step=self._step,
        )  # fmt: skip
        return [
            (label(query.legend, one["metric"]), [(when, float(value)) for when, value in one["values"]])
            for one in found["result"]
        ]


def _scale(unit: str, values: Sequence[float]) -> tuple[float, str]:
    """The factor of the figures that are drawn, and their unit; seconds where milliseconds are too many."""
    if unit == "s" and max((value for value in values if not math.isnan(value)), default=0) >= 5:
        return 1, "s"
    return _SCALES.get(unit, (1, ""))


def _decorate(axes: "Axes", states: bool, limits: Sequence[float | None]) -> None:
    axes.grid(alpha=0.25)
    if states:
        axes.set_yticks([])
        axes.margins(y=0.6)
    else:
        axes.set_ylim(*limits)
    if not axes.lines:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", fontsize=8, color="gray")
        return
    legend = axes.legend(fontsize=6, ncols=3, loc="upper left", framealpha=0.5)
    legend.set_in_layout(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="the range, until now")
    parser.add_argument("--model", metavar="NAME", help="default: the only one that Prometheus knows")
    parser.add_argument("--rate-interval", default="1m", metavar="DURATION", help="what rates are taken over")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"), metavar="FILE")
    options = parser.parse_args()
    models = ask(options.prometheus, "label/model/values")
    if options.model is None and len(models) != 1:
        parser.error(f"choose a --model: {', '.join(models) or 'Prometheus knows none'}")
    variables = {
        "model": options.model or models[0],
        "instance": ".*",
        "precision": ".*",
        "__rate_interval": options.rate_interval,
    }
    drawing = Drawing(options.prometheus, variables, options.minutes)
    drawing.save(json.loads(DASHBOARD.read_text()), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
