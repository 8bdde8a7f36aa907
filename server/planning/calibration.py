"""Measures a loaded model's passes through its engine: prompt chunks, rows, and both together."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from loaders.base import LoadedModel
from loaders.runner import MixedRunner
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams, StepStats
from server.errors import Invalid
from server.host.memory import cache_token_bytes
from server.planning.step_times import ROUNDS, Cell, StepTimes

ROWS = (1, 2, 4, 8, 16)
"""Rows that are measured."""
SLOTS = max(ROWS) + 1
"""One more than rows: its prompt is computed beside them."""
CHUNKS = (16, 32, 64, 128)
"""Prompt chunks measured while nothing decodes; longer ones than a replica's are left out."""
PASSES = 96
"""Passes of each cell, at least; so many that a 99th percentile has a meaning over all cells."""
_PROMPT, _LONG_ROWS, _LONG = 16, 4, 320
_BESIDE = 64  # steps of rows beside which prompts are computed, at least: these are queued while they run
_FEWEST = 16  # steps in which all rows of a cell decode, before the first sequence ends
_SHORTEST = 64  # tokens of the context
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """One precision of one model on this host.

    Args:
        kv_token_bytes: keys and values of one cached token.
        mixed: as in ``StepTimes``.
        busy_chunk: prompt tokens of the passes that were measured beside rows.
    """

    precision: str
    weights_bytes: int
    kv_token_bytes: float
    load_seconds: float
    mixed: bool
    busy_chunk: int
    cells: Sequence[Cell]

    @classmethod
    def read(cls, saved: dict[str, Any]) -> "Calibration":
        return cls(**{**saved, "cells": [Cell(**cell) for cell in saved["cells"]]})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def step_times(self) -> StepTimes:
        return StepTimes(self.cells, self.mixed)


class Calibrator:
    """Measures one model; created on the event loop, which its engine runs on.

    Args:
        chunk, busy_chunk: as in ``server.planning.workload.Replica``.
        passes: of each cell.
    """

    def __init__(
        self, model: LoadedModel, threads: int, chunk: int, busy_chunk: int, passes: int = PASSES
    ) -> None:
        self._model = model
        self._passes = -(-passes // ROUNDS)  # of each cell in a round
        self._context = model.runner.context
        longest = self._context - 1  # of a prompt, since a token follows
        self._busy, chunk = min(busy_chunk, longest), min(chunk, longest)
        self._chunks = [size for size in CHUNKS if size <= chunk] or [chunk]
        self._steps: list[StepStats] = []
        self._engine = Engine(
            model,
            eos_ids=frozenset(),
            prefill_chunk=max(*self._chunks, self._busy),
            prefill_chunk_busy=self._busy,
            threads=threads,
            on_step=self._steps.append,
        )
        self._random = torch.Generator().manual_seed(7)

    async def measure(
        self, progress: Progress, between: Callable[[], Awaitable[None]] | None = None
    ) -> Calibration:
        """
        Args:
            between: is awaited after each of the ``ROUNDS``: what is measured there meets the same host.

        Raises:
            Invalid: the model's context is too short.
            ServiceError: the model fails.
        """
        if self._context < _SHORTEST:
            raise Invalid(f"a context of {self._context} tokens is too short to measure steps in")
        await self._engine.start()
        try:
            cells = await self._cells(progress, between)
        finally:
            await self._engine.stop()
        runner = self._model.runner
        return Calibration(
            self._model.precision,
            self._model.footprint.weights_bytes,
            cache_token_bytes(runner),
            self._model.load_seconds,
            isinstance(runner, MixedRunner),
            self._busy,
            cells,
        )

    async def _cells(self, progress: Progress, between: Callable[[], Awaitable[None]] | None) -> list[Cell]:
        rows = [count for count in ROWS if count < self._model.runner.slots and self._fits(count, _PROMPT)]
        work: list[Callable[[], Awaitable[Cell]]] = [
            *(partial(self._prompts, size) for size in self._chunks),
            *(partial(self._rows, count) for count in rows),
        ]
        if isinstance(self._model.runner, MixedRunner):
            work += [partial(self._both, count) for count in rows]
        if _LONG_ROWS in rows and self._fits(_LONG_ROWS, _LONG):
            work.append(partial(self._rows, _LONG_ROWS, _LONG))
        await self._rows(min(_LONG_ROWS, rows[-1]))  # caches and threads are warm from here on
        found: list[list[Cell]] = [[] for _ in work]
        for done, number in enumerate([*range(len(work))] * ROUNDS):
            progress("measuring steps", done, ROUNDS * len(work))
            found[number].append(await work[number]())
            if between is not None and number == len(work) - 1:
                await between()
        progress("measuring steps", ROUNDS * len(work), ROUNDS * len(work))
        return [_joined(rounds) for rounds in found]

    async def _prompts(self, size: int) -> Cell:
        """Chunks of ``size`` tokens while nothing decodes."""
        pairs, seconds = list[float](), list[float]()
        most = max(min(4 * size, self._context - 1) // size, 1)
        while len(seconds) < self._passes // 2:
            steps = await self._run([size * most], 1, chunk=size)
            for number, step in enumerate(steps):
                pairs.append(size * (number * size + size / 2))
                seconds.append(step.seconds)
        return Cell(0, size, pairs, seconds)

    async def _rows(self, count: int, prompt: int = _PROMPT) -> Cell:
        """Steps that decode ``count`` rows."""
        pairs, seconds = list[float](), list[float]()
        tokens = min(self._passes + self._steps_to_start(count, prompt), self._context - prompt)
        while len(seconds) < self._passes:
            held = 0.0
            for step in await self._run([prompt] * count, tokens):
                held += step.prompt_tokens + step.batch
                if step.batch == count and not step.prompt_tokens:
                    pairs.append(held)
                    seconds.append(median(step.gaps))
        return Cell(count, 0, pairs, seconds)

    async def _both(self, count: int) -> Cell:
        """Steps that decode ``count`` rows and compute a chunk of another prompt."""
        pairs, seconds = list[float](), list[float]()
        busy = self._busy
        beside = max(min(4 * busy, self._context - 1) // busy, 1)
        while len(seconds) < self._passes // 2:
            started = self._steps_to_start(count, _PROMPT)
            tokens = min(max(2 * self._passes, _BESIDE) + started, self._context - _PROMPT)
            held, number, ready = 0.0, 0, False
            for step in await self._run([_PROMPT] * count, tokens, beside=busy * beside):
                decodes_all = step.batch == count
                held += step.batch + (0 if decodes_all else step.prompt_tokens)
                if decodes_all and step.prompt_tokens == busy and ready:
                    pairs.append(held + busy * (number % beside * busy + busy / 2))
                    seconds.append(median(step.gaps))
                    number += 1
                ready = ready or decodes_all
        return Cell(count, busy, pairs, seconds)

    def _steps_to_start(self, count: int, prompt: int) -> int:
        """Steps after which ``count`` sequences that are queued together all decode."""
        return count * -(-prompt // min(self._busy, prompt))

    def _fits(self, count: int, prompt: int) -> bool:
        """Whether the first of ``count`` sequences still decodes when the last one has begun to."""
        return prompt + self._steps_to_start(count, prompt) + _FEWEST <= self._context

    async def _run(
        self, prompts: Sequence[int], tokens: int, chunk: int | None = None, beside: int | None = None
    ) -> list[StepStats]:
        """The steps of sequences that start together.

        Args:
            prompts: length of each sequence's prompt.
            beside: length of further prompts, one after another as long as the others decode.
        """
        self._steps.clear()
        all_started, ended = asyncio.Event(), asyncio.Event()
        waiting = len(prompts)

        async def one(length: int) -> None:
            nonlocal waiting
            started = False
            async for _ in self._engine.generate(self._ids(length), SamplingParams(tokens), chunk=chunk):
                if not started:
                    started, waiting = True, waiting - 1
                    if not waiting:
                        all_started.set()
            ended.set()

        async def others(length: int) -> None:
            await all_started.wait()
            while not ended.is_set():
                async for _ in self._engine.generate(self._ids(length), SamplingParams(1)):
                    pass

        running = [one(length) for length in prompts]
        await asyncio.gather(*running, *([] if beside is None else [others(beside)]))
        await asyncio.sleep(0)  # the last step's figures arrive after its tokens
        return list(self._steps)

    def _ids(self, length: int) -> list[int]:
        found: list[int] = torch.randint(
            1, self._model.runner.vocabulary, (length,), generator=self._random
        ).tolist()
        return found


def _joined(rounds: Sequence[Cell]) -> Cell:
    """One cell of what was measured of it in each round."""
    first = rounds[0]
    pairs = [value for one in rounds for value in one.pairs]
    return Cell(first.rows, first.chunk, pairs, [value for one in rounds for value in one.seconds])
