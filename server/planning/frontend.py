"""What HTTP adds to the engine's times, measured on a server of its own.

The client computes on the server's CPUs, unless the caller has set other ones, so its time is part of it.
"""

import asyncio
from itertools import pairwise
from statistics import median

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
    """As ``measure_frontend``, on a running server of ``STREAMS`` slots or more."""
    texts = await Texts(client).get(ROUNDS * (2 + STREAMS), PROMPT, distinct=ROUNDS * (2 + STREAMS))
    waiting = iter(texts)

    async def together(count: int) -> list[Answer]:
        found = [client.stream(next(waiting), TOKENS, precision) for _ in range(count)]
        return [answer for answer in await asyncio.gather(*found) if not answer.error]

    await together(2)  # warms up
    ttfts, gaps = list[float](), list[float]()
    for _ in range(ROUNDS):
        alone = await together(1)
        ttfts += [answer.ttft for answer in alone]
        answers = await together(STREAMS)
        begin = max(answer.arrivals[0] for answer in answers)
        for answer in answers:  # gaps while all of them decode
            inner = [time for time in answer.arrivals if time >= begin]
            gaps += [b - a for a, b in pairwise(inner)]
    keys = PROMPT + TOKENS / 2
    decode = times.seconds(STREAMS, 0, STREAMS * keys)
    return Frontend(
        max(median(ttfts) - prefill_alone(times, replica, PROMPT), 0.0),
        max(median(gaps) - decode, 0.0) / STREAMS,
    )


def prefill_alone(times: StepTimes, replica: Replica, prompt: int) -> float:
    """Median seconds of a prompt's chunks while nothing else runs."""
    starts = range(0, prompt, replica.chunk)
    sizes = [min(replica.chunk, prompt - start) for start in starts]
    return sum(
        times.seconds(0, size, size * (start + size / 2)) for start, size in zip(starts, sizes, strict=True)
    )
