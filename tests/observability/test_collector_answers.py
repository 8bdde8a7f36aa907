"""What the log says of a collector that takes nothing, or of something that is no collector."""

import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)
from starlette.testclient import TestClient

from server.observability.otlp import metrics_export, spans
from tests.conftest import PATIENCE, wait_until
from tests.observability.collector import Collector

BODY = {"inputs": "abc", "max_new_tokens": 2}
PROTOBUF = "application/x-protobuf"
PARTIAL = ExportTraceServiceResponse(
    partial_success=ExportTracePartialSuccess(rejected_spans=3, error_message="quota\x1b[2J")
).SerializeToString()
Send = Callable[[str], str]


@pytest.fixture
def send(
    make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Send:
    """Serves a request with a collector at an address; returns what was logged."""

    monkeypatch.setattr(spans, "CLOSE_SECONDS", PATIENCE)  # a busy host reads an endless answer for seconds
    monkeypatch.setattr(metrics_export, "CLOSE_SECONDS", PATIENCE)

    def sent(address: str) -> str:
        with caplog.at_level(logging.INFO), TestClient(make_app(otlp_endpoint=address)) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            assert client.post("/generate", json=BODY).status_code == 200
        return caplog.text

    return sent


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"status": 404}, "it answered 404 Not Found"),
        ({"status": 401}, "it answered 401 Unauthorized"),
        (
            {"status": 301, "location": "https://collector:4318/v1/traces?token=hidden"},
            "it redirects, 301, to https://collector:4318/v1/traces;",
        ),
        ({"status": 307, "location": "/elsewhere"}, "it redirects, 307, to /elsewhere;"),
        ({"answer": b"<html>hello</html>", "content_type": "text/html"}, "it answered with a web page"),
        ({"answer": b"\xff" * 20, "content_type": PROTOBUF}, "its answer is not OTLP's"),
        ({"answer": PARTIAL, "content_type": PROTOBUF}, "it rejected 3 of them: quota [2J"),
        ({"answer": b"x" * 2**18}, "its answer does not end"),
    ],
    ids=["404", "401", "301", "307", "page", "garbage", "partial", "endless"],
)
def test_an_answer_that_is_no_success_is_logged(answer: dict[str, Any], reason: str, send: Send) -> None:
    collector = Collector(**answer)
    logged = send(collector.address)
    collector.close()
    for what in ("traces", "metrics"):
        assert f"{what} can't be sent to {collector.address}/v1/{what}: {reason}" in logged
    assert "hidden" not in logged
    assert "Traceback" not in logged


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"", ""), (b"", PROTOBUF), (ExportTraceServiceResponse().SerializeToString(), PROTOBUF),
     (b'{"partialSuccess":{}}', "application/json")],
    ids=["nothing", "empty", "message", "json"],
)  # fmt: skip
def test_what_collectors_answer_is_a_success(body: bytes, kind: str, send: Send) -> None:
    collector = Collector(answer=body, content_type=kind)
    assert "can't be sent" not in send(collector.address)
    collector.close()
    assert collector.spans("text_completion")
    assert collector.metrics()


def test_a_collector_that_is_down_is_named_without_its_keys(send: Send) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    logged = send(f"http://me:hidden@{host}/v1/traces?token=hidden")
    assert f"traces can't be sent to http://{host}/v1/traces: Connection refused;" in logged
    assert "hidden" not in logged


def test_a_header_that_can_not_be_sent_is_named_without_its_value(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hid%0Aden")
    collector = Collector()
    logged = send(collector.address)
    collector.close()
    assert "a header of OTEL_EXPORTER_OTLP_HEADERS can't be sent" in logged
    assert "hid" not in logged.replace("hidden", "")
    assert "Traceback" not in logged
