"""Spans: one for every generation, inside its request's, with its queue, prefill and decode inside it."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from server.observability.ended import Ended, Observer, SpanIds
from server.observability.otlp import conventions
from server.observability.otlp.destination import CLOSE_SECONDS, EXPORT_SECONDS, Failures
from server.observability.otlp.trace_context import note_span, request_attributes, span_ids
from server.version import VERSION

_EXPORTERS = "opentelemetry.exporter"


class Tracing:
    """Wraps the metrics: every observed generation also becomes a span.

    Args:
        metrics: receives every observation, with the span's ids if it is exported.
        url: of the collector.
        model: the served model's name.
        resource: this process.
    """

    def __init__(self, metrics: Observer, url: str, model: str, resource: Resource) -> None:
        self._metrics, self._model = metrics, model
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        logging.getLogger(_EXPORTERS).setLevel(logging.CRITICAL)  # ``Failures`` logs instead
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = _Watched(OTLPSpanExporter(url, timeout=EXPORT_SECONDS), Failures("traces", url))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("bitdial", VERSION)

    def observe_request(self, ended: Ended, span: SpanIds | None = None) -> None:
        self._metrics.observe_request(ended, self._trace(ended))

    def _trace(self, ended: Ended) -> SpanIds | None:
        """The ids of the generation's span; None if it is not sampled."""
        now, line = time.perf_counter(), ended.timeline
        began = line.arrived if ended.params is not None else now
        end = line.last_token if ended.outcome == "success" and line.last_token is not None else now
        offset = time.time_ns() - _nanoseconds(now)
        span = self.tracer.start_span(
            conventions.span_name(ended, self._model),
            # of a request without a span of its own, this is the server's
            kind=SpanKind.INTERNAL if trace.get_current_span().is_recording() else SpanKind.SERVER,
            attributes={**conventions.identity(ended, self._model), **request_attributes()},
            start_time=offset + _nanoseconds(began),
        )
        ids = None
        if span.is_recording():
            ids = span_ids(span)
            note_span(ids)
            self._fill(span, ended, end, offset)
        span.end(offset + _nanoseconds(end))
        return ids

    def _fill(self, span: Span, ended: Ended, end: float, offset: int) -> None:
        span.set_attributes(conventions.details(ended, self._model))
        if ended.failed:
            span.set_status(Status(StatusCode.ERROR))
        context = trace.set_span_in_context(span)
        for name, began, ended_at, attributes in conventions.phases(ended, end):
            part = self.tracer.start_span(
                name, context, attributes=attributes, start_time=offset + _nanoseconds(began)
            )
            part.end(offset + _nanoseconds(ended_at))

    async def close(self) -> None:
        """Exports the remaining spans, within ``CLOSE_SECONDS``."""
        closing = threading.Thread(target=self._provider.shutdown, name="close-tracing", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_SECONDS)


class _Watched(SpanExporter):
    """Exports with another exporter, and logs when exports begin to fail and when they succeed again."""

    def __init__(self, exporter: SpanExporter, failures: Failures) -> None:
        self._exporter, self._failures = exporter, failures

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        self._failures.note(result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
