"""Prometheus's text of several replicas as one: sums, and for a few gauges the mean or the largest."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_MEANS, _LARGEST = frozenset({"bitdial_kv_cache_usage"}), frozenset({"bitdial_load_seconds"})
_CUMULATIVE = frozenset({"counter", "histogram"})
_MOST_MISSING = 64  # replicas that may come back; of those before, the sum is kept
Samples = dict[str, float]
"""By a sample's name with its labels, as in the text."""


@dataclass
class _Family:
    """A metric: the lines that describe it, and each replica's samples."""

    described: list[str] = field(default_factory=list)
    kind: str = ""
    samples: dict[str, Samples] = field(default_factory=dict)


class MergedMetrics:
    """Sums the metrics of replicas. What a replica has counted stays in the sums after its end, since a
    counter that falls looks like a restart, which Prometheus would add again. One that is missing once, since
    it did not answer in time, is not counted twice when it is back."""

    def __init__(self) -> None:
        self._last: dict[str, dict[str, Samples]] = {}
        self._missing: dict[str, dict[str, Samples]] = {}
        self._ended: dict[str, Samples] = {}

    def merged(self, pages: Mapping[str, str]) -> str:
        """One text of the replicas' texts, by their names."""
        families: dict[str, _Family] = {}
        for replica, text in pages.items():
            _read(text, replica, families)
        self._keep_ended(pages, families)
        return "".join(self._written(name, family) for name, family in families.items())

    def _keep_ended(self, pages: Mapping[str, str], families: Mapping[str, _Family]) -> None:
        for gone in self._last.keys() - pages.keys():
            self._missing[gone] = self._last.pop(gone)
        for back in self._missing.keys() & pages.keys():
            del self._missing[back]
        while len(self._missing) > _MOST_MISSING:
            self._add_ended(self._missing.pop(next(iter(self._missing))))
        for replica in pages:
            self._last[replica] = {
                name: family.samples[replica]
                for name, family in families.items()
                if family.kind in _CUMULATIVE and replica in family.samples
            }

    def _add_ended(self, families: Mapping[str, Samples]) -> None:
        for name, samples in families.items():
            kept = self._ended.setdefault(name, {})
            for sample, value in samples.items():
                kept[sample] = kept.get(sample, 0.0) + value

    def _written(self, name: str, family: _Family) -> str:
        missing = [families.get(name, {}) for families in self._missing.values()]
        sources = [*family.samples.values(), *missing, self._ended.get(name, {})]
        values: dict[str, list[float]] = {}
        for samples in sources:
            for sample, value in samples.items():
                values.setdefault(sample, []).append(value)
        lines = [f"{sample} {_combined(name, found)}" for sample, found in values.items()]
        return "".join(f"{line}\n" for line in [*family.described, *lines])


def _combined(name: str, values: list[float]) -> float:
    if name in _MEANS:
        return sum(values) / len(values)
    return max(values) if name in _LARGEST else sum(values)


def _read(text: str, replica: str, families: dict[str, _Family]) -> None:
    family = _Family()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            family = families.setdefault(name, _Family())
            _describe(family, line)
        elif line.startswith("# TYPE "):
            family.kind = line.rsplit(" ", 1)[1]
            _describe(family, line)
        elif line:
            sample, _, value = line.rpartition(" ")
            family.samples.setdefault(replica, {})[sample] = float(value)


def _describe(family: _Family, line: str) -> None:
    if line not in family.described:
        family.described.append(line)
