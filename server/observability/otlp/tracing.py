"""A span for every generation, inside its request's, with its queue, prefill and decode inside it."""

import time

from opentelemetry import trace
from opentelemetry.trace import SpanContext, SpanKind

from server.observability.ended import Ended, Observer, SpanIds
from server.observability.otlp import conventions
from server.observability.otlp.spans import FAILED, OK, Spans, nanoseconds
from server.observability.otlp.trace_context import note_span, request_attributes, span_ids


class Tracing:
    """Wraps a model's metrics: every observed generation also becomes a span.

    Args:
        metrics: receives every observation, with the span's ids if it is exported.
        model: the served model's name.
        spans: receives the spans.
    """

    def __init__(self, metrics: Observer, model: str, spans: Spans) -> None:
        self._metrics, self._model, self._spans = metrics, model, spans

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
        span = self._spans.tracer.start_span(
            conventions.span_name(ended, self._model),
            kind=SpanKind.SERVER,
            attributes={**conventions.identity(ended, self._model), **request_attributes()},
        )
        if not span.is_recording():
            return None
        span.set_attributes(conventions.details(ended, self._model))
        span.set_status(FAILED if ended.failed else OK)
        span.end()
        ids = span_ids(span.get_span_context())
        note_span(ids)
        return ids

    def _add(self, ended: Ended, request: SpanContext) -> SpanIds:
        """Adds the generation's span and its phases'."""
        now, line = time.perf_counter(), ended.timeline
        began = line.arrived if ended.params is not None else now
        end = line.last_token if ended.outcome == "success" and line.last_token is not None else now
        attributes = {
            **conventions.identity(ended, self._model),
            **conventions.details(ended, self._model),
            **request_attributes(),
        }
        offset = time.time_ns() - nanoseconds(now)
        whole = conventions.Phase(conventions.span_name(ended, self._model), began, end, attributes)
        generation = self._spans.add(whole, request, offset, FAILED if ended.failed else OK)
        for phase in conventions.phases(ended, end):
            self._spans.add(phase, generation, offset)
        return span_ids(generation)
