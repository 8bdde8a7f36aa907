"""The dashboard has the form that Grafana's own models define, and its panels don't overlap."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.deploy.files import DASHBOARD, DEPLOY, PLOT


def unknown(board: dict[str, Any]) -> list[str]:
    """Paths of what Grafana's models don't know: parsed and written again, it is missing or another."""
    register_default_plugins()
    return list(_lost(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board))), ""))


def _lost(given: Any, kept: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from _lost(value, kept.get(name), f"{path}/{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for place, pair in enumerate(zip(given, kept, strict=True)):
            yield from _lost(*pair, f"{path}/{place}")
    elif given != kept:
        yield path


def test_grafana_knows_everything_in_the_dashboard() -> None:
    assert unknown(DASHBOARD) == []


@pytest.mark.parametrize(
    ("inside", "name", "path"),
    [
        (lambda board: board, "refesh", "/refesh"),
        (lambda board: board["panels"][0]["options"], "colourMode", "/panels/0/options/colourMode"),
        (lambda board: board["panels"][0]["targets"][0], "legend", "/panels/0/targets/0/legend"),
    ],
)
def test_a_misspelled_field_would_be_found(inside: Any, name: str, path: str) -> None:
    board = copy.deepcopy(DASHBOARD)
    inside(board)[name] = "value"
    assert unknown(board) == [path]


def test_the_dashboards_panels_have_places_and_identities_of_their_own() -> None:
    drawn = DASHBOARD["panels"]
    assert len({panel["id"] for panel in drawn}) == len(drawn)
    taken: set[tuple[int, int]] = set()
    for panel in drawn:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_uses_its_variables_and_no_others() -> None:
    named = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = (DEPLOY / "grafana/dashboards/bitdial.json").read_text()
    assert set(re.findall(r"\$(\w+)", text)) - {"__all"} == named | {"__rate_interval"}
    for panel in PLOT["panels"](DASHBOARD):
        assert panel["description"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert sources == [{"type": "prometheus", "uid": "$datasource"}] * len(sources)
