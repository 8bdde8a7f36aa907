"""The interface of a measured engine: it continues a batch of prompts and reports token times."""

import asyncio
import time
from typing import Protocol

from loaders.base import LoadedModel
from server.bench.figures import Run
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams

Prompts = list[list[int]]


class Contender(Protocol):
    """A loaded engine, idle between runs, so that several can be measured in turn."""

    name: str
    weights_bytes: int | None
    """Of all weight tensors; None if the engine doesn't report it."""

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        """Continues the prompts together, greedily, each by exactly ``tokens`` tokens (2 or more)."""
        ...

    async def close(self) -> None: ...


class EngineContender:
    """A precision through its engine: scheduler, sampler and event loop included. Made on the event loop."""

    name = "bitdial"

    def __init__(self, loaded: LoadedModel, threads: int | None = None) -> None:
        self.weights_bytes: int | None = loaded.footprint.weights_bytes
        self._engine = Engine(loaded, eos_ids=frozenset(), threads=threads)

    async def start(self) -> "EngineContender":
        await self._engine.start()
        return self

    async def run(self, prompts: Prompts, tokens: int) -> Run:
        first, _ = await self._together(prompts, 1)
        arrivals, ids = await self._together(prompts, tokens)
        return Run(arrivals, max(row[0] for row in first), ids)

    async def close(self) -> None:
        await self._engine.stop()

    async def _together(self, prompts: Prompts, tokens: int) -> tuple[list[list[float]], list[list[int]]]:
        params = SamplingParams(tokens, ignore_eos=True)
        started = time.perf_counter()

        async def one(prompt: list[int]) -> list[tuple[float, int]]:
            generation = self._engine.generate(prompt, params)
            return [(time.perf_counter() - started, token.id) async for token in generation]

        rows = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return [[time_ for time_, _ in row] for row in rows], [[id_ for _, id_ in row] for row in rows]
