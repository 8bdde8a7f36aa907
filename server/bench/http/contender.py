"""The server as a contender: a stream for every row, all sent at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from server.bench.contenders import Prompts
from server.bench.errors import BenchError
from server.bench.figures import Run
from server.bench.http.client import Client
from server.bench.http.texts import Texts


class HttpContender:
    """Rows over HTTP. The prompts are as long as the engine's, but are texts, which the server encodes.

    Args:
        client: of a server with the precision loaded.
        precision: of the requests; the server's default if None.
        close: called at the end, such as to stop the server.
    """

    name = "bitdial over HTTP"
    weights_bytes: int | None = None

    def __init__(self, client: Client, precision: str | None, close: Callable[[], Awaitable[None]]) -> None:
        self._client, self._precision, self._close = client, precision, close
        self._texts = Texts(client)

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        texts = await self._texts.get(len(prompts), len(prompts[0]))
        first = await self._together(texts, 1)
        return Run(await self._together(texts, tokens), max(row[0] for row in first))

    async def close(self) -> None:
        await self._close()

    async def _together(self, texts: list[str], tokens: int) -> list[list[float]]:
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(self._client.stream(text, tokens, self._precision) for text in texts)
        )
        if failed := [answer.error for answer in answers if answer.error]:
            raise BenchError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
        return [[time_ - started for time_ in answer.arrivals] for answer in answers]
