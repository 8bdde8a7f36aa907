"""A replica reduced to the number of its requests, by what event simulations of the real scheduler show.

For every number of requests: the rate at which one ends, and the latencies of those that arrive or are
decoded then. The stationary distribution of any process that moves by single steps is that of a birth-death
process with these conditional rates (flow balance across each level); what is lost is the order of events.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.planning.simulation import Served, Simulated
from server.planning.step_times import Floats

POINTS = 200  # quantiles kept of a distribution
_LEAST = 50  # observations of a number of requests, below which it is not used


@dataclass(frozen=True)
class Aggregate:
    """By the number of requests in a replica, 0 … levels − 1.

    Args:
        rates: of requests that end, 1/s.
        ttfts: (levels, POINTS) quantiles of the time to first token of a request that finds so many.
        gaps: (levels, POINTS) quantiles of the time between tokens while there are so many.
        tokens: rows that get a token in a second.
    """

    rates: Floats
    ttfts: Floats
    gaps: Floats
    tokens: Floats

    @property
    def levels(self) -> int:
        return len(self.rates)


def aggregate(runs: Sequence[Simulated], slots: int, levels: int) -> Aggregate:
    """
    Args:
        runs: of one replica each, at loads from low to beyond its capacity.
        levels: numbers beyond the observed ones wait in line: each adds the time in which one ends.
    """
    seconds, ended = np.zeros(levels + 1), np.zeros(levels + 1)
    ttfts, gaps = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    for run in runs:
        served = [one for one in (*run.first, *run.requests) if not one.refused]
        times, counts = _levels(served)
        held = np.minimum(counts, levels)
        np.add.at(seconds, held[:-1], np.diff(times))
        for one in served:
            before = int(np.searchsorted(times, one.times[-1], side="left")) - 1
            ended[held[before]] += 1
            ttfts[min(one.ahead, levels)].append(one.ttft)
            places = np.searchsorted(times, one.times[1:], side="left") - 1
            for level, gap in zip(held[places], one.gaps, strict=True):
                gaps[int(level)].append(gap)
    full = _observed(ended, slots)
    rates = np.array([0.0, *(ended[at] / seconds[at] if at <= full else 0.0 for at in range(1, levels))])
    busy = min(2 * slots, full)  # with fewer, some have only just come and are not decoded yet
    saturated = float(ended[busy : full + 1].sum() / seconds[busy : full + 1].sum())
    rates[busy:] = saturated
    decoded = [len(gaps[at]) / seconds[at] if seconds[at] else 0.0 for at in range(levels)]
    return Aggregate(
        rates,
        np.stack([_waiting(ttfts, at, slots, saturated) for at in range(levels)]),
        np.stack([_quantiles(gaps[max(min(at, full), 1)]) for at in range(levels)]),
        np.array([decoded[min(at, full)] for at in range(levels)]),
    )


def _levels(served: Sequence[Served]) -> tuple[Floats, np.ndarray]:
    """Times at which the number of requests changes, and the number from then on."""
    changes = sorted([(one.arrived, 1) for one in served] + [(one.times[-1], -1) for one in served])
    times = np.array([time for time, _ in changes])
    return times, np.cumsum([by for _, by in changes])


def _observed(ended: Floats, slots: int) -> int:
    """The largest number of requests that was seen often enough."""
    often = np.nonzero(ended[:-1] >= _LEAST)[0]
    return max(int(often.max()), slots)


def _waiting(ttfts: dict[int, list[float]], level: int, slots: int, rate: float) -> Floats:
    """Quantiles at a level; where it was hardly seen, of the nearest below, and a wait for each above."""
    known = level
    while known and len(ttfts[known]) < _LEAST:
        known -= 1
    found = _quantiles(ttfts[known])
    return found + max(level - max(known, slots - 1), 0) / rate


def _quantiles(values: Sequence[float]) -> Floats:
    found: Floats = np.quantile(values, (np.arange(POINTS) + 0.5) / POINTS)
    return found
