"""The metrics of several models as one text: each family once, with the series of all."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from server.observability.metrics import Metrics


def render(metrics: Sequence[Metrics]) -> bytes:
    """Prometheus's text format of the models' metrics, whose series differ in the label ``model``."""
    registry = CollectorRegistry()
    registry.register(_Merged([one.registry for one in metrics]))
    return generate_latest(registry)


class _Merged:
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
