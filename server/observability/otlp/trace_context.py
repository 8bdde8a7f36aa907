"""A request's trace, which is the one that its ``traceparent`` names (W3C) or a new one, and its own span."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.log_context import log_ids
from server.http.redaction import Redaction
from server.http.route_facts import facts_of
from server.observability.ended import SpanIds

_HEADERS = (b"traceparent", b"tracestate")
_IDS = "bitdial.log_ids"
_PROPAGATOR = TraceContextTextMapPropagator()


class TraceContext:
    """Middleware that gives each request for generations a span in its caller's trace.

    Others, such as scrapes, have none: they would be most of what is stored.

    Args:
        redaction: removes keys from the path.
    """

    def __init__(self, app: ASGIApp, redaction: Redaction) -> None:
        self.app, self._redaction = app, redaction

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not facts_of(scope).takes_a_place:
            await self.app(scope, receive, send)
            return
        tracer = scope["app"].state.telemetry.spans.tracer  # made once the app runs
        with trace_context(scope), self._request_span(tracer, scope) as span:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _set_status(span, message["status"])
                await send(message)

            await self.app(scope, receive, watched)

    @contextmanager
    def _request_span(self, tracer: Tracer, scope: Scope) -> Iterator[Span]:
        attributes: dict[str, AttributeValue] = {
            "http.request.method": scope["method"],
            "url.path": self._redaction.address(scope["path"]),
            "url.scheme": scope["scheme"],
            **request_attributes(),
        }
        span = tracer.start_span(scope["method"], kind=SpanKind.SERVER, attributes=attributes)
        if span.is_recording():
            note_span(span_ids(span.get_span_context()))
        token = context.attach(trace.set_span_in_context(span))
        try:
            yield span
        except BaseException as error:
            # not the message, which may contain what the client sent
            span.set_attribute("error.type", type(error).__qualname__)
            if isinstance(error, Exception):
                span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            context.detach(token)
            if (route := getattr(scope.get("route"), "path", None)) is not None:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            span.end()


@contextmanager
def trace_context(scope: Scope) -> Iterator[None]:
    """Makes spans started inside children of the one that the request names."""
    carrier: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        if name in _HEADERS:  # several lines of tracestate are one list
            carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
    parent = _PROPAGATOR.extract(carrier, context.Context())
    token = context.attach(context.set_value(_IDS, log_ids(scope), parent))
    try:
        yield
    finally:
        context.detach(token)


def request_attributes() -> dict[str, AttributeValue]:
    """The attribute by which spans are found from the log, inside a request."""
    ids = context.get_value(_IDS)
    return {"bitdial.request_id": ids["request_id"]} if isinstance(ids, dict) else {}


def note_span(span: SpanIds) -> None:
    """Adds the ids of the request's first exported span to its log lines."""
    if isinstance(ids := context.get_value(_IDS), dict) and "trace_id" not in ids:
        ids.update(span._asdict())


def span_ids(found: SpanContext) -> SpanIds:
    return SpanIds(trace.format_trace_id(found.trace_id), trace.format_span_id(found.span_id))


def _set_status(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:  # a client's own errors are no errors of the server's
        span.set_attribute("error.type", str(status))
        span.set_status(Status(StatusCode.ERROR))
