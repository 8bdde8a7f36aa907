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
from server.planning.workload import Frontend, Replica
from server.settings.model import ModelSettings

STREAMS, TOKENS, PROMPT, ROUNDS = 8, 48, 64, 4


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
        BenchError
    """
    half = (await client.ask("GET", "/info"))["max_total_tokens"] // 2
    prompt, tokens = min(PROMPT, half), min(TOKENS, half)
    count = ROUNDS * (2 + STREAMS)
    waiting = iter(await Texts(client).get(count, prompt, distinct=count))

    async def together(count: int) -> list[Answer]:
        running = [client.stream(next(waiting), tokens, precision) for _ in range(count)]
        found = await asyncio.gather(*running)
        answers = [answer for answer in found if not answer.error]
        if not answers:
            raise BenchError(f"the server answered no request: {found[0].error}")
        return answers

    await together(2)  # warms up
    ttfts, single, several = list[float](), list[float](), list[float]()
    for _ in range(ROUNDS):
        alone = await together(1)
        ttfts += [answer.ttft for answer in alone]
        single += _gaps(alone)
        several += _gaps(await together(STREAMS))

    def beyond(gaps: list[float], rows: int) -> float:
        return median(gaps) - times.seconds(rows, 0, rows * (prompt + tokens / 2))

    one, all_ = max(beyond(single, 1), 0.0), max(beyond(several, STREAMS), 0.0)
    per_token = max(all_ - one, 0.0) / (STREAMS - 1)
    first = median(ttfts) - prefill_alone(times, replica, prompt)
    return Frontend(max(first, 0.0), max(one - per_token, 0.0), per_token)


def _gaps(answers: list[Answer]) -> list[float]:
    """Seconds between tokens while all of them decode."""
    begin = max(answer.arrivals[0] for answer in answers)
    return [b - a for one in answers for a, b in pairwise([time for time in one.arrivals if time >= begin])]


def prefill_alone(times: StepTimes, replica: Replica, prompt: int) -> float:
    """Median seconds of a prompt's chunks while nothing else runs."""
    starts = range(0, prompt, replica.chunk)
    sizes = [min(replica.chunk, prompt - start) for start in starts]
    return sum(
        times.seconds(0, size, size * (start + size / 2)) for start, size in zip(starts, sizes, strict=True)
    )
