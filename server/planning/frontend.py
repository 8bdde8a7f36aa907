"""What HTTP adds to the engine's times, measured on a server of its own.

The client computes on the server's CPUs, unless the caller has set other ones, so its time is part of it.
"""

import asyncio
from itertools import pairwise
from statistics import median

from server.bench.errors import BenchError
from server.bench.http.client import Answer, Client
from server.bench.http.own_server import own_server
from server.bench.http.texts import Texts
from server.planning.step_times import StepTimes
from server.planning.workload import MILLISECONDS, Frontend, Replica
from server.settings.model import ModelSettings

STREAMS, TOKENS, PROMPT, ROUNDS = 8, 48, 64, 4
ALONE = 4  # requests one after another, in each round


async def measure_frontend(
    settings: ModelSettings, precision: str, times: StepTimes, replica: Replica
) -> Frontend:
    """
    Args:
        precision: what the server runs; ``times`` are its.

    Raises:
        BenchError
    """
    async with own_server(settings, precision, STREAMS, settings.resolved_threads()) as client:
        return await measure_on(client, precision, times, replica)


async def measure_on(client: Client, precision: str | None, times: StepTimes, replica: Replica) -> Frontend:
    """As ``measure_frontend``, on a running server of ``STREAMS`` slots or more.

    Raises:
        BenchError: a request failed.
    """
    half = (await client.ask("GET", "/info"))["max_total_tokens"] // 2
    prompt, tokens = min(PROMPT, half), min(TOKENS, half)
    count = 2 + ROUNDS * (ALONE + STREAMS)
    waiting = iter(await Texts(client).get(count, prompt, distinct=count))

    async def together(count: int) -> list[Answer]:
        found = [client.stream(next(waiting), tokens, precision) for _ in range(count)]
        answers = await asyncio.gather(*found)
        for answer in answers:
            if answer.error:
                raise BenchError(f"a request to the measured server failed: {answer.error}")
        return answers

    await together(2)  # warms up
    prefills, around, single, several = list[float](), list[float](), list[float](), list[float]()
    for _ in range(ROUNDS):
        for _ in range(ALONE):
            alone = await together(1)
            prefills += [_in_the_engine(answer, "prefill_ms") for answer in alone]
            around += [answer.ttft - _in_the_engine(answer, "queue_ms", "prefill_ms") for answer in alone]
            single += _gaps(alone)
        several += _gaps(await together(STREAMS))

    # the host may be slower or faster than it was while the passes were calibrated
    drift = median(prefills) / times.prefill_seconds(prompt, replica.chunk)

    def beyond(gaps: list[float], rows: int) -> float:
        return median(gaps) / drift - times.seconds(rows, 0, rows * (prompt + tokens / 2))

    one, all_ = max(beyond(single, 1), 0.0), max(beyond(several, STREAMS), 0.0)
    per_token = max(all_ - one, 0.0) / (STREAMS - 1)
    return Frontend(max(median(around), 0.0), max(one - per_token, 0.0), per_token)


def _in_the_engine(answer: Answer, *stages: str) -> float:
    """Seconds of stages of a request by the server's own clock.

    A request's first token minus these is what HTTP adds. Minus the calibrated prefill it would be mostly the
    host's drift between the two measurements.
    """
    timings: dict[str, float] = answer.last["timings"]
    return sum(timings[stage] for stage in stages) / MILLISECONDS


def _gaps(answers: list[Answer]) -> list[float]:
    """Seconds between tokens while all of them decode."""
    begin = max(answer.arrivals[0] for answer in answers)
    return [b - a for one in answers for a, b in pairwise([time for time in one.arrivals if time >= begin])]
