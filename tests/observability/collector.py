"""An OTLP collector in a thread: decodes what it receives; it can be slow, and answer with an error."""

import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """After ``close`` it has everything that was sent.

    Args:
        status: of every answer.
        seconds: before every answer.
        answer: its body.
        headers: of every answer.
    """

    def __init__(self, status: int = 200, seconds: float = 0.0, answer: bytes = b"", **headers: str) -> None:
        bodies: list[tuple[str, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                packed = self.headers.get("content-encoding") == "gzip"
                assert self.headers["content-type"] == "application/x-protobuf"
                bodies.append((self.path, gzip.decompress(body) if packed else body))
                time.sleep(seconds)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._bodies = bodies
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def paths(self) -> set[str]:
        return {path for path, _ in self._bodies}

    def traces(self) -> list[Any]:
        """The spans' resources, each with its spans."""
        return [
            resource
            for path, body in self._bodies
            if not path.endswith("/metrics")
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        ]

    def spans(self, name: str = "") -> list[Any]:
        """The spans whose names begin with ``name``."""
        return [
            span
            for resource in self.traces()
            for scope in resource.scope_spans
            for span in scope.spans
            if span.name.startswith(name)
        ]

    def last_metrics(self) -> Any:
        """The resource of the last export of metrics, with its metrics."""
        *_, last = (body for path, body in self._bodies if path.endswith("/metrics"))
        (resource,) = ExportMetricsServiceRequest.FromString(last).resource_metrics
        return resource

    def metrics(self) -> dict[str, Any]:
        """The last export's metrics by their names."""
        (scope,) = self.last_metrics().scope_metrics
        return {metric.name: metric for metric in scope.metrics}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes_of(thing: Any) -> dict[str, Any]:
    """A span's, a point's or a resource's attributes; a list as a list."""
    return {pair.key: _value(pair.value) for pair in thing.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)
