"""Traces: one span for every generation, sent to an OpenTelemetry collector by OTLP over HTTP.

The only importer of ``opentelemetry``, an extra; imported only if a collector is configured. Spans are queued
up to a bound and exported by a separate thread, so that a slow or unreachable collector loses spans and never
delays a request. OpenTelemetry's own variables (``OTEL_RESOURCE_ATTRIBUTES``,
``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_TRACES_SAMPLER`` …) are respected.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.sequence import Timeline
from server.http.responses import request_id
from server.observability.observer import Observer
from server.version import VERSION

_EXPORT_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
_HEADERS = (b"traceparent", b"tracestate")
_REQUEST_ID = "bitdial.request_id"
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Wraps the metrics: every observed request also becomes a span.

    Args:
        metrics: receives every observation first.
        endpoint: URL of the collector.
        model: the served model's name.
    """

    def __init__(self, metrics: Observer, endpoint: str, model: str) -> None:
        self._metrics, self._model = metrics, model
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # logs a lost batch, not every attempt
        service = os.environ.get("OTEL_SERVICE_NAME", "bitdial")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service, "service.version": VERSION}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_SECONDS))
        )
        self._tracer = self._provider.get_tracer("bitdial", VERSION)

    def observe_request(self, precision: str, outcome: str, timeline: Timeline, prompt_tokens: int) -> None:
        self._metrics.observe_request(precision, outcome, timeline, prompt_tokens)
        attributes = self._attributes(precision, outcome, timeline, prompt_tokens)
        began = time.time_ns() - _nanoseconds(time.perf_counter() - timeline.arrived)
        span = self._tracer.start_span(
            "generate", kind=SpanKind.SERVER, attributes=attributes, start_time=began
        )
        if outcome not in ("success", "cancelled"):
            span.set_attribute("error.type", outcome)
            span.set_status(Status(StatusCode.ERROR))
        span.end(began + _nanoseconds(timeline.total_seconds))

    def _attributes(
        self, precision: str, outcome: str, timeline: Timeline, prompt_tokens: int
    ) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "bitdial",
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.usage.output_tokens": timeline.tokens,
            "bitdial.precision": precision,
            "bitdial.outcome": outcome,
            "bitdial.queue_ms": round(timeline.queue_seconds * 1000, 3),
            "bitdial.prefill_ms": round(timeline.prefill_seconds * 1000, 3),
            "bitdial.decode_ms": round(timeline.decode_seconds * 1000, 3),
        }
        id_ = context.get_value(_REQUEST_ID)
        return attributes | ({_REQUEST_ID: id_} if isinstance(id_, str) else {})

    async def close(self) -> None:
        """Exports the remaining spans, within ``_CLOSE_SECONDS``."""
        closing = threading.Thread(target=self._provider.shutdown, name="close-tracing", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSE_SECONDS)


class TraceContext:
    """Middleware that makes a request's spans part of the trace named by its ``traceparent`` (W3C)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with trace_context(scope):
            await self.app(scope, receive, send)


@contextmanager
def trace_context(scope: Scope) -> Iterator[None]:
    """Makes spans started inside children of the trace that the request names."""
    carrier = {n.decode(): v.decode("latin-1") for n, v in scope["headers"] if n in _HEADERS}
    parent = _PROPAGATOR.extract(carrier, context.Context())
    token = context.attach(context.set_value(_REQUEST_ID, request_id(scope), parent))
    try:
        yield
    finally:
        context.detach(token)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
