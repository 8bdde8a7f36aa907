"""OpenTelemetry's own variables, as far as its SDK does not read them here; imports nothing of it.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = tuple(f"OTEL_EXPORTER_OTLP_{signal}PROTOCOL" for signal in ("", "TRACES_", "METRICS_"))
_EXPORTERS = ("OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER")
_SAMPLER, _RATIO = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
_HEADERS, _COMPRESSIONS = (
    tuple(f"OTEL_EXPORTER_OTLP_{signal}{name}" for signal in ("", "TRACES_", "METRICS_"))
    for name in ("HEADERS", "COMPRESSION")
)
_OTHERS = (
    *(f"OTEL_EXPORTER_OTLP_{signal}TIMEOUT" for signal in ("", "TRACES_", "METRICS_")),
    "OTEL_METRIC_EXPORT_TIMEOUT",
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
    "OTEL_METRICS_EXEMPLAR_FILTER",
)
_TEMPORALITY = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"  # milliseconds, as the delay
_QUEUE, _BATCH, _DELAY = (
    f"OTEL_BSP_{name}" for name in ("MAX_QUEUE_SIZE", "MAX_EXPORT_BATCH_SIZE", "SCHEDULE_DELAY")
)
_DEFAULTS = {_INTERVAL: 60_000, _QUEUE: 2048, _BATCH: 128, _DELAY: 5000}
"""Those of the specification, but for the batch: encoding its spans holds the interpreter's lock for 3 ms, so
long do requests wait."""
_LEAST_INTERVAL = 100
_log = logging.getLogger(__name__)


class Batching(NamedTuple):
    """At most ``queue`` spans wait, ``batch`` are sent together, after ``delay`` milliseconds."""

    queue: int
    batch: int
    delay: int


def batching(environment: Mapping[str, str]) -> Batching:
    queue = _number(environment, _QUEUE)
    return Batching(queue, min(_number(environment, _BATCH), queue), _number(environment, _DELAY))


def metrics_interval(environment: Mapping[str, str]) -> float:
    """Seconds between exports of metrics."""
    return max(_number(environment, _INTERVAL), _LEAST_INTERVAL) / 1000


def sends(signal: str, environment: Mapping[str, str]) -> bool:
    """Whether ``TRACES`` or ``METRICS`` are to be sent."""
    disabled = _word(environment, "OTEL_SDK_DISABLED") == "true"
    return not disabled and _word(environment, f"OTEL_{signal}_EXPORTER") != "none"


def log_ignored(environment: Mapping[str, str], collector: bool) -> None:
    """Warns of each variable that is set and changes nothing.

    Args:
        collector: whether there is an address to send to.
    """
    for remark in _ignored(environment) if collector else _without_collector(environment):
        _log.warning("%s", remark)


def _without_collector(environment: Mapping[str, str]) -> Iterator[str]:
    if _word(environment, "OTEL_SDK_DISABLED") == "true":
        return
    for name in _ENDPOINTS:
        if _word(environment, name):
            yield f"{name} is set, but nothing is sent without OTLP_ENDPOINT"


def _ignored(environment: Mapping[str, str]) -> Iterator[str]:
    for name in _ENDPOINTS:
        if _word(environment, name):
            yield f"{name} is ignored: OTLP_ENDPOINT is the address"
    for name in _PROTOCOLS:
        if _word(environment, name) not in ("", "http/protobuf"):
            yield f"{name} is ignored: telemetry is sent by http/protobuf"
    for name in _EXPORTERS:
        if _word(environment, name) not in ("", "otlp", "otlp_proto_http", "none"):
            yield f"{name} is ignored: it may be otlp or none"
    if _word(environment, _TEMPORALITY) not in ("", "cumulative"):
        yield f"{_TEMPORALITY} is ignored: metrics are cumulative"
    for name in _COMPRESSIONS:
        if _word(environment, name) not in ("", "none", "gzip", "deflate"):
            yield f"{name} is ignored: it may be gzip, deflate or none"
    for name in _HEADERS:
        if any(entry.strip() and "=" not in entry for entry in environment.get(name, "").split(",")):
            yield f"{name} is ignored where an entry has no '='"
    propagators = {name.strip() for name in _word(environment, "OTEL_PROPAGATORS").split(",")}
    if propagators - {"", "baggage", "tracecontext"} or propagators == {"baggage"}:
        yield "OTEL_PROPAGATORS is ignored: traces are continued from traceparent (tracecontext) alone"
    if _word(environment, _RATIO) and not _word(environment, _SAMPLER).endswith("traceidratio"):
        yield f"{_RATIO} is ignored without {_SAMPLER}=parentbased_traceidratio or traceidratio"
    for name in _OTHERS:
        if _word(environment, name):
            yield f"{name} is ignored"


def _word(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name, "").strip().lower()


def _number(environment: Mapping[str, str], name: str) -> int:
    """A positive whole number; what is none is reported, and the default holds."""
    text, default = _word(environment, name), _DEFAULTS[name]
    if not text:
        return default
    if text.isascii() and text.isdigit() and (value := int(text[:9])) > 0:
        return value
    _log.warning("%s is ignored, since it is not a positive whole number; it is %d", name, default)
    return default
