"""Traces and metrics for an OpenTelemetry collector, by OTLP over HTTP.

The only importers of ``opentelemetry``, an extra; imported only if a collector is configured. Both are sent
by threads of their own, so that a slow or unreachable collector loses telemetry and never delays a request.
OpenTelemetry's own variables (``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_EXPORTER_OTLP_HEADERS``,
``OTEL_TRACES_SAMPLER`` …) are respected.
"""
