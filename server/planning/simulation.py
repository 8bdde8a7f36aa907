"""Discrete-event simulation of replicas behind a router, by SimPy; the replicas run the real scheduler."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import simpy

from server.engine.sequence import Sequence as Request
from server.planning.simulated_engine import SimulatedEngine
from server.planning.step_times import Floats, Noise, StepTimes
from server.planning.workload import MILLISECONDS, Frontend, Latencies, Objectives, Replica, Workload

Policy = Literal["random", "two choices", "least loaded"]
WARM_UP = 0.1  # share of the requests whose latencies are left out: the first ones meet empty replicas
_Events = Generator[simpy.Event, None, None]


@dataclass
class Served:
    """One request as its client sees it. Seconds."""

    arrived: float
    ahead: int
    """Requests in its replica when it arrived."""
    refused: bool = False
    """Or not finished in time."""
    times: list[float] = field(default_factory=list)
    """Of its tokens."""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrived

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.times)]

    def is_good(self, limits: Objectives) -> bool:
        """Whether its time to the first token, and the mean between its tokens, are within the limits."""
        mean = (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)
        return self.ttft * MILLISECONDS <= limits.ttft_ms and mean * MILLISECONDS <= limits.itl_ms


@dataclass(frozen=True)
class Simulated:
    """What the requests of a simulation met, in the order of their arrival; the first are left out."""

    requests: Sequence[Served]
    seconds: float
    """From the first of them to the last token."""
    first: Sequence[Served] = ()
    """Those that were left out."""

    @property
    def finished(self) -> list[Served]:
        return [one for one in self.requests if not one.refused]

    @property
    def ttfts(self) -> Floats:
        return np.array([one.ttft for one in self.finished])

    @property
    def gaps(self) -> Floats:
        return np.array([gap for one in self.finished for gap in one.gaps])

    def goodput(self, limits: Objectives) -> float:
        """Good requests a second."""
        return sum(one.is_good(limits) for one in self.finished) / self.seconds

    def latencies(self) -> Latencies:
        finished = self.finished
        decoding = sum(one.times[-1] - one.times[0] for one in finished) / self.seconds
        return latencies_of(self.ttfts, self.gaps, 1 - len(finished) / len(self.requests), decoding)


def latencies_of(ttfts: Floats, gaps: Floats, refused: float = 0.0, rows: float = 0.0) -> Latencies:
    """Percentiles; infinite where nothing was served, and 0 between tokens where each has only one."""
    first = np.quantile(ttfts, (0.5, 0.99)) if len(ttfts) else (np.inf, np.inf)
    between = np.quantile(gaps, (0.5, 0.99)) if len(gaps) else (0.0, 0.0)
    return Latencies(float(first[0]), float(first[1]), float(between[0]), float(between[1]), refused, rows)


class Simulation:
    """One run.

    Args:
        replicas: number of equal replicas.
        policy: how the router chooses one; it knows the requests in each.
    """

    def __init__(
        self,
        times: StepTimes,
        workload: Workload,
        replica: Replica,
        frontend: Frontend | None = None,
        replicas: int = 1,
        policy: Policy = "random",
        seed: int = 7,
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._workload, self._policy = workload, policy
        self._frontend = frontend or Frontend()
        self._env = simpy.Environment()
        self._served: dict[Request, Served] = {}
        context = workload.prompt + workload.tokens
        self._engines = [
            SimulatedEngine(
                times, Noise(times, self._random), replica, context, self._frontend, self._on_token
            )
            for _ in range(replicas)
        ]
        self._wakes = [self._env.event() for _ in self._engines]

    def run(self, arrivals: Sequence[float]) -> Simulated:
        """Serves requests that arrive at these times, in seconds from 0, until all have ended."""
        requests: list[Served] = []
        for number in range(len(self._engines)):
            self._env.process(self._replica(number))
        self._env.process(self._router(arrivals, requests))
        self._env.run()
        for one in requests:  # those whose deadline has passed end early
            one.refused = one.refused or len(one.times) < self._workload.tokens
        skipped = int(WARM_UP * len(requests))
        kept = requests[skipped:]
        ends = [one.times[-1] for one in kept if one.times]
        seconds = max(ends, default=kept[-1].arrived) - kept[0].arrived
        return Simulated(kept, seconds, requests[:skipped])

    def _router(self, arrivals: Sequence[float], requests: list[Served]) -> _Events:
        env = self._env
        for arrived in arrivals:
            yield env.timeout(arrived - env.now)
            number = self._chosen()
            engine = self._engines[number]
            request = Served(env.now, engine.places.in_flight)
            requests.append(request)
            if engine.reserve():
                env.process(self._request(number, request))
            else:
                request.refused = True

    def _request(self, number: int, request: Served) -> _Events:
        """Its body is received and encoded, then it is queued."""
        yield self._env.timeout(self._frontend.request_seconds)
        shape = self._workload
        sequence = self._engines[number].open(shape.prompt, shape.tokens, self._env.now, request.arrived)
        if sequence is None:
            request.refused = True
            return
        self._served[sequence] = request
        if not self._wakes[number].triggered:
            self._wakes[number].succeed()

    def _replica(self, number: int) -> _Events:
        engine, env = self._engines[number], self._env
        while True:
            if not engine.has_work:
                self._wakes[number] = env.event()
                yield self._wakes[number]
            end = engine.step(env.now)
            yield env.timeout(end - env.now)
            engine.deliver(env.now)

    def _on_token(self, sequence: Request, now: float) -> None:
        self._served[sequence].times.append(now)

    def _chosen(self) -> int:
        count = len(self._engines)
        if count == 1:
            return 0
        load: Callable[[int], int] = lambda number: self._engines[number].places.in_flight  # noqa: E731
        if self._policy == "random":
            return int(self._random.integers(count))
        if self._policy == "two choices":
            return min(map(int, self._random.choice(count, 2, replace=False)), key=load)
        least = min(map(load, range(count)))
        return int(self._random.choice([number for number in range(count) if load(number) == least]))


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """The first ``count`` arrival times of a Poisson process, in seconds."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def simulate(
    times: StepTimes,
    workload: Workload,
    replica: Replica,
    frontend: Frontend | None = None,
    requests: int = 1000,
    seed: int = 7,
) -> Simulated:
    """One replica that gets all of the workload."""
    arrivals = poisson(workload.rate, requests, seed)
    return Simulation(times, workload, replica, frontend, seed=seed).run(arrivals)


def capacity(
    times: StepTimes, workload: Workload, replica: Replica, frontend: Frontend | None = None, rounds: int = 24
) -> float:
    """Most requests a second that a replica serves: the rate at which it ends them when some always wait."""
    unlimited = Replica(replica.slots, replica.chunk, replica.busy_chunk, places=10**9, timeout=1e9)
    arrivals = [number * 1e-9 for number in range(rounds * replica.slots)]
    found = Simulation(times, workload, unlimited, frontend).run(arrivals)
    ends = sorted(one.times[-1] for one in found.finished)
    first, last = ends[len(ends) // 4], ends[-max(len(ends) // 4, 1)]  # neither the start nor the emptying
    return (len(ends) - len(ends) // 4 - max(len(ends) // 4, 1)) / (last - first)
