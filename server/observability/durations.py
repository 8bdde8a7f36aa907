"""Durations counted once, in buckets from which several histograms with bounds of their own are read."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import Exemplar, HistogramMetricFamily

from server.observability.ended import SpanIds

Labels = tuple[str, ...]
_Bucket = tuple[str, float] | tuple[str, float, Exemplar]


class _Series:
    """The observations with one set of labels."""

    __slots__ = ("counts", "exemplars", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        """By bucket: the latest observation that was traced."""


class Durations:
    """Seconds, by labels. Event loop only.

    The library's own histogram has one set of bounds, and takes two locks for each observation.

    Args:
        bounds: every set of upper bounds, inclusive, that a histogram may ask for.
    """

    def __init__(self, *bounds: Sequence[float]) -> None:
        self._bounds = sorted({bound for each in bounds for bound in each})
        self._series: dict[Labels, _Series] = {}

    def observe(self, values: Iterable[float], labels: Labels, span: SpanIds | None = None) -> None:
        """Counts ``values``; ``span``: an example of what took so long."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._bounds) + 1)
        for value in values:
            bucket = bisect_left(self._bounds, value)
            series.counts[bucket] += 1
            series.total += value
            if span is not None:
                series.exemplars[bucket] = Exemplar(span._asdict(), value, time.time())

    def histogram(
        self,
        family: HistogramMetricFamily,
        bounds: Sequence[float],
        labels_of: Callable[[Labels], Labels | None],
    ) -> HistogramMetricFamily:
        """Adds the observations to ``family``.

        Args:
            bounds: one of the sets that this was made with.
            labels_of: a series' labels in the family; those with the same are added up; None leaves it out.
        """
        names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        target = [bisect_left(bounds, bound) for bound in self._bounds] + [len(bounds)]
        merged: dict[Labels, _Series] = {}
        for labels, series in self._series.items():
            if (shown := labels_of(labels)) is not None:
                _add(merged.setdefault(shown, _Series(len(names))), series, target)
        for labels, series in merged.items():
            counts = accumulate(series.counts)
            buckets: list[_Bucket] = []
            for at, (name, count) in enumerate(zip(names, counts, strict=True)):
                exemplar = series.exemplars.get(at)
                buckets.append((name, count) if exemplar is None else (name, count, exemplar))
            family.add_metric(labels, buckets, series.total)
        return family


def _add(sums: _Series, series: _Series, target: Sequence[int]) -> None:
    """Adds a series to one with coarser buckets; ``target``: the coarse bucket of each fine one."""
    sums.total += series.total
    for bucket, count in zip(target, series.counts, strict=True):
        sums.counts[bucket] += count
    for bucket, exemplar in series.exemplars.items():
        other = sums.exemplars.get(target[bucket])
        if other is None or float(other.timestamp or 0) <= float(exemplar.timestamp or 0):
            sums.exemplars[target[bucket]] = exemplar
