"""Where telemetry goes, and that no request is affected by a collector that fails."""

import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.__main__ import main
from server.observability.otlp import metrics_export, spans
from server.observability.otlp.destination import Failures, metrics_url, resource
from tests.conftest import wait_until
from tests.observability.collector import Collector
from tests.observability.conftest import Observed

BODY = {"inputs": "abc", "max_new_tokens": 2}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", {"/v1/traces", "/v1/metrics"}),
        ("/", {"/v1/traces", "/v1/metrics"}),
        ("/v1/traces", {"/v1/traces", "/v1/metrics"}),
        ("/tenant/v1/traces", {"/tenant/v1/traces", "/tenant/v1/metrics"}),
        (
            "/elsewhere/traces",
            {"/elsewhere/traces"},
        ),  # used unchanged; says nothing of metrics
    ],
)
def test_traces_and_metrics_go_to_their_paths(observed: Observed, path: str, expected: set[str]) -> None:
    found = observed(lambda client: client.post("/generate", json=BODY), path=path)
    assert found.paths == expected


def test_opentelemetry_s_variables_name_or_turn_off_the_metrics() -> None:
    url = "http://collector:4318/v1/traces?x=1"
    assert metrics_url(url, {}) == "http://collector:4318/v1/metrics?x=1"
    own = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://other/m"}
    assert metrics_url(url, own) == metrics_url("http://collector/odd", own) == "http://other/m"
    assert metrics_url(url, {**own, "OTEL_METRICS_EXPORTER": "none"}) is None
    assert metrics_url(url, {"OTEL_SDK_DISABLED": "true"}) is None


def test_the_process_has_a_name_and_an_id_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = resource().attributes, resource().attributes
    assert first["service.name"] == "bitdial"
    assert first["service.instance.id"] != second["service.instance.id"]
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,deployment.environment.name=test")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
    named = resource().attributes
    assert (named["service.name"], named["deployment.environment.name"]) == ("named", "test")


@contextmanager
def unreachable(listening: bool) -> Iterator[str]:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listening:
            mute.listen()  # and never accepts
        yield f"http://127.0.0.1:{mute.getsockname()[1]}"


@contextmanager
def answering(status: int, seconds: float) -> Iterator[str]:
    collector = Collector(status, seconds)
    yield collector.address
    collector.close()


@pytest.mark.parametrize(
    "collector",
    [unreachable(False), unreachable(True), answering(500, 0), answering(503, 0), answering(200, 60)],
    ids=["down", "mute", "500", "503", "slow"],
)
def test_a_failing_collector_affects_no_request(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch, collector: Any
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    for module in (metrics_export, spans):
        monkeypatch.setattr(module, "EXPORT_SECONDS", 60.0)
        monkeypatch.setattr(module, "CLOSE_SECONDS", 0.5)
    with collector as address:
        with TestClient(make_app(otlp_endpoint=address)) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            slowest, end = 0.0, time.monotonic() + 0.5
            while time.monotonic() < end:
                began = time.monotonic()
                assert client.post("/generate", json=BODY).status_code == 200
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < 10  # an export waits for a minute
            began = time.monotonic()
        assert time.monotonic() - began < 10  # the last exports have half a second


def test_each_reason_of_failures_is_logged_once_until_they_are_over(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures("metrics", "http://me:hidden@collector:4318/v1/metrics?token=hidden")
    with caplog.at_level(logging.INFO):
        for reason in (None, "a", "a", "b", "a", None, None, "a"):
            failures.note(reason)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO", "WARNING"]
    first, _, over, _ = (record.getMessage() for record in caplog.records)
    assert first.startswith("metrics can't be sent to http://collector:4318/v1/metrics: a;")
    assert "4 failed exports" in over
    assert "hidden" not in caplog.text


def test_the_start_fails_without_the_otlp_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("server.observability.otlp")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert main(["serve", "--otlp-endpoint", "http://127.0.0.1:4318"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "OTLP_ENDPOINT" in line
    assert "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http" in line
