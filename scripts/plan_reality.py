"""A server, in turn with the calibration of its step times: what HTTP adds, and Poisson arrivals.

The speed of a shared host drifts within minutes by more than what is to be told apart. So each round of the
calibration is followed by a segment of the load, and both meet the same host on average. The server computes
on one core and is loaded from another; calibration and load never run at the same time.
"""

import asyncio
import os
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import psutil

import loaders
from loaders.base import LoadedModel
from loaders.checkpoint import open_checkpoint
from server.bench.http.client import Answer, Client
from server.bench.http.own_server import own_server
from server.bench.http.texts import Texts
from server.host.threads import run_in_own_thread
from server.planning.calibration import SLOTS, Calibration, Calibrator
from server.planning.frontend import FrontendRounds
from server.planning.simulation import WARM_UP, Served, Simulated, poisson
from server.planning.step_times import ROUNDS
from server.planning.workload import Frontend, Replica
from server.settings.model import ModelSettings

Ask = Callable[[], Awaitable[None]]


@dataclass
class Reality:
    """What the server did, by segment, and how long its passes took in the same minutes."""

    calibration: Calibration
    segments: list[Simulated]
    cpus_of_others: list[float]
    """Of each segment: CPUs that neither the server nor the load used."""


def arrivals_of(rate: float, seconds: float) -> list[list[float]]:
    """Of each segment, in seconds from its start; ``seconds``: of all together."""
    count = round(rate * seconds / ROUNDS)
    return [poisson(rate, count, seed=11 + number) for number in range(ROUNDS)]


def pooled(segments: Sequence[Simulated]) -> Simulated:
    """One result of all segments, each of which began with an empty server."""
    return Simulated(
        [request for one in segments for request in one.requests], sum(one.seconds for one in segments)
    )


async def calibrated(options: Namespace, settings: ModelSettings) -> tuple[Calibration, Frontend]:
    """Step times, and what HTTP adds to them."""
    measuring: list[FrontendRounds] = []

    async def begin(client: Client) -> Ask:
        rounds = FrontendRounds(client, None)
        measuring.append(rounds)
        await rounds.prepare()
        return rounds.round

    found = await _alternately(options, settings, begin)
    return found, measuring[0].frontend(found.step_times())


async def reality(options: Namespace, settings: ModelSettings, rate: float) -> Reality:
    """An open loop against a server of its own."""
    served, others_used, segments = list[Simulated](), list[float](), arrivals_of(rate, options.seconds)

    async def begin(client: Client) -> Ask:
        count = sum(map(len, segments)) + options.slots
        texts = iter(await Texts(client).get(count, options.prompt, distinct=count))
        for _ in range(options.slots):  # warms up
            await client.stream(next(texts), options.tokens, None)

        async def segment() -> None:
            arrivals = segments[len(served)]
            others, begun = others_seconds(), time.perf_counter()
            served.append(await _offer(client, arrivals, [next(texts) for _ in arrivals], options.tokens))
            others_used.append((others_seconds() - others) / (time.perf_counter() - begun))

        return segment

    return Reality(await _alternately(options, settings, begin), served, others_used)


async def _alternately(
    options: Namespace, settings: ModelSettings, begin: Callable[[Client], Awaitable[Ask]]
) -> Calibration:
    """Calibrates, and asks the server after each round as ``begin`` has prepared."""
    os.sched_setaffinity(0, {options.server_core})  # of what is started from here on
    replica = Replica(options.slots)
    calibrator = Calibrator(_loaded(options, settings), 1, replica.chunk, replica.busy_chunk)
    async with own_server(settings, options.precision, options.slots, 1) as client:
        os.sched_setaffinity(0, {options.client_core})
        ask = await begin(client)

        async def between() -> None:
            os.sched_setaffinity(0, {options.client_core})
            await ask()
            os.sched_setaffinity(0, {options.server_core})

        os.sched_setaffinity(0, {options.server_core})
        return await calibrator.measure(lambda *_: None, between)


def _loaded(options: Namespace, settings: ModelSettings) -> LoadedModel:
    spec = settings.spec(open_checkpoint(settings.model_id, None), slots=SLOTS)
    return run_in_own_thread(lambda: loaders.load(options.precision, spec), 1)


async def _offer(client: Client, arrivals: Sequence[float], texts: Sequence[str], tokens: int) -> Simulated:
    begun, sending = time.perf_counter(), list[asyncio.Task[Answer]]()
    for arrival, text in zip(arrivals, texts, strict=True):
        await asyncio.sleep(max(begun + arrival - time.perf_counter(), 0))
        sending.append(asyncio.create_task(client.stream(text, tokens, None)))
    answers = await asyncio.gather(*sending)
    served = [
        Served(one.sent - begun, 0, bool(one.error), [at - begun for at in one.arrivals]) for one in answers
    ]
    kept = served[int(WARM_UP * len(served)) :]
    ends = [one.times[-1] for one in kept if not one.refused]
    return Simulated(kept, max(ends) - kept[0].arrived)


def others_seconds() -> float:
    """CPU seconds of the host so far that are neither this process's nor its children's."""
    host, own = psutil.cpu_times(), psutil.Process()
    busy = sum(host) - host.idle - getattr(host, "iowait", 0.0) - getattr(host, "guest", 0.0)
    return float(busy - sum(sum(one.cpu_times()[:2]) for one in (own, *own.children(recursive=True))))
