"""The lumped chain against theory, and against the event simulation that it is reduced from."""

from collections.abc import Callable

import numpy as np
import pytest

from server.planning.aggregate import POINTS, Aggregate, aggregate
from server.planning.fleet import Faults, Fleet
from server.planning.simulation import Policy, Simulation, capacity, poisson
from server.planning.workload import Replica, Workload
from tests.planning.measured import step_times

LEVELS = 60


def single(rate: float = 1.0) -> Aggregate:
    """A replica that serves one request at a time, in exponential times."""
    rates = np.full(LEVELS, rate)
    rates[0] = 0
    flat = np.ones((LEVELS, POINTS))
    return Aggregate(rates, flat * np.arange(LEVELS)[:, None], flat, rates)


@pytest.mark.parametrize(
    ("policy", "exponent"), [("random", lambda k: k), ("two choices", lambda k: 2**k - 1)]
)
def test_queues_are_as_long_as_theory_says(policy: Policy, exponent: Callable[[int], int]) -> None:
    """The share with k requests or more: ρ^k at random, ρ^(2^k − 1) with two choices (Mitzenmacher 1996)."""
    fleet = Fleet(single(), 20_000, LEVELS - 1, policy, tick=0.01)
    fleet.run(lambda now: 0.7 * 20_000, 40, 40)
    (window,) = fleet.run(lambda now: 0.7 * 20_000, 20, 20)
    above = np.cumsum(window.occupied[::-1])[::-1] / window.occupied.sum()
    for k in (1, 2, 3):
        assert above[k] == pytest.approx(0.7 ** exponent(k), rel=0.1)


def test_no_replica_and_no_request_is_lost() -> None:
    fleet = Fleet(single(), 500, 4, "two choices", tick=0.05)
    (window,) = fleet.run(lambda now: 900.0, 30, 30)
    assert fleet.counts.sum() == 500
    assert window.arrivals == window.found.sum() + window.refused
    assert window.refused / window.arrivals > 0.3  # 900 arrive a second, and 500 end


def test_failed_replicas_come_back_and_their_requests_are_sent_again() -> None:
    faults = Faults(mean_between=1e9, restart=10.0, outages=((5.0, 0.5),))
    fleet = Fleet(single(), 1000, 50, "least loaded", faults)
    before, during, after = fleet.run(lambda now: 400.0, 30, 10)
    assert before.serving == pytest.approx(750, rel=0.05)
    assert during.serving == pytest.approx(750, rel=0.05)
    assert after.serving == pytest.approx(1000)
    assert before.retried == pytest.approx(1000 * 0.5 * 0.4, rel=0.2)


def test_a_tick_in_which_many_would_end_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        Fleet(single(30), 10, 5, "random", tick=0.05)


def test_the_chain_finds_what_the_events_show() -> None:
    times, shape, replica = step_times(noise=(0.9, 1.0, 1.1)), Workload(1, 32, 24), Replica(4, places=40)
    most = capacity(times, shape, replica)
    runs = [
        Simulation(times, shape, replica).run(poisson(load * most, 1000, seed))
        for seed, load in enumerate((0.3, 0.6, 0.8, 0.95, 1.1))
    ]
    one = aggregate(runs, replica.slots, replica.places + 1)
    assert one.rates[-1] == pytest.approx(most, rel=0.1)
    rate = 0.7 * most * 6
    events = Simulation(times, shape, replica, replicas=6, policy="two choices").run(poisson(rate, 2500, 1))
    fleet = Fleet(one, 6, replica.places, "two choices", tick=0.2 / one.rates.max())
    fleet.run(lambda now: rate, 10, 10)
    (window,) = fleet.run(lambda now: rate, 200, 200)
    chained, found = window.latencies(one), events.latencies()
    assert chained.ttft_p50 == pytest.approx(found.ttft_p50, rel=0.3)
    assert chained.itl_p50 == pytest.approx(found.itl_p50, rel=0.15)
    assert chained.itl_p99 == pytest.approx(found.itl_p99, rel=0.15)
