"""The text of ``/metrics`` in the format that is asked for: Prometheus's, or OpenMetrics with exemplars."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest, openmetrics
from prometheus_client.core import Metric

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
    for one in metrics:
        one.refresh()
    registry = CollectorRegistry()
    registry.register(_Merged([one.registry for one in metrics]))
    if prefers_openmetrics(accept):
        text = openmetrics.exposition.generate_latest(registry)  # type: ignore[no-untyped-call]
        return Exposition(text, openmetrics.exposition.CONTENT_TYPE_LATEST)
    return Exposition(generate_latest(registry), PLAIN_TYPE)


class _Merged:
    """Each family once, with the series of all registries."""

    def __init__(self, registries: Sequence[CollectorRegistry]) -> None:
        self._registries = registries

    def describe(self) -> Iterator[Metric]:
        """Nothing: otherwise registering would collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for registry in self._registries:
            for family in registry.collect():
                if (known := families.setdefault(family.name, family)) is not family:
                    known.samples.extend(family.samples)
        return iter(families.values())


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
