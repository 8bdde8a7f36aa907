"""Two properties of chunked prefill, measured over HTTP on an otherwise idle server."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from server.bench.errors import BenchError
from server.bench.figures import MILLISECONDS, percentile
from server.bench.http.client import Answer, Client
from server.bench.http.texts import Texts

FIRST_TOKEN_PROMPT, LONG_PROMPT = 128, 900
STREAMS, STREAM_PROMPT, STREAM_TOKENS = 8, 32, 160
_REPEAT = 7
_LAST_TOKENS = 4  # generated after the long prompt


@dataclass(frozen=True)
class FirstToken:
    """TTFT of a single request against its prefill time: the overhead of HTTP and service."""

    prompt: int
    ttft_ms: float
    """Median at the client, from before connecting."""
    prefill_ms: float
    """Median of the server's own figure for the same requests: from admission to the first token."""

    @property
    def ratio(self) -> float:
        return self.ttft_ms / self.prefill_ms


@dataclass(frozen=True)
class LongPrompt:
    """The effect of a long prompt on running streams."""

    prompt: int
    streams: int
    alone_p99_ms: float
    """Time between tokens of the streams without it."""
    beside_p99_ms: float
    """With it, over the whole of the same streams."""
    meanwhile_p99_ms: float
    """With it, over the gaps that overlap its computation."""
    long_ttft_ms: float
    """Until the long prompt's own first token."""

    @property
    def ratio(self) -> float:
        return self.beside_p99_ms / self.alone_p99_ms


async def first_token(client: Client, texts: Texts, precision: str | None) -> FirstToken:
    """TTFT of a 128-token prompt beside its prefill time, requests one after another."""
    prompts = await texts.get(_REPEAT + 1, FIRST_TOKEN_PROMPT)
    _, *answers = [_checked(await client.stream(text, 2, precision)) for text in prompts]  # after a warm-up
    return FirstToken(
        prompt=FIRST_TOKEN_PROMPT,
        ttft_ms=MILLISECONDS * median(answer.ttft for answer in answers),
        prefill_ms=median(answer.last["timings"]["prefill_ms"] for answer in answers),
    )


async def long_prompt(client: Client, texts: Texts, precision: str | None) -> LongPrompt:
    """Streams alone, then again with a long prompt sent when a quarter of their time is over."""
    context = (await client.ask("GET", "/info"))["max_total_tokens"]
    length = min(LONG_PROMPT, context - _LAST_TOKENS)
    short = await texts.get(STREAMS, STREAM_PROMPT)
    [long] = await texts.get(1, length)
    tokens = min(STREAM_TOKENS, context - STREAM_PROMPT)

    async def streams() -> list[Answer]:
        answers = await asyncio.gather(*(client.stream(text, tokens, precision) for text in short))
        return [_checked(answer) for answer in answers]

    await streams()
    alone = await streams()
    running = asyncio.create_task(streams())
    await asyncio.sleep(_duration(alone) / 4)
    long_answer = _checked(await client.stream(long, _LAST_TOKENS, precision))
    beside = await running
    return LongPrompt(
        prompt=length,
        streams=STREAMS,
        alone_p99_ms=_p99([gap for answer in alone for gap in answer.gaps]),
        beside_p99_ms=_p99([gap for answer in beside for gap in answer.gaps]),
        meanwhile_p99_ms=_p99(_overlapping(beside, long_answer.sent, long_answer.arrivals[0])),
        long_ttft_ms=MILLISECONDS * long_answer.ttft,
    )


def _overlapping(answers: Sequence[Answer], begin: float, end: float) -> list[float]:
    return [
        later - earlier
        for answer in answers
        for earlier, later in pairwise(answer.arrivals)
        if earlier < end and later > begin
    ]


def _p99(gaps: list[float]) -> float:
    return MILLISECONDS * percentile(gaps, 0.99)


def _duration(answers: Sequence[Answer]) -> float:
    return max(answer.arrivals[-1] for answer in answers) - min(answer.sent for answer in answers)


def _checked(answer: Answer) -> Answer:
    if answer.error:
        raise BenchError(f"a request of the checks failed: {answer.error}")
    return answer
