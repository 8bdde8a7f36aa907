"""Traces received by a collector, and requests while it is unreachable."""

import asyncio
import gzip
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from server.__main__ import main
from server.http.connection.early_refusal import Refusal
from tests.conftest import wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """An OTLP collector in a thread; after ``close`` it has everything that was sent."""

    def __init__(self) -> None:
        bodies: list[tuple[str, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                packed = self.headers.get("content-encoding") == "gzip"
                bodies.append((self.path, gzip.decompress(body) if packed else body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._bodies = bodies
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def paths(self) -> set[str]:
        return {path for path, _ in self._bodies}

    def spans(self) -> list[Any]:
        return [
            span
            for _, body in self._bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def services(self) -> set[str]:
        return {
            attributes_of(resource.resource)["service.name"]
            for _, body in self._bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes_of(thing: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in thing.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


@pytest.fixture
def traced(make_app: Callable[..., FastAPI], collector: Collector) -> Callable[..., list[Any]]:
    """Sends requests to a ready app; returns the collector's spans after the app has stopped."""

    def ask(ask_it: Callable[[TestClient], object], path: str = "", **settings: Any) -> list[Any]:
        app = make_app(otlp_endpoint=collector.address + path, **settings)
        with TestClient(app, raise_server_exceptions=False) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            ask_it(client)
        return collector.spans()

    return ask


def test_a_request_is_one_span_with_its_figures(
    traced: Callable[..., list[Any]], collector: Collector
) -> None:
    before = time.time_ns()
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 5}, "precision": "bf16"}
    headers = {"X-Request-ID": "my-own-id"}
    (span,) = traced(lambda client: client.post("/generate", json=body, headers=headers))
    attributes = attributes_of(span)
    assert span.name == "generate"
    assert before < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    assert not span.parent_span_id
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == "fake"
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.usage.output_tokens"] == 5
    assert attributes["bitdial.precision"] == "bf16"
    assert attributes["bitdial.outcome"] == "success"
    assert attributes["bitdial.request_id"] == "my-own-id"
    parts = sum(attributes[f"bitdial.{part}_ms"] for part in ("queue", "prefill", "decode"))
    assert parts == pytest.approx((span.end_time_unix_nano - span.start_time_unix_nano) / 1e6, abs=0.01)
    assert collector.paths == {"/v1/traces"}
    assert collector.services() == {"bitdial"}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_the_caller_s_trace_continues(traced: Callable[..., list[Any]], path: str) -> None:
    body: dict[str, Any] = {"prompt": "abc"}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}

    def ask(client: TestClient) -> None:
        client.post(path, json=body, headers=headers)
        client.post(path, json=body)

    first, second = traced(ask)
    assert first.trace_id.hex() == TRACE
    assert first.parent_span_id.hex() == PARENT
    assert second.trace_id.hex() != TRACE  # no state of one request remains for the next
    assert not second.parent_span_id


@pytest.mark.parametrize("parent", ["nonsense", f"00-{'0' * 32}-{PARENT}-01", "é" * 4000, ""])
def test_a_broken_traceparent_is_no_parent(traced: Callable[..., list[Any]], parent: str) -> None:
    headers = {"traceparent": parent.encode("latin-1")}
    (span,) = traced(lambda client: client.post("/generate", json={"inputs": "abc"}, headers=headers))
    assert not span.parent_span_id


def test_a_caller_s_sampling_decision_is_respected(traced: Callable[..., list[Any]]) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    assert traced(lambda client: client.post("/generate", json={"inputs": "abc"}, headers=headers)) == []


def test_a_failed_request_is_marked(traced: Callable[..., list[Any]], loads: Any) -> None:
    def fail(slots: object) -> None:
        raise RuntimeError("no")

    def ask(client: TestClient) -> None:
        loads.runners["fp32"].on_decode = fail
        assert client.post("/generate", json={"inputs": "secret words"}).status_code == 424

    (span,) = traced(ask)
    assert attributes_of(span)["error.type"] == "generation"
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert b"secret" not in span.SerializeToString()


def test_a_refusal_is_a_span_too(traced: Callable[..., list[Any]]) -> None:
    def ask(client: TestClient) -> None:
        with client.app.state.service.places.reserved():  # type: ignore[attr-defined]
            assert client.post("/generate", json={"inputs": "secret words"}).status_code == 429

    (span,) = traced(ask, max_concurrent_requests=1)
    assert attributes_of(span)["error.type"] == "overloaded"
    assert attributes_of(span)["bitdial.precision"] == "unread"


def test_a_refusal_below_the_framework_is_a_span_of_its_trace(traced: Callable[..., list[Any]]) -> None:
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\nx-request-id: mine\r\n"
    )

    def ask(client: TestClient) -> None:
        async def judge() -> object:
            app = client.app
            return app.state.early_refusal.judge(head.encode() + b"\r\n")  # type: ignore

        with client.app.state.service.places.reserved():  # type: ignore[attr-defined]
            assert isinstance(asyncio.run(judge()), Refusal)

    (span,) = traced(ask, max_concurrent_requests=1)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes_of(span)["error.type"] == "overloaded"
    assert attributes_of(span)["bitdial.request_id"] == "mine"


def test_a_full_endpoint_path_is_used_unchanged(
    traced: Callable[..., list[Any]], collector: Collector
) -> None:
    traced(lambda client: client.post("/generate", json={"inputs": "abc"}), path="/elsewhere/traces")
    assert collector.paths == {"/elsewhere/traces"}


@pytest.mark.parametrize("listening", [False, True])
def test_an_unreachable_or_silent_collector_affects_no_request(
    make_app: Callable[..., FastAPI], listening: bool
) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listening:
            mute.listen()  # and never accepts
        app = make_app(otlp_endpoint=f"http://127.0.0.1:{mute.getsockname()[1]}")
        with TestClient(app) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            for _ in range(20):
                assert client.post("/generate", json={"inputs": "abc"}).status_code == 200


def test_the_start_fails_without_the_otlp_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "server.observability.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert main(["serve", "--otlp-endpoint", "http://127.0.0.1:4318"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "OTLP_ENDPOINT" in line
    assert "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http" in line
