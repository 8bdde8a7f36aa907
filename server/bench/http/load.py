"""Loads on a server: closed-loop streams, and open-loop Poisson arrivals."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from random import Random

from server.bench.figures import MILLISECONDS, percentile
from server.bench.http.client import Answer, Client
from server.bench.http.texts import Texts

_SEED = 7


@dataclass(frozen=True)
class Shape:
    """Parameters of every request."""

    precision: str | None
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Limits:
    """Limits of a good request, in milliseconds."""

    ttft_ms: float
    inter_token_ms: float

    def met(self, answer: Answer) -> bool:
        """Whether it has no error, and TTFT and mean inter-token time are within the limits."""
        if answer.error:
            return False
        gaps = answer.gaps
        mean = sum(gaps) / len(gaps) if gaps else 0.0
        return answer.ttft * MILLISECONDS <= self.ttft_ms and mean * MILLISECONDS <= self.inter_token_ms


@dataclass(frozen=True)
class LoadFigures:
    """Figures of a load. Percentiles are over requests without error, and over all their tokens."""

    kind: str
    """``closed loop`` or ``poisson``."""
    offered: float
    """Streams of a closed loop; requests a second of a Poisson process."""
    seconds: float
    """From the first request to the end of the last."""
    requests: int
    errors: dict[str, int]
    tokens_per_second: float
    requests_per_second: float
    """Answered without error."""
    goodput: float
    """Requests a second that met the limits."""
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float


class Load:
    """Generates loads of one shape on one server."""

    def __init__(self, client: Client, texts: Texts, shape: Shape, limits: Limits) -> None:
        self._client, self._texts, self._shape, self._limits = client, texts, shape, limits

    async def closed_loop(self, streams: int, seconds: float) -> LoadFigures:
        """Runs ``streams`` streams for ``seconds``; each sends its next request after its last one."""
        texts = await self._texts.get(streams, self._shape.prompt)
        answers: list[Answer] = []
        started = time.perf_counter()

        async def one(text: str) -> None:
            while time.perf_counter() < started + seconds:
                answers.append(await self._send(text))

        await asyncio.gather(*(one(text) for text in texts))
        return summarize_load("closed loop", streams, started, answers, self._limits)

    async def poisson(self, rate: float, seconds: float) -> LoadFigures:
        """Sends ``rate`` requests per second at random times, whether or not earlier ones have ended."""
        texts = await self._texts.get(16, self._shape.prompt)
        started = time.perf_counter()
        sending = []
        async for number in _arrivals(rate, seconds):
            sending.append(asyncio.create_task(self._send(texts[number % len(texts)])))
        answers = await asyncio.gather(*sending)
        return summarize_load("poisson", rate, started, answers, self._limits)

    async def _send(self, text: str) -> Answer:
        return await self._client.stream(text, self._shape.tokens, self._shape.precision)


async def _arrivals(rate: float, seconds: float) -> AsyncIterator[int]:
    """Yields numbers from 0 at the times of a seeded Poisson process; at least one."""
    random, started, moment, number = Random(_SEED), time.perf_counter(), 0.0, 0
    while moment < seconds:
        await asyncio.sleep(max(started + moment - time.perf_counter(), 0))
        yield number
        moment, number = moment + random.expovariate(rate), number + 1


def summarize_load(
    kind: str, offered: float, started: float, answers: Sequence[Answer], limits: Limits
) -> LoadFigures:
    """
    Args:
        started: ``time.perf_counter()`` seconds of the first request.
    """
    fine = [answer for answer in answers if not answer.error]
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    seconds = max((answer.arrivals[-1] for answer in fine), default=time.perf_counter()) - started
    ttfts = [answer.ttft for answer in fine]
    gaps = [gap for answer in fine for gap in answer.gaps]
    return LoadFigures(
        kind=kind,
        offered=offered,
        seconds=seconds,
        requests=len(answers),
        errors=errors,
        tokens_per_second=sum(len(answer.arrivals) for answer in fine) / seconds,
        requests_per_second=len(fine) / seconds,
        goodput=sum(limits.met(answer) for answer in fine) / seconds,
        ttft_p50_ms=MILLISECONDS * percentile(ttfts, 0.5),
        ttft_p99_ms=MILLISECONDS * percentile(ttfts, 0.99),
        inter_token_p50_ms=MILLISECONDS * percentile(gaps, 0.5),
        inter_token_p99_ms=MILLISECONDS * percentile(gaps, 0.99),
    )
