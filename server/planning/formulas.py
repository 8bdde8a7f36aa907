"""A replica's steady state by formulas; docs/planning.md derives them.

The number of requests in a replica is a birth-death process: they come at the rate of arrivals and leave at a
rate that depends on their number, since more rows take a longer step. Its stationary distribution gives what
an arriving request meets (PASTA), and the mixture of steps that a token comes from. The quantiles of sums
are taken of draws of their terms.
"""

import math
from dataclasses import dataclass

import numpy as np

from server.planning.simulation import latencies_of
from server.planning.step_times import Floats, StepTimes
from server.planning.workload import Frontend, Latencies, Replica, Workload

_DRAWS = 40_000


@dataclass(frozen=True)
class Occupied:
    """What happens while some number of sequences hold slots.

    Args:
        rows: decoded by a step, in the mean; the others wait for their prompt to be computed.
        decode, both: median seconds of a step that decodes them, and of one with a prompt chunk as well.
        mixed: share of steps with a chunk.
        rate: sequences that end in a second.
    """

    rows: float
    decode: float
    both: float
    mixed: float
    rate: float

    @property
    def step(self) -> float:
        return self.mixed * self.both + (1 - self.mixed) * self.decode


class SteadyState:
    """One replica under one workload.

    Args:
        workload: the replica's own share of the arrivals.
    """

    def __init__(
        self, times: StepTimes, workload: Workload, replica: Replica, frontend: Frontend | None = None
    ) -> None:
        self._times, self._workload, self._replica = times, workload, replica
        self._frontend = frontend or Frontend()
        self._mean_noise = float(times.noise.mean())
        self._chunks = math.ceil(workload.prompt / replica.busy_chunk)
        self._states = [self._occupied(held, ends) for held, ends in enumerate(self._ends(), 1)]

    @property
    def capacity(self) -> float:
        """Most requests a second."""
        return max(state.rate for state in self._states)

    def latencies(self) -> Latencies:
        """Infinite at or above the capacity, unless refusals keep the queue finite."""
        share = self._stationary()
        refused = float(share[-1])
        random = np.random.default_rng(7)
        ahead = random.choice(len(share) - 1, _DRAWS, p=share[:-1] / (1 - refused))
        rows = np.array([0.0, *(state.rows for state in self._states)])
        held = np.minimum(np.arange(len(share)), self._replica.slots)
        return latencies_of(
            self._ttfts(ahead, random), self._gaps(share, random), refused, float(share @ rows[held])
        )

    def _occupied(self, held: int, ends: float) -> Occupied:
        """
        Args:
            ends: sequences that end in a step.
        """
        load, replica = self._workload, self._replica
        decoding = load.tokens - 1
        if held == 1:  # its prompt is computed while nothing decodes
            chunks = math.ceil(load.prompt / replica.chunk)
            alone, decode = self._pass(0, load.prompt / chunks), self._pass(1, 0)
            return Occupied(1, decode, alone, 0.0, 1 / (chunks * alone + decoding * decode))
        rows, mixed = ends * decoding, ends * self._chunks
        both, decode = self._pass(rows, load.prompt / self._chunks), self._pass(rows, 0)
        return Occupied(rows, decode, both, mixed, ends / (mixed * both + (1 - mixed) * decode))

    def _ends(self) -> list[float]:
        """Sequences that end in a step while 1, 2, … hold slots: mean value analysis of a closed network.

        Sequences go round between a queue, in which one prompt at a time takes ``chunks`` steps, and a delay
        of a step for each token but the first. An arriving prompt meets the queue of a network with one
        sequence less (arrival theorem), of which the one being computed is on average half done.
        """
        found, queue, used = list[float](), 0.0, 0.0
        for held in range(1, self._replica.slots + 1):
            in_queue = self._chunks * (1 + queue - used / 2)
            ends = min(held / (in_queue + self._workload.tokens - 1), 1 / self._chunks)
            queue, used = ends * in_queue, ends * self._chunks
            found.append(ends)
        return found

    def _pass(self, rows: float, chunk: float) -> float:
        """Mean seconds, HTTP's included, between the next smaller and larger whole sizes."""
        load, low, size = self._workload, math.floor(rows), max(round(chunk), 0)
        keys = load.prompt + load.tokens / 2
        pairs = rows * keys + size * load.prompt / 2
        lower, upper = (self._size(count, size, pairs) for count in (low, low + 1))
        seconds = lower + (rows - low) * (upper - lower)
        tokens = rows + size / load.prompt  # the first token comes with the prompt's last chunk
        frontend = self._frontend
        free = max(1 - load.rate * frontend.request_seconds, 0.05)  # requests that arrive take the rest
        return (seconds * self._mean_noise + frontend.step_seconds + tokens * frontend.token_seconds) / free

    def _size(self, rows: int, chunk: int, pairs: float) -> float:
        if chunk and rows and not self._times.mixed:
            return self._times.seconds(0, chunk, 0) + self._times.seconds(rows, 0, pairs)
        return self._times.seconds(rows, chunk, pairs) if rows or chunk else 0.0

    def _stationary(self) -> Floats:
        """Probabilities of 0 … ``places`` requests; an arrival in the last is refused.

        Where all slots are held they fall as those of a queue with constant service times (M/D/c) do, since
        the requests are of one shape: by the factor of Tijms's geometric tail. That an arrival has to wait is
        hardly less probable with constant than with exponential times, so their sum stays as it is.
        """
        replica, load = self._replica, self._workload.rate
        rates = [self._states[min(held, replica.slots) - 1].rate for held in range(1, replica.places + 1)]
        ratios = np.array([load / rate for rate in rates])
        logarithms = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
        shares = np.exp(logarithms - logarithms.max())
        found: Floats = shares / shares.sum()
        if ratios[-1] < 1:
            tail = _tail(float(ratios[-1])) ** np.arange(replica.places - replica.slots + 1)
            found[replica.slots :] = found[replica.slots :].sum() * tail / tail.sum()
        return found

    def _ttfts(self, ahead: np.ndarray, random: np.random.Generator) -> Floats:
        """Wait for a slot, rest of the running step, wait for the prompts before, own prompt."""
        replica, times, one = self._replica, self._times, random.uniform(size=len(ahead))
        full = self._states[-1]
        queued = np.maximum(ahead - replica.slots + 1, 0)
        slot = np.where(queued > 0, queued - one, 0) / full.rate  # requests of one shape leave evenly
        held = np.minimum(ahead, replica.slots - 1)
        steps = np.array([0.0, *(state.step for state in self._states)])
        boths = np.array([0.0, *(state.both for state in self._states)])
        waiting = np.array([0.0, *(1 - state.rows / at for at, state in enumerate(self._states, 1))])
        prompts = random.binomial(held, waiting[held])
        before = np.maximum(prompts - random.uniform(size=len(ahead)), 0) * self._chunks * boths[held]
        residual = np.where((queued == 0) & (prompts == 0), one * steps[held], 0)
        chunks = np.where(held > 0, self._chunks, math.ceil(self._workload.prompt / replica.chunk))
        own = boths[held + 1] * chunks * _mean_of_draws(times.noise, chunks, random)
        total: Floats = slot + residual + before + own + self._frontend.request_seconds
        return total

    def _gaps(self, share: Floats, random: np.random.Generator) -> Floats:
        """Seconds of the steps that tokens come from, but each request's first."""
        if self._workload.tokens == 1:
            return np.array([])
        held = np.minimum(np.arange(1, len(share)), self._replica.slots) - 1
        tokens = np.array([self._states[at].rows / self._states[at].step for at in held]) * share[1:]
        at = held[random.choice(len(tokens), _DRAWS, p=tokens / tokens.sum())]
        decode = np.array([state.decode for state in self._states])[at]
        both = np.array([state.both for state in self._states])[at]
        mixed = np.array([state.mixed for state in self._states])[at]
        median = np.where(random.uniform(size=_DRAWS) < mixed, both, decode) / self._mean_noise
        found: Floats = median * random.choice(self._times.noise, _DRAWS)
        return found


def _tail(load: float) -> float:
    """P(n + 1) ÷ P(n) of a long M/D/c queue: 1 / x for the x > 1 with load · (x − 1) = ln x."""
    low, high = 1.0, 2.0
    while load * (high - 1) < math.log(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if load * (middle - 1) < math.log(middle) else (low, middle)
    return 1 / high


def _mean_of_draws(noise: Floats, counts: np.ndarray, random: np.random.Generator) -> Floats:
    """The mean of ``counts`` successive passes' noise, relative to the mean of all."""
    starts = random.integers(max(len(noise) - int(counts.max()), 1), size=len(counts))
    sums = np.concatenate([[0.0], np.cumsum(noise)])
    ends = np.minimum(starts + counts, len(noise))
    found: Floats = (sums[ends] - sums[starts]) / (ends - starts) / noise.mean()
    return found
