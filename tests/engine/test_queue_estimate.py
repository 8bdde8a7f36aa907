"""Queue estimates from recent steps, and queues with a deadline on a simulated clock."""

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from server.engine.queue_estimate import QueueEstimate
from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, Sequence, StepStats

STEP, SLOTS, CHUNK, TIMEOUT, SECONDS = 0.05, 4, 16, 10.0, 300
CAPACITY = SLOTS / STEP
"""Tokens a second."""


def sequence(tokens: int, prompt: int = 1, done: int = 0) -> Sequence:
    made = Sequence([1] * prompt, SamplingParams(max_new_tokens=tokens))
    if done:
        made.prefilled, made.generated = prompt, [1] * done
    return made


def step(*gaps: float) -> StepStats:
    return StepStats(batch=len(gaps), prompt_tokens=0, generated_tokens=len(gaps), seconds=0.0, gaps=gaps)


def measured(share: float = 1.0) -> QueueEstimate:
    estimate = QueueEstimate(slots=2, prefill_chunk=16)
    estimate.observe_step(step(0.1, 0.1))
    estimate.observe_end(sequence(100, done=round(100 * share)))
    return estimate


def test_no_estimate_before_the_first_measurement() -> None:
    estimate, ahead = QueueEstimate(slots=1, prefill_chunk=16), [sequence(100)] * 9
    assert estimate.finish_seconds(ahead, 1, 10) is None
    estimate.observe_step(step())
    estimate.observe_step(step(0.1))
    assert estimate.finish_seconds(ahead, 1, 10) is None
    estimate.observe_end(sequence(10))  # cancelled before its first token
    assert estimate.finish_seconds(ahead, 1, 10) is None
    assert estimate.drain_seconds(ahead) is None
    estimate.observe_end(sequence(10, done=10))
    assert estimate.finish_seconds(ahead, 1, 10) is not None
    assert estimate.drain_seconds([]) == 0


def test_no_estimate_while_a_slot_is_free() -> None:
    assert measured().finish_seconds([sequence(10**6)], 10**6, 10**6) is None


@pytest.mark.parametrize(
    ("ahead", "asked", "steps"),
    [
        ([(30, 0), (50, 0)], (1, 10), 31 + 1 + 10),  # behind the shorter one
        ([(30, 20), (50, 10)], (1, 10), 10 + 1 + 10),  # partly computed
        ([(30, 29), (50, 49), (5, 0), (8, 0)], (1, 10), 1 + 6 + 1 + 10),  # first come, first served
    ],
)
def test_an_estimate_counts_steps(ahead: list[tuple[int, int]], asked: tuple[int, int], steps: int) -> None:
    live = [sequence(tokens, done=done) for tokens, done in ahead]
    assert measured().finish_seconds(live, *asked) == pytest.approx(steps * 0.1 * 1.05)


def test_prompts_share_the_budget_of_a_step() -> None:
    live = [sequence(1, prompt=160), sequence(1, prompt=160)]
    assert measured().finish_seconds(live, 160, 1) == pytest.approx((30 + 1) * 0.1 * 1.05)


def test_sequences_that_end_early_are_counted_in() -> None:
    live = [sequence(100, done=50), sequence(100, done=50)]
    assert measured(share=0.5).finish_seconds(live, 1, 20) == pytest.approx((25 + 1 + 10) * 0.1 * 1.05)
    assert measured(share=0.5).drain_seconds(live) == pytest.approx(25 * 0.1)


class Simulation:
    """An engine's queue with a deadline: the real scheduler and estimate, a clock that steps advance."""

    def __init__(self, sheds: bool) -> None:
        self.sheds, self.now = sheds, 0.0
        self.scheduler, self.estimate = Scheduler(SLOTS, 128, CHUNK), QueueEstimate(SLOTS, CHUNK)
        self.live: dict[Sequence, int] = {}
        self.outcomes: Counter[str] = Counter()

    def ask(self, tokens: int, length: int) -> None:
        """A request for ``tokens``, of which the model generates ``length``."""
        seconds = self.estimate.finish_seconds(self.live, 1, tokens) if self.sheds else None
        if seconds is not None and seconds > TIMEOUT:
            self.outcomes["refused"] += 1
            return
        new = Sequence([1], SamplingParams(max_new_tokens=tokens), deadline=self.now + TIMEOUT)
        self.live[new] = length
        self.scheduler.add(new)

    def step(self, seconds: float) -> None:
        plan = self.scheduler.schedule(self.now)
        for late in plan.expired:
            self._end(late, "late")
        for chunk in plan.chunks:
            chunk.sequence.prefilled += chunk.length
        self.now += seconds
        for one in [*plan.rows, *(chunk.sequence for chunk in plan.chunks)]:
            one.generated.append(1)
            if len(one.generated) == self.live[one]:
                self.outcomes["tokens"] += len(one.generated)
                self.scheduler.finish(one)
                self._end(one, "served")
        if self.scheduler.waiting:
            self.estimate.observe_step(step(*[seconds] * len(plan.rows)))

    def _end(self, sequence: Sequence, outcome: str) -> None:
        self.outcomes[outcome] += 1
        del self.live[sequence]
        self.estimate.observe_end(sequence, late=outcome == "late")


Workload = Callable[[Random], tuple[int, int]]
"""Draws the requested and the generated number of tokens."""


def alike(random: Random) -> tuple[int, int]:
    return 40, 40


def mixed(random: Random) -> tuple[int, int]:
    tokens = random.choice([5, 20, 40, 100])
    return tokens, tokens


def early(random: Random) -> tuple[int, int]:
    return 64, random.randint(1, 64)


def outcomes(load: float, workload: Workload, *, sheds: bool = True, noise: float = 0.0) -> Counter[str]:
    """The outcomes of requests in 300 seconds at ``load`` times the capacity."""
    simulation, random, offered = Simulation(sheds), Random(1), 0.0
    while simulation.now < SECONDS:
        offered += load * SLOTS
        while offered > 0:
            tokens, length = workload(random)
            offered -= length
            simulation.ask(tokens, length)
        simulation.step(STEP * random.uniform(1 - noise, 1 + noise))
    return simulation.outcomes


@pytest.mark.parametrize("workload", [alike, mixed, early])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_under_overload_admitted_requests_finish_in_time(workload: Workload, noise: float) -> None:
    done = outcomes(1.5, workload, noise=noise)
    assert done["tokens"] > 0.9 * CAPACITY * SECONDS
    assert done["late"] < 0.05 * done["served"]
    assert done["refused"] > 50


@pytest.mark.parametrize("workload", [alike, mixed, early])
def test_without_shedding_most_work_is_wasted(workload: Workload) -> None:
    """The purpose of the estimate; if this fails, the simulation proves nothing."""
    done = outcomes(1.5, workload, sheds=False)
    assert done["tokens"] < 0.6 * CAPACITY * SECONDS


@pytest.mark.parametrize("workload", [alike, mixed, early])
def test_a_request_that_can_finish_in_time_is_not_refused(workload: Workload) -> None:
    done = outcomes(0.8, workload, noise=0.5)
    assert (done["refused"], done["late"]) == (0, 0)
