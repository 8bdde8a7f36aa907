"""The formulas beside the simulation of the real scheduler, whose step times they share."""

import pytest

from server.planning.formulas import SteadyState
from server.planning.simulation import capacity, simulate
from server.planning.workload import Frontend, Latencies, Replica, Workload
from tests.planning.measured import pass_seconds, step_times

SHAPE = Workload(1, 64, 48)


def both(load: float, slots: int) -> tuple[Latencies, Latencies]:
    times, replica = step_times(noise=(0.95, 1.0, 1.05, 1.4)), Replica(slots, places=1000)
    workload = SHAPE.at(load * capacity(times, SHAPE, replica))
    simulated = simulate(times, workload, replica, requests=3000).latencies()
    return SteadyState(times, workload, replica).latencies(), simulated


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16])
def test_the_capacity_is_that_of_the_simulation(slots: int) -> None:
    found = SteadyState(step_times(), SHAPE, Replica(slots)).capacity
    assert found == pytest.approx(capacity(step_times(), SHAPE, Replica(slots)), rel=0.06)


@pytest.mark.parametrize(("load", "slots"), [(0.3, 4), (0.6, 4), (0.6, 8), (0.8, 8)])
def test_latencies_are_near_those_of_the_simulation(load: float, slots: int) -> None:
    formulas, simulated = both(load, slots)
    assert formulas.itl_p50 == pytest.approx(simulated.itl_p50, rel=0.25)
    assert formulas.itl_p99 == pytest.approx(simulated.itl_p99, rel=0.15)
    assert formulas.ttft_p50 == pytest.approx(simulated.ttft_p50, rel=0.25)
    assert formulas.ttft_p99 == pytest.approx(simulated.ttft_p99, rel=0.5)  # for screening alone
    assert formulas.rows == pytest.approx(simulated.rows, rel=0.2)


def test_a_request_with_hardly_any_load_takes_its_own_passes() -> None:
    added = Frontend(request_seconds=0.01)
    found = SteadyState(step_times(), SHAPE.at(1e-4), Replica(4), added).latencies()
    assert found.ttft_p50 == pytest.approx(0.01 + pass_seconds(0, 64), rel=0.02)
    assert found.itl_p50 == pytest.approx(pass_seconds(1, 0), rel=1e-4)


def test_above_the_capacity_the_places_bound_the_queue() -> None:
    replica = Replica(4, places=20)
    most = SteadyState(step_times(), SHAPE, replica).capacity
    found = SteadyState(step_times(), SHAPE.at(2 * most), replica).latencies()
    assert found.refused == pytest.approx(0.5, abs=0.01)
    assert found.ttft_p99 < 20 / most
