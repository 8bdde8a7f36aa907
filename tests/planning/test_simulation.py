"""The simulation against the real engine, known queues, and its own rules."""

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from server.planning.simulation import Policy, Simulation, capacity, poisson
from server.planning.workload import Frontend, Objectives, Replica, Workload
from tests.fakes import FakeRunner, fake_model
from tests.planning.measured import pass_seconds, step_times

ALONE = Workload(0.1, 64, 8)


def test_one_request_alone_takes_its_passes() -> None:
    found = Simulation(step_times(), ALONE, Replica(4)).run([1.0])
    (request,) = found.requests
    assert request.ttft == pytest.approx(pass_seconds(0, 64))
    assert request.gaps == pytest.approx([pass_seconds(1, 0)] * 7)


def test_a_prompt_beside_rows_is_computed_in_small_chunks_with_them() -> None:
    found = Simulation(step_times(), Workload(1, 64, 40), Replica(4)).run([0.0, 0.1])
    first, second = found.requests
    beside = pass_seconds(1, 16)
    assert sum(gap == pytest.approx(beside) for gap in first.gaps) == 4
    assert second.ttft == pytest.approx(4 * beside, abs=pass_seconds(1, 0))


def test_without_a_mixed_pass_prompt_and_rows_take_one_each() -> None:
    found = Simulation(step_times(mixed=False), Workload(1, 16, 40), Replica(4)).run([0.0, 0.1])
    longest = max(found.requests[0].gaps)
    assert longest == pytest.approx(pass_seconds(0, 16) + pass_seconds(1, 0))


def test_http_adds_to_the_first_token_and_to_every_row() -> None:
    added = Frontend(request_seconds=0.02, token_seconds=0.001)
    (request,) = Simulation(step_times(), ALONE, Replica(4), added).run([0.0]).requests
    assert request.ttft == pytest.approx(0.02 + pass_seconds(0, 64) + 0.001)
    assert request.gaps == pytest.approx([pass_seconds(1, 0) + 0.001] * 7)


def test_requests_beyond_the_places_are_refused_and_beyond_the_slots_wait() -> None:
    found = Simulation(step_times(), ALONE, Replica(slots=2, places=5)).run([0.0] * 3 + [0.001] * 4)
    assert sum(one.refused for one in found.requests) == 2
    ttfts = sorted(found.ttfts)
    assert len(ttfts) == 5
    assert ttfts[-1] > 2 * ttfts[0]


def test_what_cannot_be_finished_in_time_is_refused_once_that_is_known() -> None:
    replica = Replica(slots=1, places=10_000, timeout=2.0)
    found = Simulation(step_times(), Workload(1, 16, 64), replica).run(poisson(20, 400, 1))
    assert found.latencies().refused > 0.5
    assert max(one.times[-1] - one.arrived for one in found.finished if len(one.times) == 64) < 2.1


def test_what_is_not_finished_in_time_is_refused_too() -> None:
    impossible = Replica(slots=1, timeout=pass_seconds(0, 16))  # over after the prompt
    found = Simulation(step_times(), Workload(1, 16, 8), impossible).run([0.0, 10.0, 20.0, 30.0])
    assert found.finished == []
    assert found.latencies().refused == 1


def test_a_queue_with_one_slot_waits_by_lindleys_recursion() -> None:
    """Each wait is what remains of the wait and the service before; their mean is near M/D/1's."""
    shape = Workload(0, 16, 10)
    service, load = pass_seconds(0, 16) + 9 * pass_seconds(1, 0), 0.6
    arrivals = poisson(load / service, 3000, seed=3)
    waits = [0.0]
    for before, arrived in pairwise(arrivals):
        waits.append(max(waits[-1] + service - (arrived - before), 0.0))
    found = Simulation(step_times(), shape, Replica(1, places=10**6)).run(arrivals)
    assert found.ttfts == pytest.approx(np.array(waits[300:]) + pass_seconds(0, 16))
    assert np.mean(waits) == pytest.approx(service * load / (2 * (1 - load)), rel=0.2)


def test_the_capacity_of_one_slot_is_one_request_per_service() -> None:
    service = pass_seconds(0, 16) + 9 * pass_seconds(1, 0)
    assert capacity(step_times(), Workload(1, 16, 10), Replica(1)) == pytest.approx(1 / service, rel=0.01)


@pytest.mark.parametrize("policy", ["two choices", "least loaded"])
def test_a_router_that_looks_shortens_the_wait(policy: Policy) -> None:
    workload, replica = Workload(0, 16, 10), Replica(1)
    rate = 4 * 0.8 * capacity(step_times(), workload, replica)
    arrivals = poisson(rate, 1500, 2)

    def mean(chosen: Policy) -> float:
        fleet = Simulation(step_times(), workload, replica, replicas=4, policy=chosen)
        return float(fleet.run(arrivals).ttfts.mean())

    assert mean(policy) < 0.6 * mean("random")


def test_goodput_counts_what_is_within_both_limits() -> None:
    found = Simulation(step_times(), ALONE, Replica(4)).run([0.0, 10.0])
    fast = pass_seconds(1, 0) * 1000
    assert found.goodput(Objectives(1000, fast + 0.1)) == pytest.approx(2 / found.seconds)
    assert found.goodput(Objectives(1000, fast - 0.1)) == 0
    assert found.goodput(Objectives(1, 1000)) == 0


class _Timed(FakeRunner):
    """Takes what ``pass_seconds`` says; it has no mixed pass."""

    def _called(self) -> None:
        """Its hooks wait instead."""


async def _real(arrivals: Sequence[float], prompt: int, tokens: int, slots: int) -> list[list[float]]:
    runner = _Timed(slots, context=256)
    runner.on_prefill = lambda slot, ids: time.sleep(pass_seconds(0, len(ids)))
    runner.on_decode = lambda rows: time.sleep(pass_seconds(len(rows), 0))
    engine = Engine(fake_model(runner=runner), eos_ids=frozenset(), prefill_chunk=128, prefill_chunk_busy=16)
    await engine.start()
    begun = time.perf_counter()

    async def one(arrived: float) -> list[float]:
        await asyncio.sleep(begun + arrived - time.perf_counter())
        stream = engine.generate([1] * prompt, SamplingParams(tokens, ignore_eos=True))
        return [time.perf_counter() - begun async for _ in stream]

    times = await asyncio.gather(*(one(arrived) for arrived in arrivals))
    await engine.stop()
    return list(times)


def test_the_simulation_and_the_engine_end_requests_at_the_same_times() -> None:
    """With the same passes and arrivals: 20 requests for 3 slots, within what timers and threads add."""
    arrivals = poisson(8, 20, seed=4)
    real = asyncio.run(_real(arrivals, 48, 16, slots=3))
    run = Simulation(step_times(mixed=False), Workload(8, 48, 16), Replica(3))
    simulated = {round(one.arrived, 6): one.times for one in run.run(arrivals).requests}
    assert len(simulated) == 18  # the first tenth is left out
    late = [
        real[at][token] - simulated[round(arrived, 6)][token]
        for at, arrived in enumerate(arrivals)
        if round(arrived, 6) in simulated
        for token in (0, 15)
    ]
    assert np.median(np.abs(late)) < 0.1 * arrivals[-1]
