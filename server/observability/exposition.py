"""The text of ``/metrics`` in the format that is asked for: Prometheus's, or OpenMetrics with exemplars."""

from typing import NamedTuple

from prometheus_client import generate_latest, openmetrics

from server.observability.metrics import Metrics

PLAIN = "text/plain"
OPENMETRICS = "application/openmetrics-text"
_PLAIN_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition(NamedTuple):
    """A scrape's body and its ``Content-Type``."""

    body: bytes
    content_type: str


def expose(metrics: Metrics, accept: str) -> Exposition:
    """Every series; ``accept``: the request's ``Accept``."""
    metrics.refresh()
    if prefers_openmetrics(accept):
        text = openmetrics.exposition.generate_latest(metrics.registry)  # type: ignore[no-untyped-call]
        return Exposition(text, openmetrics.exposition.CONTENT_TYPE_LATEST)
    return Exposition(generate_latest(metrics.registry), _PLAIN_TYPE)


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
