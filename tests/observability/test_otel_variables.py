"""OpenTelemetry's own variables: they count, or the log says that they don't."""

import logging

import pytest
from starlette.testclient import TestClient

from server.__main__ import main
from server.observability.otlp.environment import Batching, batching, log_ignored, metrics_interval
from tests.observability.conftest import Observed

BODY = {"inputs": "abc", "max_new_tokens": 2}
COLLECTOR, TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


def remarks(caplog: pytest.LogCaptureFixture, collector: bool, **environment: str) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        log_ignored(environment, collector)
    return caplog.text


@pytest.mark.parametrize("name", [COLLECTOR, TRACES])
def test_an_address_in_another_variable_sends_nothing_and_is_reported(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert f"{name} is set, but nothing is sent" in remarks(caplog, False, **{name: "http://collector:4318"})
    assert f"{name} is ignored" in remarks(caplog, True, **{name: "http://collector:4318"})
    disabled = {name: "http://collector:4318", "OTEL_SDK_DISABLED": "true"}
    assert not remarks(caplog, False, **disabled)


@pytest.mark.parametrize(
    ("name", "ignored", "counted"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json", ""),
        ("OTEL_TRACES_EXPORTER", "console", "otlp"),
        ("OTEL_METRICS_EXPORTER", "prometheus", "none"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta", "cumulative"),
        ("OTEL_PROPAGATORS", "b3", "tracecontext,baggage"),
        ("OTEL_PROPAGATORS", "none", "tracecontext"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10000", ""),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "10000", ""),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "gzip"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Bearer hidden", "authorization=Bearer hidden,"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.05", ""),
    ],
)
def test_what_changes_nothing_is_reported(
    name: str, ignored: str, counted: str, caplog: pytest.LogCaptureFixture
) -> None:
    remark = remarks(caplog, True, **{name: ignored})
    assert f"{name} is ignored" in remark
    assert "hidden" not in remark
    assert not remarks(caplog, True, **{name: counted})
    assert not remarks(caplog, False, **{name: ignored})  # of no interest where nothing is sent


def test_a_ratio_counts_with_its_sampler(caplog: pytest.LogCaptureFixture) -> None:
    both = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.05"}
    assert not remarks(caplog, True, **both)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Batching(2048, 128, 5000)),
        ({"MAX_QUEUE_SIZE": "64"}, Batching(64, 64, 5000)),
        ({"MAX_EXPORT_BATCH_SIZE": "512", "SCHEDULE_DELAY": "50"}, Batching(2048, 512, 50)),
        ({"MAX_QUEUE_SIZE": "0", "MAX_EXPORT_BATCH_SIZE": "-3"}, Batching(2048, 128, 5000)),
        ({"SCHEDULE_DELAY": "1.5"}, Batching(2048, 128, 5000)),
        ({"MAX_QUEUE_SIZE": "many"}, Batching(2048, 128, 5000)),
    ],
)  # fmt: skip
def test_batches_of_spans(environment: dict[str, str], expected: Batching) -> None:
    assert batching({f"OTEL_BSP_{name}": value for name, value in environment.items()}) == expected


@pytest.mark.parametrize("text", ["soon", "-5", "0", "nan", "1e3"])
def test_a_number_that_is_none_is_reported_and_the_default_holds(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert metrics_interval({"OTEL_METRIC_EXPORT_INTERVAL": text}) == 60
    assert "OTEL_METRIC_EXPORT_INTERVAL is ignored" in caplog.text
    assert text not in caplog.text.replace("60000", "")
    assert metrics_interval({"OTEL_METRIC_EXPORT_INTERVAL": "1"}) == 0.1


def test_the_smallest_queue_sends_spans(observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
    assert observed(lambda client: client.post("/generate", json=BODY)).spans()


@pytest.mark.parametrize(
    ("name", "paths"),
    [("OTEL_TRACES_EXPORTER", {"/v1/metrics"}), ("OTEL_METRICS_EXPORTER", {"/v1/traces"})],
)
def test_none_turns_a_signal_off(
    observed: Observed, name: str, paths: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(client: TestClient) -> None:
        assert client.post("/generate", json=BODY).status_code == 200

    monkeypatch.setenv(name, "none")
    assert observed(ask).paths == paths


def test_a_sampler_that_does_not_exist_is_reported(
    observed: Observed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")
    for name in ("opentelemetry", "opentelemetry.exporter"):  # as a new process has them
        logging.getLogger(name).setLevel(logging.NOTSET)
    observed(lambda client: client.post("/generate", json=BODY))
    assert "recognize sampler sometimes" in caplog.text


def test_headers_without_a_name_are_not_logged(
    observed: Observed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Bearer hidden")
    assert observed(lambda client: client.post("/generate", json=BODY)).spans()
    assert "OTEL_EXPORTER_OTLP_HEADERS is ignored where an entry has no '='" in caplog.text
    assert "hidden" not in caplog.text


def test_a_limit_that_is_no_number_ends_the_start_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SPAN_LINK_COUNT_LIMIT", "few")
    assert main(["serve", "--otlp-endpoint", "http://127.0.0.1:4318"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "OTEL_SPAN_LINK_COUNT_LIMIT must be a non-negative integer" in line
