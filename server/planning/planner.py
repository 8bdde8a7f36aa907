"""Which batch size and how many replicas: searched by formulas, then checked by simulation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from loaders.kv_cache.block_pool import BLOCK_TOKENS
from server.planning.calibration import ROWS, Calibration
from server.planning.formulas import SteadyState
from server.planning.simulation import simulate
from server.planning.step_times import StepTimes
from server.planning.workload import Frontend, Latencies, Objectives, Replica, Workload

_TOKENS, _LEAST, _MOST = 150_000, 400, 3000  # generated in a check; requests of it, at least and at most
_IDLE = 1e-3  # × a replica's capacity: a load at which nothing waits
_STEP = 0.02  # of the replicas, by which a check adds or removes some at first
_DOUBLINGS = 8
_HALVINGS = 14


@dataclass(frozen=True)
class Choice:
    """A precision and batch size that meets the objectives.

    Args:
        capacity: requests a second that one replica serves at most.
        memory_bytes: of one replica: weights, and keys and values of full slots.
        formulas, simulated: with ``replicas`` of them.
    """

    precision: str
    slots: int
    replicas: int
    capacity: float
    rate: float
    memory_bytes: int
    formulas: Latencies
    simulated: Latencies

    @property
    def load(self) -> float:
        """Requests a second ÷ what the replicas serve at most."""
        return self.rate / (self.replicas * self.capacity)

    @property
    def all_bytes(self) -> int:
        """Of all replicas."""
        return self.replicas * self.memory_bytes

    def cost_per_million_tokens(self, price_per_hour: float, tokens: int) -> float:
        """Of generated tokens.

        Args:
            price_per_hour: of one replica.
        """
        return price_per_hour * self.replicas / (self.rate * tokens * 3600) * 1e6


@dataclass(frozen=True)
class Impossible:
    """A precision that can't meet the objectives; ``idle``: one replica with almost no load."""

    precision: str
    idle: Latencies
    reason: str


class Planner:
    """Plans for one precision.

    Args:
        replica: its slots are replaced by those that are tried.
        room: bytes that a replica may take; None: no limit.
    """

    def __init__(
        self,
        calibration: Calibration,
        workload: Workload,
        objectives: Objectives,
        replica: Replica,
        frontend: Frontend,
        room: int | None = None,
    ) -> None:
        self._calibration, self._workload, self._objectives = calibration, workload, objectives
        self._replica, self._frontend, self._room = replica, frontend, room
        self._times: StepTimes = calibration.step_times()

    def plan(self) -> Choice | Impossible:
        """The choice of the fewest replicas, of these that of the smallest batch."""
        tried = [(self._most(slots), slots) for slots in self._sizes()]
        counted = [(math.ceil(self._workload.rate / most), slots) for most, slots in tried if most > 0]
        best: Choice | None = None
        for count, slots in sorted(counted):
            if best is not None and count >= best.replicas:
                break  # a simulation hardly finds fewer than the formulas
            if (choice := self._checked(slots, count)) is not None:
                best = choice if best is None or choice.replicas < best.replicas else best
        if best is not None:
            return best
        idle = self._formulas(self._workload.at(_IDLE), 1)
        return Impossible(self._calibration.precision, idle, self._reason(idle))

    def _sizes(self) -> Iterator[int]:
        measured = {cell.rows for cell in self._calibration.cells}
        return (slots for slots in ROWS if slots in measured and self._fits(slots))

    def _fits(self, slots: int) -> bool:
        return self._room is None or self._memory(slots) <= self._room

    def _most(self, slots: int) -> float:
        """Requests a second at which one replica still meets the objectives; 0 if it never does."""
        capacity = self._capacity(slots)
        if not self._meets(slots, _IDLE * capacity):
            return 0.0
        low, high = _IDLE * capacity, capacity
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._meets(slots, middle) else (low, middle)
        return low

    def _checked(self, slots: int, count: int) -> Choice | None:
        """The fewest replicas whose simulation meets the objectives, searched from the count of the formulas.

        To two in a hundred: a percentile of a simulation is not known better.
        """
        found: dict[int, Latencies] = {}

        def meets(replicas: int) -> bool:
            found[replicas] = self._simulated(slots, replicas)
            return found[replicas].meets(self._objectives)

        step = max(1, round(_STEP * count))
        enough, few = count, 0
        if meets(count):
            while enough > 1 and meets(max(enough - step, 1)):
                enough, step = max(enough - step, 1), 2 * step
            few = max(enough - step, 0)
        else:
            for _ in range(_DOUBLINGS):
                few, enough, step = enough, enough + step, 2 * step
                if meets(enough):
                    break
            else:
                return None
        while enough - few > max(1, _STEP * enough):
            middle = (enough + few) // 2
            enough, few = (middle, few) if meets(middle) else (enough, middle)
        return Choice(
            self._calibration.precision,
            slots,
            enough,
            self._capacity(slots),
            self._workload.rate,
            self._memory(slots),
            self._formulas(self._share(enough), slots),
            found[enough],
        )

    def _share(self, replicas: int) -> Workload:
        """Of one replica. A router that chooses at random splits a Poisson process into such ones."""
        return self._workload.at(self._workload.rate / replicas)

    def _formulas(self, workload: Workload, slots: int) -> Latencies:
        return SteadyState(self._times, workload, self._with(slots), self._frontend).latencies()

    def _simulated(self, slots: int, replicas: int) -> Latencies:
        requests = min(max(_TOKENS // self._workload.tokens, _LEAST), _MOST)
        return simulate(
            self._times, self._share(replicas), self._with(slots), self._frontend, requests
        ).latencies()

    def _capacity(self, slots: int) -> float:
        return SteadyState(self._times, self._workload, self._with(slots), self._frontend).capacity

    def _meets(self, slots: int, rate: float) -> bool:
        return self._formulas(self._workload.at(rate), slots).meets(self._objectives)

    def _with(self, slots: int) -> Replica:
        return replace(self._replica, slots=slots)

    def _memory(self, slots: int) -> int:
        tokens = self._workload.prompt + self._workload.tokens
        cached = math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS * slots
        return self._calibration.weights_bytes + round(cached * self._calibration.kv_token_bytes)

    def _reason(self, idle: Latencies) -> str:
        if not self._fits(1):
            needed, has = self._memory(1) / 1e6, (self._room or 0) / 1e6
            return f"with a batch of 1 it needs {needed:.0f} MB, and this host has {has:.0f} MB for it"
        if idle.ttft_p99 * 1000 > self._objectives.ttft_ms:
            return "its time to the first token is too long even alone"
        if idle.itl_p99 * 1000 > self._objectives.itl_ms:
            return "its time between tokens is too long even alone"
        return "too many requests would be refused, or not be finished within REQUEST_TIMEOUT"
