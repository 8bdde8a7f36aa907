"""What HTTP adds to the engine's times, measured on a server of its own.

The client computes on the server's CPUs, unless the caller has set other ones, so its time is part of it.
Where the engine is calibrated as well, that alternates with these rounds: a host's speed drifts within
minutes by more than HTTP costs, and decoding, bound by the memory, drifts apart from prompts, bound by cores.
"""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from server.bench.errors import BenchError
from server.bench.http.client import Answer, Client
from server.bench.http.own_server import own_server
from server.bench.http.texts import Texts
from server.planning.step_times import ROUNDS, StepTimes
from server.planning.workload import MILLISECONDS, Frontend
from server.settings.model import ModelSettings

STREAMS, TOKENS, PROMPT = 8, 48, 64
ALONE = 6  # requests one after another in each round, twice


class FrontendRounds:
    """Measures in ``ROUNDS`` rounds, between which the caller may measure something else.

    Args:
        client: of a running server of ``STREAMS`` slots or more.
        precision: what it is asked for; None: its default.
    """

    def __init__(self, client: Client, precision: str | None) -> None:
        self._client, self._precision = client, precision
        self._texts: Iterator[str] = iter(())
        self._prompt = self._tokens = 0
        self._around, self._single, self._several = list[float](), list[float](), list[float]()

    async def prepare(self) -> None:
        """Raises: BenchError."""
        half = (await self._client.ask("GET", "/info"))["max_total_tokens"] // 2
        self._prompt, self._tokens = min(PROMPT, half), min(TOKENS, half)
        count = 2 + ROUNDS * 2 * (ALONE + STREAMS)
        self._texts = iter(await Texts(self._client).get(count, self._prompt, distinct=count))
        await self._together(2)  # warms up

    async def round(self) -> None:
        """Raises: BenchError: a request failed."""
        for _ in range(2):
            for _ in range(ALONE):
                alone = await self._together(1)
                self._around += [answer.ttft - _in_the_engine(answer) for answer in alone]
                self._single += _gaps(alone)
            self._several += _gaps(await self._together(STREAMS))

    def frontend(self, times: StepTimes) -> Frontend:
        """Of what all rounds have measured; ``times``: the engine's."""

        def beyond(gaps: list[float], rows: int) -> float:
            pairs = rows * (self._prompt + self._tokens / 2)
            return max(median(gaps) - times.seconds(rows, 0, pairs), 0.0)

        one, all_ = beyond(self._single, 1), beyond(self._several, STREAMS)
        per_token = max(all_ - one, 0.0) / (STREAMS - 1)
        return Frontend(max(median(self._around), 0.0), max(one - per_token, 0.0), per_token)

    async def _together(self, count: int) -> list[Answer]:
        found = [self._client.stream(next(self._texts), self._tokens, self._precision) for _ in range(count)]
        answers = await asyncio.gather(*found)
        for answer in answers:
            if answer.error:
                raise BenchError(f"a request to the measured server failed: {answer.error}")
        return answers


async def measure_frontend(settings: ModelSettings, precision: str, times: StepTimes) -> Frontend:
    """All rounds at once, of an engine that was calibrated before.

    Args:
        precision: what the server runs; ``times`` are its.

    Raises:
        BenchError
    """
    async with own_server(settings, precision, STREAMS, settings.resolved_threads()) as client:
        rounds = FrontendRounds(client, precision)
        await rounds.prepare()
        for _ in range(ROUNDS):
            await rounds.round()
    return rounds.frontend(times)


def _in_the_engine(answer: Answer) -> float:
    """Seconds of a request's queue and prefill by the server's own clock.

    A request's first token minus these is what HTTP adds. Minus the calibrated prefill it would be mostly the
    host's drift between the two measurements.
    """
    timings: dict[str, float] = answer.last["timings"]
    return (timings["queue_ms"] + timings["prefill_ms"]) / MILLISECONDS


def _gaps(answers: list[Answer]) -> list[float]:
    """Seconds between tokens while all of them decode."""
    begin = max(answer.arrivals[0] for answer in answers)
    return [b - a for one in answers for a, b in pairwise([time for time in one.arrivals if time >= begin])]
