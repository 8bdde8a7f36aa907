"""The families of the Prometheus registry in OTLP's data model, by OpenTelemetry's rules of compatibility.

A collector that exports them to Prometheus gives every series the name that it has in ``/metrics``.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.core import Metric as Family
from prometheus_client.core import Sample

from server.observability.latency import GEN_AI_LABELS
from server.version import VERSION

_CUMULATIVE = AggregationTemporality.CUMULATIVE
_UNITS = {"_seconds": "s", "_bytes": "By", "_tokens": "{token}"}
_GEN_AI = "gen_ai_server_"
# the names that have dots, and underscores of their own
_DOTTED = {
    "gen_ai_operation_name": "gen_ai.operation.name",
    "gen_ai_provider_name": "gen_ai.provider.name",
    "gen_ai_request_model": "gen_ai.request.model",
    "gen_ai_response_model": "gen_ai.response.model",
    "bitdial_precision": "bitdial.precision",
    "error_type": "error.type",
    "gen_ai_server_request_duration": "gen_ai.server.request.duration",
    "gen_ai_server_time_to_first_token": "gen_ai.server.time_to_first_token",
    "gen_ai_server_time_per_output_token": "gen_ai.server.time_per_output_token",
}
assert set(GEN_AI_LABELS) <= _DOTTED.keys()


def as_metrics_data(families: Iterable[Family], began: int, now: int, resource: Resource) -> MetricsData:
    """Every series of ``families`` that has a sample.

    Args:
        began: the time since which is counted, in nanoseconds since the epoch, as ``now``.
    """
    metrics = [_metric(family, began, now) for family in families if family.samples]
    scope = InstrumentationScope("bitdial", VERSION)
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope, metrics, "")], "")])


def _metric(family: Family, began: int, now: int) -> Metric:
    data: Sum | Gauge | Histogram
    if family.type == "histogram":
        data = Histogram(_histogram_points(family, began, now), _CUMULATIVE)
    elif family.type == "counter":
        points = [_number(sample, began, now) for sample in family.samples]
        data = Sum(points, _CUMULATIVE, is_monotonic=True)
    else:
        data = Gauge([_number(sample, began, now) for sample in family.samples])
    return Metric(_DOTTED.get(family.name, family.name), family.documentation, _unit(family.name), data)


def _unit(name: str) -> str:
    if name.startswith(_GEN_AI):
        return "s"
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")


def _number(sample: Sample, began: int, now: int) -> NumberDataPoint:
    return NumberDataPoint(_attributes(sample.labels), began, now, sample.value)


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    """An empty label is one that is not there, to Prometheus."""
    return {_DOTTED.get(name, name): value for name, value in labels.items() if value and name != "le"}


def _histogram_points(family: Family, began: int, now: int) -> list[HistogramDataPoint]:
    series: dict[tuple[tuple[str, str], ...], list[Sample]] = defaultdict(list)
    for sample in family.samples:
        series[tuple((name, value) for name, value in sample.labels.items() if name != "le")].append(sample)
    return [_histogram_point(samples, began, now) for samples in series.values()]


def _histogram_point(samples: list[Sample], began: int, now: int) -> HistogramDataPoint:
    buckets = [sample for sample in samples if sample.name.endswith("_bucket")]
    total = next(sample.value for sample in samples if sample.name.endswith("_sum"))
    upto = [int(sample.value) for sample in buckets]
    unknown: Any = None  # the extremes are not kept
    return HistogramDataPoint(
        attributes=_attributes(buckets[0].labels),
        start_time_unix_nano=began,
        time_unix_nano=now,
        count=upto[-1],
        sum=total,
        bucket_counts=[later - earlier for earlier, later in pairwise([0, *upto])],
        explicit_bounds=[float(sample.labels["le"]) for sample in buckets[:-1]],
        min=unknown,
        max=unknown,
        exemplars=[_exemplar(sample) for sample in buckets if sample.exemplar],
    )


def _exemplar(sample: Sample) -> Exemplar:
    found = sample.exemplar
    assert found is not None
    return Exemplar(
        {},
        found.value,
        round(float(found.timestamp or 0) * 1e9),
        int(found.labels["span_id"], 16),
        int(found.labels["trace_id"], 16),
    )
