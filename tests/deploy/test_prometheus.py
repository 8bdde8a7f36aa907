"""The dashboard and the alerts on a real Prometheus that scrapes a real server with traffic."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from tests.conftest import serving, wait_until
from tests.deploy.files import DEPLOY, PLOT, RULES, dashboard_queries
from tests.deploy.processes import LABELS, bitdial, free_port, prometheus, result, values

pytestmark = pytest.mark.prometheus
KEY = "secret"
PROMPT = "Return a list of the names of the files in the given directory, sorted by their size. " * 3
BODIES = [
    {"inputs": PROMPT, "precision": name, "parameters": {"max_new_tokens": 12}}
    for name in ("fp32", "dynamic-int8")
]
ONLY_IN_TROUBLE = {"Alerts"}
"""Panels that are empty while all is well."""


class Watched:
    """A server, and a Prometheus that scrapes it."""

    def __init__(self, server: str, address: str) -> None:
        self.address = address
        self._client = httpx.Client(base_url=server, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        self.rounds = 0

    def send(self) -> None:
        """A request in each precision, and one that is refused."""
        self.rounds += 1
        for body in BODIES:
            self._client.post("/generate", json=body).raise_for_status()
        assert self._client.post("/generate", json={"inputs": ""}).status_code == 422


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    port = free_port()
    options = ("--precisions", "fp32,dynamic-int8", "--shadow-precision", "fp32", "--shadow-fraction", "1")
    with (
        # first: it takes some seconds until it scrapes
        prometheus(tmp_path_factory.mktemp("prometheus"), {"bitdial": (port, KEY)}) as address,
        bitdial(port, *options, API_KEY=KEY),
    ):
        wait_until(lambda: values(address, "up") == [1], seconds=30)
        yield Watched(f"http://127.0.0.1:{port}", address)


def test_every_query_of_the_dashboard_has_data_once_there_is_traffic(watched: Watched) -> None:
    waiting = [query for query in dashboard_queries() if query.panel not in ONLY_IN_TROUBLE]
    assert len(waiting) >= 30

    end = time.monotonic() + 60
    while waiting and time.monotonic() < end:
        watched.send()
        time.sleep(0.4)  # the server replays requests while it is idle
        waiting = [query for query in waiting if not values(watched.address, query.expression)]
    assert not waiting
    for query in dashboard_queries():
        for series in result(watched.address, query.expression):
            assert PLOT["label"](query.legend, series["metric"])


def test_the_figures_are_those_of_the_requests_that_were_sent(watched: Watched) -> None:
    watched.send()
    watched.send()
    succeeded = 'sum by (precision) (bitdial_requests_total{outcome="success"})'
    sent = dict.fromkeys(("fp32", "dynamic-int8"), watched.rounds)
    wait_until(lambda: by_precision(watched.address, succeeded) == sent, seconds=30)
    hits, looked_for = (
        sum(values(watched.address, f"bitdial_prefix_cache_{name}_total")) for name in ("hits", "queries")
    )
    assert 0 < hits < looked_for  # the same prompt again and again


def by_precision(address: str, query: str) -> dict[str, float]:
    return {series["metric"]["precision"]: float(series["value"][1]) for series in result(address, query)}


def test_prometheus_evaluates_every_alert_and_none_fires(watched: Watched) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in PLOT["ask"](watched.address, "rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] == "ok" for rule in rules()), seconds=30)
    assert [rule["name"] for rule in rules()] == [rule["alert"] for rule in RULES]
    watched.send()
    for rule in RULES:
        assert not result(watched.address, rule["expr"]), rule["alert"]


COMPARING = {rule["alert"]: rule["expr"] for rule in RULES if not rule["expr"].startswith("absent")}


@pytest.mark.parametrize("expression", COMPARING.values(), ids=list(COMPARING))
def test_the_figure_that_an_alert_compares_exists(expression: str, watched: Watched) -> None:
    compared, threshold = re.split(r"\s+(?:==|>)\s+(?=[\d.]+\s*$)", expression)
    # of the series of failures, which exist once there was one, a success takes the place
    compared = re.sub(r"outcome=~?\"[^\"]+\"", 'outcome="success"', compared)
    compared = re.sub(r"\[\d+[mh]\]", "[10s]", compared)

    def has_value() -> bool:
        watched.send()
        return bool(values(watched.address, compared))

    wait_until(has_value, seconds=30)
    assert float(threshold) >= 0


def test_the_autoscalers_figures_exist_for_each_pod(watched: Watched) -> None:
    rules = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (scaler,) = yaml.safe_load_all((DEPLOY / "kubernetes/components/autoscaling/hpa.yaml").read_text())
    wanted = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    found = set[str]()
    for rule in rules:
        names = {series["metric"]["__name__"] for series in result(watched.address, rule["seriesQuery"])}
        for name in names:
            query = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.GroupBy>>", "pod")
            query = query.replace("<<.LabelMatchers>>", f'namespace="{LABELS["namespace"]}"')
            (series,) = result(watched.address, query)
            assert series["metric"] == {"pod": LABELS["pod"]}
            assert float(series["value"][1]) >= 0
        found |= names
    assert found == wanted


def test_the_key_decides_whether_prometheus_sees_a_server(
    make_app: Callable[..., FastAPI], tmp_path: Path
) -> None:
    with serving(make_app()) as open_to_all, serving(make_app(api_key=KEY)) as closed:
        open_port, closed_port = (int(server.rsplit(":", 1)[1]) for server in (open_to_all, closed))
        jobs = {
            "without a key": (open_port, ""),
            "a key for nothing": (open_port, "any"),
            "the key": (closed_port, KEY),
            "bitdial": (closed_port, "wrong"),
        }
        with prometheus(tmp_path, jobs) as address:
            wait_until(lambda: len(result(address, "up")) == len(jobs), seconds=30)
            up = {series["metric"]["job"]: series["value"][1] for series in result(address, "up")}
            assert up == {"without a key": "1", "a key for nothing": "1", "the key": "1", "bitdial": "0"}
            wait_until(lambda: pending(address) == ["BitdialDown"], seconds=30)


def pending(address: str) -> list[str]:
    return [alert["labels"]["alertname"] for alert in PLOT["ask"](address, "alerts")["alerts"]]
