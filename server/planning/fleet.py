"""A fleet of thousands of replicas over a day: a Markov chain of how many replicas hold how many requests.

Replicas of one kind are exchangeable, and each policy of the router depends on their numbers of requests
alone. So the counts of replicas by number of requests are a Markov chain by themselves (exact lumping), and a
step of it costs the same for ten replicas and for a million. Steps are tau-leaps (Gillespie 2001): the events
of a short interval are drawn together from the rates at its beginning.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from server.planning.aggregate import Aggregate
from server.planning.simulation import Policy, latencies_of
from server.planning.step_times import Floats
from server.planning.workload import Latencies

_DRAWS = 20_000
_MOST_ENDS = 0.5  # of a replica in a step
Counts = np.ndarray


@dataclass(frozen=True)
class Faults:
    """Replicas that fail and come back.

    Args:
        mean_between: seconds between the failures of one replica, exponentially distributed.
        restart: seconds from a failure until the replica serves again.
        outages: (time, share) of the replicas that fail together.
    """

    mean_between: float
    restart: float
    outages: tuple[tuple[float, float], ...] = ()


@dataclass
class Window:
    """What was counted in an interval."""

    start: float
    seconds: float
    arrivals: int = 0
    retried: int = 0
    """Requests whose replica failed: they are sent again."""
    refused: int = 0
    found: Counts = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Admitted requests, by the number that their replica held."""
    occupied: Floats = field(default_factory=lambda: np.zeros(0))
    """Replica seconds by number of requests."""

    @property
    def serving(self) -> float:
        """Replicas that serve, averaged over the window."""
        return float(self.occupied.sum() / self.seconds)

    def latencies(self, replica: Aggregate, seed: int = 7) -> Latencies:
        random = np.random.default_rng(seed)
        refused = self.refused / max(self.arrivals, 1)
        tokens = self.occupied * replica.tokens
        if not self.found.any() or not tokens.any():
            return latencies_of(np.array([]), np.array([]), refused)
        points = replica.ttfts.shape[1]
        at = random.choice(replica.levels, _DRAWS, p=self.found / self.found.sum())
        ttfts = replica.ttfts[at, random.integers(points, size=_DRAWS)]
        at = random.choice(replica.levels, _DRAWS, p=tokens / tokens.sum())
        gaps = replica.gaps[at, random.integers(points, size=_DRAWS)]
        rows = float(self.occupied @ np.arange(replica.levels) / max(self.occupied.sum(), 1e-9))
        return latencies_of(ttfts, gaps, refused, rows)


class Fleet:
    """
    Args:
        places: requests in one replica at most; fewer than ``replica.levels``.
        tick: seconds of a step; several times shorter than a request's.
    """

    def __init__(
        self,
        replica: Aggregate,
        replicas: int,
        places: int,
        policy: Policy,
        faults: Faults | None = None,
        tick: float = 0.05,
        seed: int = 7,
    ) -> None:
        """Raises: ValueError, if several requests of a replica would often end in one step."""
        self._replica, self._places, self._policy = replica, places, policy
        self._faults, self._tick = faults, tick
        self._random = np.random.default_rng(seed)
        self.counts: Counts = np.zeros(replica.levels, dtype=np.int64)
        self.counts[0] = replicas
        self._ends = replica.rates * tick
        if self._ends.max() > _MOST_ENDS:
            raise ValueError(f"a tick of {tick} s is too long for {replica.rates.max():.3g} ends a second")
        self._back: deque[tuple[float, int]] = deque()  # (when, replicas) that restart
        self._outages = deque(sorted(faults.outages)) if faults is not None else deque()
        self._again = 0  # requests of failed replicas, sent again in the next step
        self._now = 0.0

    def run(
        self, rate: Callable[[float], float], seconds: float, window: float, start: float = 0.0
    ) -> list[Window]:
        """
        Args:
            rate: arrivals a second at a time.
            window: seconds over which is counted.
            start: the time at which it begins.
        """
        found, self._now = [], start
        for number in range(round(seconds / window)):
            counted = Window(start + number * window, window)
            counted.found = np.zeros(self._replica.levels, dtype=np.int64)
            counted.occupied = np.zeros(self._replica.levels)
            for _ in range(round(window / self._tick)):
                self._step(rate(self._now), counted)
            found.append(counted)
        return found

    def _step(self, rate: float, window: Window) -> None:
        if self._faults is not None:
            self._fail(self._faults, window)
        self._end()
        new = int(self._random.poisson(rate * self._tick))
        window.arrivals += new
        self._admit(new + self._again, window)
        self._again = 0
        window.occupied += self.counts * self._tick
        self._now += self._tick

    def _end(self) -> None:
        """At most one request of a replica ends in a step; the mean is exact."""
        ending = self._random.binomial(self.counts, self._ends)
        self.counts -= ending
        self.counts[:-1] += ending[1:]

    def _admit(self, arriving: int, window: Window) -> None:
        found = self._routed(arriving)
        found[self._places :] = 0
        # of one level, no more than there are replicas: the rest would meet the next level
        moved = np.minimum(found, self.counts)
        over = int((found - moved).sum())
        self.counts -= moved
        self.counts[1:] += moved[:-1]
        window.found += moved
        if over:
            again = self._routed(over)
            again[self._places :] = 0
            moved = np.minimum(again, self.counts)
            self.counts -= moved
            self.counts[1:] += moved[:-1]
            window.found += moved
        window.refused += arriving - int(found.sum()) + (over - int(moved.sum()) if over else 0)

    def _routed(self, arriving: int) -> Counts:
        """Arrivals by the number of requests that they meet."""
        up = int(self.counts.sum())
        if not up or not arriving:
            return np.zeros_like(self.counts)
        if self._policy == "least loaded":
            before = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
            # those in excess of a level's replicas go one level up, with the replicas that were there
            filled: Counts = np.clip(arriving - before, 0, self.counts)
            return filled
        shares = self.counts / up
        if self._policy == "two choices":
            above = np.concatenate([np.cumsum(shares[::-1])[::-1], [0.0]])  # at least so many requests
            shares = np.maximum(above[:-1] ** 2 - above[1:] ** 2, 0)
        drawn: Counts = self._random.multinomial(arriving, shares / shares.sum())
        return drawn

    def _fail(self, faults: Faults, window: Window) -> None:
        while self._back and self._back[0][0] <= self._now:
            self.counts[0] += self._back.popleft()[1]
        failing = self._random.binomial(self.counts, 1 - np.exp(-self._tick / faults.mean_between))
        while self._outages and self._outages[0][0] <= self._now:
            share = self._outages.popleft()[1]
            failing += self._random.binomial(self.counts - failing, share)
        if failing.any():
            self.counts -= failing
            self._again = int(failing @ np.arange(len(failing)))
            window.retried += self._again
            self._back.append((self._now + faults.restart, int(failing.sum())))
