"""What the tests of the deployment read: its folder, the dashboard and the alerts."""

import json
import runpy
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "docs" / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SCRAPING: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "bitdial.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
PLOT = runpy.run_path(str(ROOT / "scripts" / "dashboard_plot.py"))
VARIABLES = {"model": "bundled", "instance": ".*", "precision": ".*", "__rate_interval": "10s"}


def dashboard_queries() -> list[Any]:
    return [query for panel in PLOT["panels"](DASHBOARD) for query in PLOT["queries"](panel, VARIABLES)]
