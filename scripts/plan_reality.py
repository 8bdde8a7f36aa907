"""A server under Poisson arrivals, in turn with the calibration of its step times.

The speed of a shared host drifts within minutes by more than what is to be told apart. So each round of the
calibration is followed by a segment of the load, and both meet the same host on average. The server computes
on one core and is loaded from another; calibration and load never run at the same time.
"""

import asyncio
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

import loaders
from loaders.base import LoadedModel
from loaders.checkpoint import open_checkpoint
from server.bench.http.client import Answer, Client
from server.bench.http.own_server import own_server
from server.bench.http.texts import Texts
from server.host.threads import run_in_own_thread
from server.planning.calibration import SLOTS, Calibration, Calibrator
from server.planning.simulation import WARM_UP, Served, Simulated, poisson
from server.planning.step_times import ROUNDS
from server.planning.workload import Replica
from server.settings.model import ModelSettings


@dataclass
class Reality:
    """What the server did, by segment, and how long its passes took in the same minutes."""

    segments: list[Simulated] = field(default_factory=list)
    cpus_of_others: list[float] = field(default_factory=list)
    """Of each segment: CPUs that neither the server nor the load used."""
    calibration: Calibration | None = None


def arrivals_of(rate: float, seconds: float) -> list[list[float]]:
    """Of each segment, in seconds from its start; ``seconds``: of all together."""
    count = round(rate * seconds / ROUNDS)
    return [poisson(rate, count, seed=11 + number) for number in range(ROUNDS)]


def pooled(segments: Sequence[Simulated]) -> Simulated:
    """One result of all segments, each of which began with an empty server."""
    return Simulated(
        [request for one in segments for request in one.requests], sum(one.seconds for one in segments)
    )


async def reality(options: Namespace, settings: ModelSettings, rate: float) -> Reality:
    """An open loop against a server of its own."""
    found, segments = Reality(), arrivals_of(rate, options.seconds)
    os.sched_setaffinity(0, {options.server_core})  # of what is started from here on
    model = _loaded(options, settings)
    replica = Replica(options.slots)
    calibrator = Calibrator(model, 1, replica.chunk, replica.busy_chunk)
    async with own_server(settings, options.precision, options.slots, 1) as client:
        os.sched_setaffinity(0, {options.client_core})
        count = sum(map(len, segments)) + options.slots
        texts = iter(await Texts(client).get(count, options.prompt, distinct=count))
        for _ in range(options.slots):  # warms up
            await client.stream(next(texts), options.tokens, None)

        async def segment() -> None:
            os.sched_setaffinity(0, {options.client_core})
            arrivals = segments[len(found.segments)]
            others, begun = others_seconds(), time.perf_counter()
            found.segments.append(
                await _offer(client, arrivals, [next(texts) for _ in arrivals], options.tokens)
            )
            used = others_seconds() - others
            found.cpus_of_others.append(used / (time.perf_counter() - begun))
            os.sched_setaffinity(0, {options.server_core})

        os.sched_setaffinity(0, {options.server_core})
        found.calibration = await calibrator.measure(lambda *_: None, segment)
    return found


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
