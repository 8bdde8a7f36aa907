"""The text of ``/metrics`` for all models: in Prometheus's format, or OpenMetrics', which has exemplars."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest, openmetrics
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.observability.metrics import Metrics

PLAIN = "text/plain"
OPENMETRICS = "application/openmetrics-text"
PLAIN_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition(NamedTuple):
    """A scrape's body and its ``Content-Type``."""

    body: bytes
    content_type: str


def expose(metrics: Sequence[Metrics], accept: str) -> Exposition:
    """Every series of the models; ``accept``: the request's ``Accept``."""
    registry = CollectorRegistry()
    registry.register(_Merged(metrics))
    if prefers_openmetrics(accept):
        text = openmetrics.exposition.generate_latest(registry)  # type: ignore[no-untyped-call]
        return Exposition(text, openmetrics.exposition.CONTENT_TYPE_LATEST)
    return Exposition(generate_latest(registry), PLAIN_TYPE)


class _Merged(Collector):
    def __init__(self, metrics: Sequence[Metrics]) -> None:
        self._metrics = metrics

    def describe(self) -> Iterator[Metric]:
        """Nothing: otherwise registering would collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        return merged(chain.from_iterable(one.families() for one in self._metrics))


def merged(families: Iterable[Metric]) -> Iterator[Metric]:
    """Each family once, with the samples of all; those of several models differ in a label."""
    found: dict[str, Metric] = {}
    for family in families:
        if (known := found.setdefault(family.name, family)) is not family:
            known.samples.extend(family.samples)
    return iter(found.values())


def prefers_openmetrics(accept: str) -> bool:
    """Whether OpenMetrics is asked for by name, and no less than plain text is."""
    weights = {PLAIN: 0.0, OPENMETRICS: 0.0}
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if media_type in weights:
            weights[media_type] = max(weights[media_type], _weight(parameters))
    return 0 < weights[OPENMETRICS] >= weights[PLAIN]


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
