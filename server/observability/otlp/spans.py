"""Spans on their way to the collector: queued up to a bound, and exported by a thread."""

import asyncio
import logging
import os
import threading
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode

from server.observability.otlp.conventions import Phase
from server.observability.otlp.destination import CLOSE_SECONDS, EXPORT_SECONDS, Failures
from server.observability.otlp.environment import batching, sends
from server.observability.otlp.session import CollectorSession, collector_session, unfinished, why_failed
from server.observability.otlp.span_queue import Dropped, SpanQueue
from server.version import VERSION

OK, FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_QUIET = {"opentelemetry.exporter": logging.CRITICAL, "opentelemetry.util": logging.ERROR}
"""``Failures`` logs instead of exporters; what reads headers would log their values."""
_SCOPE = InstrumentationScope("bitdial", VERSION)


class Spans:
    """One per app.

    Args:
        url: of the collector.
        resource: this process.
    """

    def __init__(self, url: str, resource: Resource) -> None:
        self._resource = resource
        for name, level in _QUIET.items():
            logging.getLogger(name).setLevel(level)
        session, (queue, batch, delay) = collector_session("TRACES"), batching(os.environ)
        exporter = OTLPSpanExporter(url, timeout=EXPORT_SECONDS, session=session)
        self._dropped = Dropped(queue)
        self._watched = _Watched(exporter, session, Failures("traces", url), self._dropped)
        self._processor = SpanQueue(self._watched, self._dropped, queue, delay, batch)
        sampler = None if sends("TRACES", os.environ) else ALWAYS_OFF  # None: the variables' own
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        # not before: warnings of making a provider are of the variables
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
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
        if closing.is_alive():
            self._watched.give_up()
        self._dropped.log(last=True)


class _Watched(SpanExporter):
    """Exports with another exporter, and notes how that went."""

    def __init__(
        self,
        exporter: SpanExporter,
        session: CollectorSession | None,
        failures: Failures,
        dropped: Dropped,
    ) -> None:
        self._exporter, self._session = exporter, session
        self._failures, self._dropped = failures, dropped

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._dropped.note_out(len(spans))
        reason = why_failed(self._session, lambda: self._exporter.export(spans) is SpanExportResult.SUCCESS)
        self._failures.note(reason)
        self._dropped.log()
        return SpanExportResult.SUCCESS if reason is None else SpanExportResult.FAILURE

    def give_up(self) -> None:
        """Notes that an export goes on which is not waited for any more."""
        self._failures.note(unfinished(self._session))

    def shutdown(self) -> None:
        self._exporter.shutdown()


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
