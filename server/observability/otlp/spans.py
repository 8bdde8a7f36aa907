"""Spans on their way to the collector: queued up to a bound, and exported by a thread."""

import asyncio
import logging
import os
import threading
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode

from server.observability.otlp.conventions import Phase
from server.observability.otlp.destination import CLOSE_SECONDS, EXPORT_SECONDS, Failures
from server.version import VERSION

OK, FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_EXPORTERS = "opentelemetry.exporter"
_BATCH_VARIABLE, _BATCH = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 128
"""Spans sent together. Encoding them holds the interpreter's lock, for 3 ms: so long do requests wait."""
_SCOPE = InstrumentationScope("bitdial", VERSION)


class Spans:
    """One per app.

    Args:
        url: of the collector.
        resource: this process.
    """

    def __init__(self, url: str, resource: Resource) -> None:
        self._resource = resource
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        logging.getLogger(_EXPORTERS).setLevel(logging.CRITICAL)  # ``Failures`` logs instead
        exporter = _Watched(OTLPSpanExporter(url, timeout=EXPORT_SECONDS), Failures("traces", url))
        batch = None if _BATCH_VARIABLE in os.environ else _BATCH
        self._processor = BatchSpanProcessor(exporter, max_export_batch_size=batch)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self.tracer = self._provider.get_tracer(_SCOPE.name, _SCOPE.version)
        """Starts spans of what goes on, by the sampler's decision."""

    def add(self, ended: Phase, parent: SpanContext, offset: int, status: Status = OK) -> SpanContext:
        """Adds the span of what has ended, inside a sampled one.

        It is made without the tracer, which would take ten times as long, mostly to check attributes.

        Args:
            offset: from ``time.perf_counter()`` to the epoch, in nanoseconds.
        """
        span_id = self._provider.id_generator.generate_span_id()
        context = SpanContext(parent.trace_id, span_id, False, parent.trace_flags, parent.trace_state)
        self._processor.on_end(
            ReadableSpan(
                ended.name,
                context,
                parent,
                self._resource,
                ended.attributes,
                status=status,
                start_time=offset + nanoseconds(ended.began),
                end_time=offset + nanoseconds(ended.ended),
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


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
