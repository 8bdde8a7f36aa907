"""Spans: one for every generation, inside its request's, with its queue, prefill and decode inside it."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from server.observability.ended import Ended, Observer, SpanIds
from server.observability.otlp import conventions
from server.observability.otlp.destination import CLOSE_SECONDS, EXPORT_SECONDS, Failures
from server.observability.otlp.trace_context import note_span, request_attributes, span_ids
from server.version import VERSION

_EXPORTERS = "opentelemetry.exporter"
_BATCH_VARIABLE, _BATCH = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 128
"""Spans sent together. Encoding them holds the interpreter's lock, for 3 ms: so long do requests wait."""
_SCOPE = InstrumentationScope("bitdial", VERSION)
_OK, _FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class Tracing:
    """Wraps the metrics: every observed generation also becomes a span.

    Args:
        metrics: receives every observation, with the span's ids if it is exported.
        url: of the collector.
        model: the served model's name.
        resource: this process.
    """

    def __init__(self, metrics: Observer, url: str, model: str, resource: Resource) -> None:
        self._metrics, self._model, self._resource = metrics, model, resource
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        logging.getLogger(_EXPORTERS).setLevel(logging.CRITICAL)  # ``Failures`` logs instead
        exporter = _Watched(OTLPSpanExporter(url, timeout=EXPORT_SECONDS), Failures("traces", url))
        batch = None if _BATCH_VARIABLE in os.environ else _BATCH
        self._processor = BatchSpanProcessor(exporter, max_export_batch_size=batch)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self.tracer = self._provider.get_tracer(_SCOPE.name, _SCOPE.version)

    def observe_request(self, ended: Ended, span: SpanIds | None = None) -> None:
        self._metrics.observe_request(ended, self._trace(ended))

    def _trace(self, ended: Ended) -> SpanIds | None:
        """The ids of the generation's span; None if it is not sampled."""
        request = trace.get_current_span()
        if request.is_recording():
            return self._add(ended, request.get_span_context())
        context = request.get_span_context()
        if context.is_valid and not context.is_remote:
            return None
        return self._trace_refusal(ended)

    def _trace_refusal(self, ended: Ended) -> SpanIds | None:
        """Below the framework, a request has no span of its own: the generation's is the server's."""
        span = self.tracer.start_span(
            conventions.span_name(ended, self._model),
            kind=SpanKind.SERVER,
            attributes={**conventions.identity(ended, self._model), **request_attributes()},
        )
        if not span.is_recording():
            return None
        span.set_attributes(conventions.details(ended, self._model))
        span.set_status(_FAILED if ended.failed else _OK)
        span.end()
        ids = span_ids(span.get_span_context())
        note_span(ids)
        return ids

    def _add(self, ended: Ended, request: SpanContext) -> SpanIds:
        """Adds the generation's span and its phases', all of which have ended already.

        They are made without the tracer, which would take ten times as long, mostly to check attributes.
        """
        now, line = time.perf_counter(), ended.timeline
        began = line.arrived if ended.params is not None else now
        end = line.last_token if ended.outcome == "success" and line.last_token is not None else now
        attributes = {
            **conventions.identity(ended, self._model),
            **conventions.details(ended, self._model),
            **request_attributes(),
        }
        offset = time.time_ns() - _nanoseconds(now)
        whole = conventions.Phase(conventions.span_name(ended, self._model), began, end, attributes)
        generation = self._add_span(whole, request, offset, _FAILED if ended.failed else _OK)
        for phase in conventions.phases(ended, end):
            self._add_span(phase, generation, offset)
        return span_ids(generation)

    def _add_span(
        self, phase: conventions.Phase, parent: SpanContext, offset: int, status: Status = _OK
    ) -> SpanContext:
        """Queues a span for export; ``offset``: from ``time.perf_counter()`` to the epoch, in nanoseconds."""
        span_id = self._provider.id_generator.generate_span_id()
        context = SpanContext(parent.trace_id, span_id, False, parent.trace_flags, parent.trace_state)
        self._processor.on_end(
            ReadableSpan(
                phase.name,
                context,
                parent,
                self._resource,
                phase.attributes,
                status=status,
                start_time=offset + _nanoseconds(phase.began),
                end_time=offset + _nanoseconds(phase.ended),
                instrumentation_scope=_SCOPE,
            )
        )
        return context

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
