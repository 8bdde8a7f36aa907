"""The alerts are valid, fire on what they are about, and have a runbook."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.deploy.files import DASHBOARD, DEPLOY, PLOT, ROOT, RULES, VARIABLES

NAMES = [rule["alert"] for rule in RULES]


def promtool(*arguments: str) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("no promtool here: install Prometheus")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, cwd=DEPLOY, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.prometheus
def test_prometheus_accepts_the_rules() -> None:
    assert f"{len(RULES)} rules found" in promtool(
        "check", "rules", "--lint=all", "--lint-fatal", "alerts.yml"
    )


@pytest.mark.prometheus
def test_each_alert_fires_on_the_series_that_it_is_about() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_each_alert_is_shown_to_fire_and_not_to_fire() -> None:
    cases = [
        (case["alertname"], bool(case.get("exp_alerts")))
        for test in yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert sorted({name for name, fires in cases if fires}) == sorted(NAMES)
    quiet = {name for name, fires in cases if not fires}
    # of the others, a case in which one fires has series beside it on which it does not
    assert quiet >= {"BitdialDown", "BitdialAbsent", "BitdialFailing", "BitdialRefusing"}


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_says_what_is_wrong_and_where_its_runbook_is(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert notes["summary"]
    assert notes["description"] != notes["summary"]
    document, _, anchor = notes["runbook"].partition("#")
    titles = re.findall(r"^#+ (.*)", (ROOT / document).read_text(), re.M)
    assert anchor in [title.lower() for title in titles]


def test_the_runbooks_are_those_of_the_alerts() -> None:
    text = (DEPLOY.parent / "operations.md").read_text()
    assert re.findall(r"^### (Bitdial\w+)$", text, re.M) == NAMES


def test_alerts_and_dashboard_name_existing_metrics_and_outcomes() -> None:
    # which tests/docs/test_site.py compares with the server's
    table = (DEPLOY.parent / "operations.md").read_text()
    exposed = dict(re.findall(r"^\| `(bitdial_\w+)` \| (\w+) \|", table, re.M))
    assert exposed
    series = set(exposed) | {
        f"{name}_{end}"
        for name, kind in exposed.items()
        if kind == "histogram"
        for end in ("bucket", "sum", "count")
    }
    queries = [
        query.expression for panel in PLOT["panels"](DASHBOARD) for query in PLOT["queries"](panel, VARIABLES)
    ]
    for expression in [*queries, *(rule["expr"] for rule in RULES)]:
        assert set(re.findall(r"\bbitdial_\w+", expression)) <= series, expression
    outcomes = {
        name
        for expression in [*queries, *(rule["expr"] for rule in RULES)]
        for names in re.findall(r'outcome=~?"([^"]+)"', expression)
        for name in names.split("|")
    }
    assert outcomes <= set(re.findall(r"^\| `(\w+)` \| [\d, ]*\|", table, re.M))
