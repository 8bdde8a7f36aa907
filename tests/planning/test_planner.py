from dataclasses import replace
from functools import cache

import pytest

from server.planning import formulas, planner
from server.planning.planner import Choice, Impossible, Planner
from server.planning.simulation import simulate
from server.planning.workload import Frontend, Objectives, Replica, Workload
from tests.planning.measured import calibration

SHAPE = Workload(40, 64, 32)


@pytest.fixture(autouse=True)
def _short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_MOST", 800)
    monkeypatch.setattr(formulas, "_DRAWS", 8000)


@cache
def plan(rate: float, objectives: Objectives) -> Choice | Impossible:
    return Planner(calibration(), SHAPE.at(rate), objectives, Replica(1), Frontend()).plan()


def test_a_plan_meets_its_objectives_and_one_step_less_does_not() -> None:
    objectives = Objectives(ttft_ms=300, itl_ms=30)
    found = plan(40, objectives)
    assert isinstance(found, Choice)
    assert found.simulated.meets(objectives)
    assert 0 < found.load < 1
    times, replica = calibration().step_times(), Replica(found.slots)
    fewer = SHAPE.at(40 / (found.replicas - 1))
    assert not simulate(times, fewer, replica, requests=800).latencies().meets(objectives)


def test_more_requests_need_more_replicas_and_tighter_objectives_too() -> None:
    loose, tight = Objectives(2000, 40), Objectives(120, 40)
    small, large, strict = plan(20, loose), plan(80, loose), plan(80, tight)
    assert isinstance(small, Choice)
    assert isinstance(large, Choice)
    assert isinstance(strict, Choice)
    assert small.replicas < large.replicas < strict.replicas


def test_a_short_time_between_tokens_makes_batches_small() -> None:
    wide, narrow = plan(40, Objectives(2000, 60)), plan(40, Objectives(2000, 16))
    assert isinstance(wide, Choice)
    assert isinstance(narrow, Choice)
    assert narrow.slots < wide.slots


def test_what_is_too_slow_alone_is_impossible_and_says_why() -> None:
    found = plan(40, Objectives(2000, 4))
    assert isinstance(found, Impossible)
    assert "between tokens" in found.reason
    assert found.idle.itl_p99 == pytest.approx(0.005)
    first = plan(40, Objectives(10, 100))
    assert isinstance(first, Impossible)
    assert "first token" in first.reason


def test_memory_is_weights_and_whole_blocks_of_full_slots() -> None:
    found = plan(40, Objectives(2000, 60))
    assert isinstance(found, Choice)
    assert found.memory_bytes == 10_000_000 + found.slots * 96 * 1000


def test_no_batch_is_larger_than_the_memory_for_it() -> None:
    def within(room: int) -> Choice | Impossible:
        goals = Objectives(2000, 60)
        return Planner(calibration(), SHAPE.at(40), goals, Replica(1), Frontend(), room).plan()

    free = plan(40, Objectives(2000, 60))
    assert isinstance(free, Choice)
    least = within(free.memory_bytes)
    assert isinstance(least, Choice)
    assert least.slots == free.slots
    smaller = within(free.memory_bytes - 1)
    assert isinstance(smaller, Choice)
    assert smaller.slots < free.slots
    assert smaller.replicas >= free.replicas
    assert isinstance(within(10_000_000), Impossible)


def test_costs_are_those_of_the_generated_tokens() -> None:
    found = plan(40, Objectives(2000, 60))
    assert isinstance(found, Choice)
    one = replace(found, replicas=3)
    assert one.cost_per_million_tokens(2.0, 32) == pytest.approx(3 * 2.0 / (40 * 32 * 3600 / 1e6))


@pytest.mark.parametrize(
    "noise",
    [pytest.param((1.0,), marks=pytest.mark.slow, id="none"), pytest.param((1.0, 1.0, 1.0, 2.5), id="some")],
)
def test_no_objective_that_is_tighter_needs_fewer_replicas(noise: tuple[float, ...]) -> None:
    def replicas(rate: float, ttft: float, itl: float) -> int:
        found = Planner(
            calibration(noise=noise), SHAPE.at(rate), Objectives(ttft, itl), Replica(1), Frontend()
        ).plan()
        assert isinstance(found, Choice)
        return found.replicas

    by_ttft = [replicas(60, ttft, 60) for ttft in (4000, 1000, 400, 250)]
    by_itl = [replicas(60, 2000, itl) for itl in (90, 60, 40)]
    by_rate = [replicas(rate, 1000, 60) for rate in (1, 7, 60, 300)]
    assert by_ttft == sorted(by_ttft)
    assert by_itl == sorted(by_itl)
    assert by_rate == sorted(by_rate)
